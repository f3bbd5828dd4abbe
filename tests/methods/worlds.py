"""Made-up networks and batches for the contract suite: what they measure, what they say, and how both are distorted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vrm import methods
from vrm.contract import (
    NO_TEACHER,
    NO_TEACHER_PROBE,
    Batch,
    DataInfo,
    Method,
    Norm,
    Outputs,
    Phase,
    Probe,
    Progress,
    Views,
)

from .harness import Case

INPUT = (16, 16)
NUM_SAMPLES = 40
BATCH = 6

Tensors = dict[tuple[int, str], Tensor]
"""The outputs of one network: (view, name of the tap) to values; view 0 is the real one."""


@dataclass(frozen=True)
class Network:
    """Shapes of a network. ``ends_linear``: its stages end without a ReLU, so they are signed and have no ``:pre``."""

    channels: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...] = ((8, 8), (4, 4), (2, 2))
    tokens: bool = False
    ends_linear: bool = False

    def probe(self, name: str, num_classes: int) -> Probe:
        """What would be measured of it."""
        generator = torch.Generator().manual_seed(len(name))
        shapes: dict[str, tuple[int, ...]] = {} if self.tokens else {"stem": (self.channels[0], *self.sizes[0])}
        stages = {
            f"stage{k}": (1 + h * w, c) if self.tokens else (c, h, w)
            for k, (c, (h, w)) in enumerate(zip(self.channels, self.sizes, strict=True), start=1)
        }
        pooled = self.channels[-1] + 2  # as in MobileNetV2, wider than the last stage
        last_map = {} if self.tokens else {"map": (pooled, *self.sizes[-1])}
        shapes |= stages | last_map | {"pooled": (pooled,), "logits": (num_classes,)}
        signed = {"logits"}
        norms = {}
        if self.tokens or self.ends_linear:
            signed |= stages.keys()
        else:
            for stage, shape in stages.items():
                shapes[f"{stage}:pre"] = shape
                weight, bias = torch.randn(2, shape[0], generator=generator)
                norms[f"{stage}:pre"] = Norm(weight, bias)
            signed |= norms.keys()
        classifier = nn.Linear(pooled, num_classes)
        with torch.no_grad():
            for parameter in classifier.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return Probe(name, INPUT, num_classes, shapes, frozenset(signed), norms, classifier)


@dataclass(frozen=True)
class Pair:
    """Student and teacher."""

    student: Network = field(default_factory=lambda: Network((3, 4, 5)))
    teacher: Network = field(default_factory=lambda: Network((4, 6, 7)))
    num_classes: int = 4

    def probes(self) -> tuple[Probe, Probe]:
        """Of student and teacher."""
        return self.student.probe("student", self.num_classes), self.teacher.probe("teacher", self.num_classes)

    def of_equal_channels(self) -> Pair:
        """The teacher as wide as the student."""
        missing = len(self.teacher.channels) - len(self.student.channels)
        channels = (self.student.channels[0],) * missing + self.student.channels
        return replace(self, teacher=replace(self.teacher, channels=channels))


TWICE = ((16, 16), (8, 8), (4, 4))
PAIRS: Mapping[str, Pair] = {
    "alike": Pair(),
    "two_classes": Pair(num_classes=2),
    "teacher_larger": Pair(teacher=Network((4, 6, 7), TWICE)),
    "student_larger": Pair(student=Network((3, 4, 5), TWICE)),
    "rectangular": Pair(Network((3, 4, 5), ((8, 6), (4, 3), (2, 2))), Network((4, 6, 7), ((8, 6), (4, 3), (2, 2)))),
    "fewer_student_stages": Pair(student=Network((4, 5), ((4, 4), (2, 2)))),
    "teacher_of_tokens": Pair(teacher=Network((6, 6, 6, 6), ((4, 4),) * 4, tokens=True)),
    "student_ends_linear": Pair(student=Network((3, 4, 5), ends_linear=True)),
    "teacher_ends_linear": Pair(teacher=Network((4, 6, 7), ends_linear=True)),
}


def pair_of(case: Case, name: str = "alike") -> Pair:
    """A pair of networks on which the method can work."""
    return PAIRS[name].of_equal_channels() if case.same_channels else PAIRS[name]


def build(
    case: Case, settings: Mapping[str, Any], pair: Pair, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Method:
    """The method, built on a pair of networks, its own weights from ``seed``."""
    torch.manual_seed(seed)
    method = methods.load(case.name)(**{**case.small, **settings})
    targets = torch.arange(NUM_SAMPLES) % pair.num_classes
    student, teacher = pair.probes()
    info = DataInfo(NUM_SAMPLES, pair.num_classes, BATCH, targets)
    method.build(student, teacher if method.needs.teacher else NO_TEACHER_PROBE, info)
    return method.to(dtype)


@dataclass(frozen=True)
class Inputs:
    """What a method is given: the tensors of both networks, the batch, and progress."""

    student: Tensors
    teacher: Tensors
    batch: Batch

    def views(self) -> tuple[Views, Views]:
        """Student's and teacher's."""
        return assemble(self.student), assemble(self.teacher) if self.teacher else NO_TEACHER

    def to(self, dtype: torch.dtype) -> Inputs:
        """All tensors as leaves of another type, the student's with gradient."""
        return self.map(lambda x: x.detach().to(dtype))

    def rows(self, rows: slice | Tensor) -> Inputs:
        """Some of the samples."""
        taken = self.map(lambda x: x.detach()[rows].clone())
        return replace(taken, batch=Batch(self.batch.index[rows], self.batch.target[rows]))

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """A function of every tensor; the student's results are leaves with gradient."""
        student = {name: function(x).detach().requires_grad_() for name, x in self.student.items()}
        return Inputs(student, {name: function(x).detach() for name, x in self.teacher.items()}, self.batch)


