"""The words that methods, networks, data and training share.

A *method* (:class:`Method`) is a distillation objective. It says what it needs (:class:`Needs`), is built once
from measured shapes (:class:`Probe`, :class:`DataInfo`), and then turns the networks' :class:`Outputs` of every
view (:class:`Views`) into named :class:`Losses`. It may declare several :class:`Phase` s. Whoever runs it serves
these declarations and never asks which method it is.

Shapes: B batch, C classes, D pooled features, N samples of the training set.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

Role = Literal["task", "distillation"]
Family = Literal["logit", "feature", "relation"]


@dataclass(frozen=True)
class Outputs:
    """What one network said about one view.

    ``logits`` (B, C); ``pooled`` (B, D), the vector that feeds the classifier, where the network has one;
    ``taps``: the feature maps (B, channels, height, width) or tokens (B, length, D) that the method asked for, by name.
    """

    logits: Tensor
    pooled: Tensor | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)

    def require_pooled(self) -> Tensor:
        """``pooled`` of a network that has one, which a method's ``build`` asks with ``Probe.resolve(("pooled",))``."""
        if self.pooled is None:
            raise ValueError("this network has no pooled vector before its classifier; choose a method that needs none")
        return self.pooled


@dataclass(frozen=True)
class Views:
    """One network's outputs on the real view and on each virtual view of the same images."""

    real: Outputs
    virtual: tuple[Outputs, ...] = ()

    def each(self) -> tuple[Outputs, ...]:
        """All views, the real one first."""
        return (self.real, *self.virtual)


NO_TEACHER = Views(Outputs(torch.empty(0)))
"""What a method whose ``Needs.teacher`` is false is given in the teacher's place."""


@dataclass(frozen=True)
class Batch:
    """Which images these are: ``index`` (B,) into the training set, ``target`` (B,) their classes."""

    index: Tensor
    target: Tensor


@dataclass(frozen=True)
class Progress:
    """Where the run stands.

    ``epoch`` (from 1, within the phase) and ``step`` (from 0, over the whole run) are integer scalars on the
    device, so that a captured step can read them; the rest are plain values. ``seed`` is the key of the
    method's own draws (see :mod:`vrm.randomness`).
    """

    epoch: Tensor
    step: Tensor
    num_epochs: int
    num_steps: int
    phase: str = "main"
    seed: int = 0
    view: int = 0
    """Which view stands in ``Views.real``: 0 is the real one. A single-view method that is run on several views is
    called once for each; only the call for view 0 may leave something for ``after_step``, and draws differ."""

    def ramp(self, epochs: int) -> Tensor:
        """A factor that rises linearly from ``1 / epochs`` in the first epoch to 1, and stays there."""
        return (self.epoch / max(epochs, 1)).clamp(max=1.0)


@dataclass(frozen=True)
class Term:
    """One summand of the objective: ``weight * value``. DOT and the logs tell task from distillation by ``role``."""

    value: Tensor
    weight: float | Tensor = 1.0
    role: Role = "distillation"


class Losses(dict[str, Term]):
    """Named terms in the order in which they are logged."""

    def total(self, *, role: Role | None = None, names: Iterable[str] | None = None) -> Tensor:
        """The weighted sum (a scalar) of all terms, or of one role, or of the named ones."""
        chosen = self.keys() if names is None else tuple(names)
        terms = [self[name] for name in chosen if role is None or self[name].role == role]
        if not terms:
            raise ValueError(f"no loss term with role {role!r} among {sorted(self)}; declare one or change the phase")
        return torch.stack([term.weight * term.value for term in terms]).sum()


@dataclass(frozen=True)
class Needs:
    """What an instance of a method asks of its surroundings.

    Tap selectors: ``stages``, ``stages:pre``, ``last``, ``last:pre``, ``stem``, ``stageK``, ``stageK:pre`` or a raw
    module path. ``:pre`` is the value before the last ReLU.
    """

    virtual_views: int = 0
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    teacher: bool = True
    """Whether there is anything to learn from a teacher (``ce`` has none)."""
    teacher_batch_statistics: bool = False
    """The teacher's batch norms normalise by each batch, as in train mode; its own statistics never move."""
    index: bool = False
    """The loss or its memory reads ``Batch.index``."""
    draws: bool = False
    """Draws random numbers of its own, through :mod:`vrm.randomness` with ``Progress.seed``."""
    couples_samples: bool = False
    """The loss relates the samples of a batch: splitting the batch changes the objective."""
    capturable: bool = True
    """The step may be captured as a CUDA graph."""
    separate_gradients: bool = False
    """The optimiser wants the gradients of task and distillation apart (DOT)."""
    min_batch: int = 1
    min_classes: int = 2


