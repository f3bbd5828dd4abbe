"""The cost of methods beside the networks, on a reference pair: resnet32x4 to resnet8x4 on CIFAR-100, batch 64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from vrm import models
from vrm.contract import NO_TEACHER, Batch, DataInfo, Method, Outputs, Probe, Progress, Views

TEACHER, STUDENT = "resnet32x4", "resnet8x4"
BATCH, CLASSES, SAMPLES = 64, 100, 50_000


@dataclass(frozen=True)
class Cost:
    """What one method adds to a run."""

    passes: int
    """The student's passes for each image in an epoch."""
    backward_passes: int
    parameters: int
    """Number of parameters of the method itself."""
    memory: int
    """Bytes of the method's buffers."""
    epochs: int
    """Epochs that its phases add."""
    work: float
    """Matrix products and convolutions of the loss, forward and backward, as a share of those of one student pass.
    Other work (decompositions, sorting, elementwise operations) is not counted."""

    def __str__(self) -> str:
        """Return the cost in words, without what costs nothing."""
        parts = [f"{self.passes} student pass{'es' * (self.passes > 1)}"]
        parts += [f"{self.backward_passes} backward passes"] * (self.backward_passes > self.passes)
        parts += [f"loss {100 * self.work:.0f} % of a pass"] * (self.work >= 0.005)
        parts += [f"{self.parameters / 1e6:.2f} M parameters"] * bool(self.parameters)
        parts += [f"{self.memory / 1e6:.1f} MB of memory"] * (self.memory >= 1e5)
        parts += [f"{self.epochs} more epochs"] * bool(self.epochs)
        return ", ".join(parts)


@lru_cache(maxsize=1)
def _pair() -> tuple[Probe, Probe, int]:
    """Return student, teacher, and the floating-point operations of a training pass of the student."""

    def probe(name: str) -> Probe:
        return models.probe(models.create(name, num_classes=CLASSES), name=name, input_size=(32, 32))

    with torch.random.fork_rng(devices=[]):
        student, teacher = probe(STUDENT), probe(TEACHER)
        network = models.create(STUDENT, num_classes=CLASSES).to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(BATCH, 3, 32, 32, device="meta")).sum().backward()
    return student, teacher, int(counter.get_total_flops())


def _outputs(probe: Probe, selectors: tuple[str, ...], num_views: int, *, learns: bool) -> Views:
    """Return the outputs of a batch, as tensors without values."""

    def view() -> Outputs:
        names = dict.fromkeys((*probe.resolve(selectors), "pooled", "logits"))
        taps = {n: torch.empty(BATCH, *probe.shapes[n], device="meta", requires_grad=learns) for n in names}
        return Outputs(taps["logits"], taps["pooled"], taps)

    return Views(view(), tuple(view() for _ in range(num_views - 1)))


def _work(method: Method) -> int:
    """Return the operations of the loss of one batch, in the phase with most. Move the method to the device meta."""
    student, teacher, _ = _pair()
    needs = method.to("meta").needs
    num_views = 1 + needs.virtual_views
    learner = _outputs(student, needs.student_taps, num_views, learns=True)
    master = _outputs(teacher, needs.teacher_taps, num_views, learns=False) if needs.teacher else NO_TEACHER
    batch = Batch(*torch.zeros(2, BATCH, dtype=torch.long, device="meta"))
    first, start = torch.zeros(2, dtype=torch.long, device="meta")
    found = []
    for phase in method.phases:
        with FlopCounterMode(display=False) as counter:
            losses = method(learner, master, batch, Progress(first, start, 1, 1, phase.name))
            losses.total(names=phase.terms).backward()
        found.append(int(counter.get_total_flops()))
    return max(found)


def measure_cost(method: Method) -> Cost:
    """Return the cost of a new instance, which cannot be used afterwards.

    Raise ``ValueError`` if the method cannot work on the reference pair.
    """
    needs = method.needs
    student, teacher, pass_of_student = _pair()
    if needs.teacher:
        with torch.random.fork_rng(devices=[]):
            method.build(student, teacher, DataInfo(SAMPLES, CLASSES, BATCH, torch.arange(SAMPLES) % CLASSES))
    passes = 1 + needs.virtual_views
    return Cost(
        passes=passes,
        backward_passes=passes * (1 + needs.separate_gradients),
        parameters=sum(p.numel() for p in method.parameters()),
        memory=sum(b.numel() * b.element_size() for b in method.buffers()),
        epochs=sum(phase.epochs or 0 for phase in method.phases),
        work=_work(method) / pass_of_student,
    )