def assemble(tensors: Tensors) -> Views:
    """Tensors as a method sees them."""
    each = []
    for view in range(1 + max(view for view, _ in tensors)):
        taps = {name: x for (of, name), x in tensors.items() if of == view}
        each.append(Outputs(taps["logits"], taps["pooled"], taps))
    return Views(each[0], tuple(each[1:]))


def draw(method: Method, pair: Pair, *, size: int = BATCH, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """A batch that has the taps which the method asks for, and no others."""
    generator = torch.Generator().manual_seed(seed)
    needs = method.needs
    index = torch.randperm(NUM_SAMPLES, generator=generator)[:size]
    networks: list[Tensors] = []
    for probe, selectors in zip(pair.probes(), (needs.student_taps, needs.teacher_taps), strict=True):
        tensors: Tensors = {}
        for view in range(1 + needs.virtual_views):
            for name in dict.fromkeys((*probe.resolve(selectors), "pooled", "logits")):
                x = torch.randn(size, *probe.shapes[name], generator=generator, dtype=torch.float64)
                tensors[view, name] = (x if name in probe.signed else x.abs()).to(dtype)
        networks.append(tensors)
    student, teacher = networks
    if not needs.teacher:
        teacher = {}
    return Inputs(
        {name: x.requires_grad_() for name, x in student.items()}, teacher, Batch(index, index % pair.num_classes)
    )


def progress(phase: Phase, *, epoch: int = 2, step: int = 3, seed: int = 0) -> Progress:
    """Somewhere in a phase of ten epochs."""
    return Progress(torch.tensor(epoch), torch.tensor(step), 10, 100, phase.name, seed)


def loss_of(method: Method, inputs: Inputs, phase: Phase, at: Progress | None = None) -> Tensor:
    """The objective of a phase."""
    student, teacher = inputs.views()
    return method(student, teacher, inputs.batch, at or progress(phase)).total(names=phase.terms)


def gradients(method: Method, inputs: Inputs, loss: Tensor) -> dict[str, Tensor]:
    """Of the student's tensors and of the method's parameters; zeros where it does not depend on them."""
    leaves = {f"student {key}": x for key, x in inputs.student.items()}
    leaves |= {name: p for name, p in method.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def step(method: Method, inputs: Inputs, phase: Phase, at: Progress | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective and its gradients, and after them the method's own update."""
    loss = loss_of(method, inputs, phase, at)
    grads = gradients(method, inputs, loss)
    student, teacher = inputs.views()
    method.after_step(student, teacher, inputs.batch, at or progress(phase))
    return loss.detach(), grads


def features(tensors: Tensors, function: Callable[[Tensor], Tensor]) -> Tensors:
    """A function of everything but the logits."""
    return {(view, name): x if name == "logits" else function(x) for (view, name), x in tensors.items()}


def logits(tensors: Tensors, function: Callable[[Tensor], Tensor]) -> Tensors:
    """A function of the logits."""
    return {(view, name): function(x) if name == "logits" else x for (view, name), x in tensors.items()}


def _both(change: Callable[[Tensors], Tensors]) -> Callable[[Inputs], Inputs]:
    def changed(inputs: Inputs) -> Inputs:
        return Inputs(change(inputs.student), change(inputs.teacher), inputs.batch).map(lambda x: x)

    return changed


def _student(change: Callable[[Tensors], Tensors]) -> Callable[[Inputs], Inputs]:
    def changed(inputs: Inputs) -> Inputs:
        return Inputs(change(inputs.student), inputs.teacher, inputs.batch).map(lambda x: x)

    return changed


EXTREMES: Mapping[str, Callable[[Inputs], Inputs]] = {
    "large_logits": _both(lambda t: logits(t, lambda x: x * 1e4)),
    "equal_logits": _both(lambda t: logits(t, torch.zeros_like)),
    "identical_rows": _both(lambda t: {name: x[:1].expand_as(x).clone() for name, x in t.items()}),
    "identical_student_rows": _student(lambda t: {name: x[:1].expand_as(x).clone() for name, x in t.items()}),
    "constant_features": _both(lambda t: features(t, torch.ones_like)),
    "zero_features": _both(lambda t: features(t, torch.zeros_like)),
    "zero_student_features": _student(lambda t: features(t, torch.zeros_like)),
}
"""Inputs on which a loss and its gradient stay finite."""


def _shift_logits(x: Tensor) -> Tensor:
    return x + torch.linspace(-3, 5, len(x), dtype=x.dtype)[:, None]


def _rotate(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(x.shape[1])
    orthogonal, _ = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=x.dtype))
    return torch.einsum("bc...,cd->bd...", x, orthogonal)


def _scale_samples(x: Tensor) -> Tensor:
    return x * torch.linspace(0.5, 2, len(x), dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _translate(x: Tensor) -> Tensor:
    return x + torch.linspace(-1, 2, x.shape[1], dtype=x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))


def _reorder_channels(x: Tensor) -> Tensor:
    return x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(x.shape[1]))]


INVARIANCES: Mapping[str, Callable[[Inputs], Inputs]] = {
    "sample_order": lambda inputs: inputs.rows(torch.randperm(len(inputs.batch.index))),
    "logit_shift": _both(lambda t: logits(t, _shift_logits)),
    "teacher_logit_scale": lambda inputs: replace(inputs, teacher=logits(inputs.teacher, lambda x: 3 * x)),
    "rotation": _both(lambda t: features(t, _rotate)),
    "scale": _both(lambda t: features(t, lambda x: x * (0.5 + x.shape[1]))),
    "sample_scale": _both(lambda t: features(t, _scale_samples)),
    "translation": _both(lambda t: features(t, _translate)),
    "channel_order": _both(lambda t: features(t, _reorder_channels)),
    "mirror": _both(lambda t: features(t, lambda x: x.flip(-1) if x.ndim == 4 else x)),
}
"""Changes of the inputs that some losses do not see; those of features are told apart by the number of channels."""
