"""The cost of methods beside the networks, on a reference pair: resnet32x4 to resnet8x4 on CIFAR-100, batch 64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from vrm import models
from vrm.contract import NO_TEACHER, NO_TEACHER_PROBE, Batch, Method, Outputs, Probe, Progress, Views
from vrm.methods._page import reference_pair

TEACHER, STUDENT, BATCH = "resnet32x4", "resnet8x4", 64


@dataclass(frozen=True)
class Cost:
    """What one step of a method computes. The method's page says what else it adds: parameters, memory, epochs."""

    passes: int
    """The student's passes for each image in an epoch."""
    backward_passes: int
    work: float
    """Matrix products and convolutions of the loss, forward and backward, as a share of those of one student pass.
    Other work (decompositions, sorting, elementwise operations) is not counted."""

    def __str__(self) -> str:
        """Return the cost in words, without what costs nothing."""
        parts = [f"{self.passes} student pass{'es' * (self.passes > 1)}"]
        parts += [f"{self.backward_passes} backward passes"] * (self.backward_passes > self.passes)
        parts += [f"loss {100 * self.work:.0f} % of a pass"] * (self.work >= 0.005)
        return ", ".join(parts)


@cache
def _work_of_student() -> int:
    """Return the floating-point operations of a training pass of the student on one batch."""
    with torch.random.fork_rng(devices=[]):
        network = models.create(STUDENT, num_classes=100).to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(BATCH, 3, 32, 32, device="meta")).sum().backward()
    return int(counter.get_total_flops())


def _outputs(probe: Probe, selectors: tuple[str, ...], num_views: int, *, learns: bool) -> Views:
    """Return the outputs of a batch, as tensors without values."""

    def view() -> Outputs:
        names = dict.fromkeys((*probe.resolve(selectors), "pooled", "logits"))
        taps = {n: torch.empty(BATCH, *probe.shapes[n], device="meta", requires_grad=learns) for n in names}
        return Outputs(taps["logits"], taps["pooled"], taps)

    return Views.of(view() for _ in range(num_views))


def _work(method: Method, student: Probe, teacher: Probe) -> int:
    """Return the operations of the loss of one batch, in the phase with most. Move the method to the device meta."""
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
    with torch.random.fork_rng(devices=[]):
        student, teacher, data = reference_pair()
        method.build(student, teacher if needs.teacher else NO_TEACHER_PROBE, data)
    passes = 1 + needs.virtual_views
    return Cost(passes, passes * (1 + needs.separate_gradients), _work(method, student, teacher) / _work_of_student())