@dataclass(frozen=True)
class Phase:
    """A stretch of training with an objective of its own.

    ``epochs``: how many, or ``None`` for the run's own number. ``trained``: which parameter groups move, of
    ``"student"`` and ``"method"``. ``terms``: the names of the active loss terms, ``None`` for all. ``schedule``:
    ``"run"`` follows the run's schedule, ``"constant"`` keeps the base rate. ``fresh_optimizer``: forget momenta
    before it starts.
    """

    name: str = "main"
    epochs: int | None = None
    trained: tuple[Literal["student", "method"], ...] = ("student", "method")
    terms: tuple[str, ...] | None = None
    schedule: Literal["run", "constant"] = "run"
    fresh_optimizer: bool = True


@dataclass(frozen=True)
class DataInfo:
    """The training set as a method may know it: ``targets`` (N,) are the classes of its samples."""

    num_samples: int
    num_classes: int
    batch_size: int
    targets: Tensor


@dataclass(frozen=True)
class Norm:
    """The affine part of a batch norm: ``weight`` and ``bias``, (channels,) each."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Probe:
    """What was measured of a network before training starts.

    ``shapes``: tap name to shape without the batch axis, in the order of the forward pass (``stem``, ``stage1`` ..
    ``stageN``, ``pooled``, ``logits``, the ``:pre`` of those that have one, raw paths asked for). ``signed``: the
    taps that are not the output of a ReLU. ``norms``: for a ``:pre`` tap, the batch norm whose output it is.
    ``classifier``: the last linear layer, where there is one.
    """

    name: str
    input_size: tuple[int, int]
    num_classes: int
    shapes: Mapping[str, tuple[int, ...]]
    signed: frozenset[str] = frozenset()
    norms: Mapping[str, Norm] = field(default_factory=dict)
    classifier: nn.Linear | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """``("stage1", .., "stageN")``."""
        return tuple(name for name in self.shapes if name.startswith("stage") and name[5:].isdigit())

    def resolve(self, selectors: Sequence[str]) -> tuple[str, ...]:
        """The names of the taps that selectors stand for. ``ValueError`` names the nearest for an unknown one."""
        names: list[str] = []
        for selector in selectors:
            base, _, pre = selector.partition(":")
            suffix = f":{pre}" if pre else ""
            if base == "stages":
                found = [stage + suffix for stage in self.stages]
            elif base == "last":
                found = [self.stages[-1] + suffix] if self.stages else []
            else:
                found = [selector]
            missing = [name for name in found if name not in self.shapes]
            if missing or not found:
                wanted = missing[0] if missing else selector
                near = difflib.get_close_matches(wanted, self.shapes, n=3, cutoff=0.3) or list(self.shapes)
                raise ValueError(
                    f"{self.name} has no tap {wanted!r}; nearest: {', '.join(near)}. "
                    "`vrm models NAME` lists the taps of a network; any module path works too."
                )
            names += found
        return tuple(dict.fromkeys(names))

    def channels(self, tap: str) -> int:
        """The number of channels of a map, the width of tokens or of a vector."""
        shape = self.shapes[tap]
        return shape[0] if len(shape) != 2 else shape[-1]

    def stride(self, tap: str) -> float:
        """Input height over the tap's height (tokens: as if on a square grid)."""
        shape = self.shapes[tap]
        if len(shape) == 3:
            return self.input_size[0] / shape[1]
        if len(shape) == 2:
            return float(self.input_size[0] / max(int(shape[0] ** 0.5), 1))
        return float(self.input_size[0])


class TwoGradientOptimizer(Protocol):
    """An optimiser that is given the gradients of task and distillation apart, aligned with its parameters."""

    def step_apart(self, task: Sequence[Tensor | None], distillation: Sequence[Tensor | None]) -> None: ...


OptimizerFactory = Callable[..., torch.optim.Optimizer]


class Method(nn.Module):
    """A distillation objective. Its typed ``__init__`` is its configuration schema; its file's name is its name.

    ``published`` maps a data set to settings: ``{"cifar100": {"*": {...}, "resnet56/resnet20": {...}}}`` with pairs
    written ``teacher/student``; the pair's settings win over ``"*"``.
    """

    title: ClassVar[str]
    venue: ClassVar[str]
    year: ClassVar[int]
    family: ClassVar[Family]
    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    optimizer: ClassVar[OptimizerFactory | None] = None
    """``(params, *, lr, momentum, weight_decay, method) -> Optimizer``, for methods that are optimisers (DOT)."""

    matched: tuple[tuple[str, str], ...] = ()
    """Which tap of the student learns from which of the teacher, known after :meth:`build`."""

    @property
    def needs(self) -> Needs:
        """What this instance, with its options, asks for."""
        return Needs()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The stretches of training, in order; exactly one has ``epochs=None``."""
        return (Phase(),)

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Make projectors and banks from measured shapes; ``ValueError`` if the pair cannot work.

        Not called for a method without a teacher.
        """

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """The loss terms of one batch."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    @torch.no_grad()
    def after_step(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> None:
        """Update the method's own state (banks). Runs after the optimiser; only buffers may change, and only here."""
