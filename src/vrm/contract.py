"""The types that methods, networks, data and training share.

A *method* (:class:`Method`) is a distillation objective. It declares what it needs (:class:`Needs`), is built once from
measured shapes (:class:`Probe`, :class:`DataInfo`), and then turns the networks' :class:`Outputs` for every view
(:class:`Views`) into named :class:`Losses`. It may declare several training phases (:class:`Phase`). The training loop
serves these declarations and never asks which method it runs.

Shapes: B batch, C classes, D pooled features, N samples of the training set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vrm.pairing import pair_taps
from vrm.wording import nearest

Role = Literal["task", "distillation"]
Family = Literal["logit", "feature", "relation"]


@dataclass(frozen=True)
class Outputs:
    """The outputs of one network for one view.

    ``logits`` (B, C). ``pooled`` (B, D): the vector that feeds the classifier, or None if the network has none.
    ``taps``: the feature maps (B, channels, height, width) or tokens (B, length, D) that the method asked for, by name.
    """

    logits: Tensor
    pooled: Tensor | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Outputs:
        """Return the outputs with each tensor changed by ``function``."""
        pooled = None if self.pooled is None else function(self.pooled)
        return Outputs(function(self.logits), pooled, {name: function(value) for name, value in self.taps.items()})

    def require_pooled(self) -> Tensor:
        """Return ``pooled``. Raise ``ValueError`` if the network has none.

        A method checks this in ``build``, before training, with ``Probe.resolve(("pooled",))``.
        """
        if self.pooled is None:
            raise ValueError("this network has no pooled vector before its classifier; choose a method that needs none")
        return self.pooled


@dataclass(frozen=True)
class Views:
    """One network's outputs for the real view and for each virtual view of the same images."""

    real: Outputs
    virtual: tuple[Outputs, ...] = ()

    @staticmethod
    def of(outputs: Iterable[Outputs]) -> Views:
        """Return views from the outputs for all of them, the real one first."""
        real, *virtual = outputs
        return Views(real, tuple(virtual))

    def each(self) -> tuple[Outputs, ...]:
        """Return the outputs for all views, the real one first."""
        return (self.real, *self.virtual)


NO_TEACHER = Views(Outputs(torch.empty(0)))
"""Takes the teacher's place in ``Method.forward`` for methods whose ``Needs.teacher`` is false."""


@dataclass(frozen=True)
class Batch:
    """The images of a batch: ``index`` (B,) is their position in the training set, ``target`` (B,) their class."""

    index: Tensor
    target: Tensor


@dataclass(frozen=True)
class Progress:
    """The position in the run.

    ``epoch`` (from 1, within the phase) and ``step`` (from 0, over the whole run) are integer scalars on the device, so
    that a step captured as a CUDA graph can read them; the other fields are plain values. ``seed`` is the key of the
    method's own random draws (see :mod:`vrm.randomness`).
    """

    epoch: Tensor
    step: Tensor
    num_epochs: int
    num_steps: int
    phase: str = "main"
    seed: int = 0
    view: int = 0
    """The view that ``Views.real`` holds; 0 is the real one. A single-view method that runs on several views is called
    once for each. Its random draws differ between views, and only the call for view 0 may keep something for
    ``after_step``."""

    def ramp(self, epochs: int) -> Tensor:
        """Return a factor that rises linearly from ``1 / epochs`` in the first epoch to 1, and then stays at 1."""
        return (self.epoch / max(epochs, 1)).clamp(max=1.0)


@dataclass(frozen=True)
class Term:
    """One summand of the objective, ``weight * value``.

    ``role`` separates the task from distillation: the logs show it, and DOT treats the two differently.
    """

    value: Tensor
    weight: float | Tensor = 1.0
    role: Role = "distillation"


class Losses(dict[str, Term]):
    """The terms of the objective by name, in the order in which they are logged."""

    def total(self, *, role: Role | None = None, names: Iterable[str] | None = None) -> Tensor:
        """Return the weighted sum, a scalar, of all terms, of the terms of one role, or of the named terms.

        Raise ``ValueError`` if no term is selected.
        """
        chosen = self.keys() if names is None else tuple(names)
        terms = [self[name] for name in chosen if role is None or self[name].role == role]
        if not terms:
            raise ValueError(f"no loss term with role {role!r} among {sorted(self)}; declare one or change the phase")
        return torch.stack([term.weight * term.value for term in terms]).sum()


@dataclass(frozen=True)
class Needs:
    """What a method, with its options, requires from the networks, the data and the training loop.

    A tap is selected by ``stages``, ``stages:pre``, ``last``, ``last:pre``, ``stem``, ``stageK``, ``stageK:pre``,
    ``map`` (whose mean is classified), ``pooled`` or the path of any module. ``:pre`` is the value before the last
    ReLU.
    """

    virtual_views: int = 0
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    teacher: bool = True
    """The method learns from a teacher (``ce`` does not)."""
    teacher_batch_statistics: bool = False
    """The teacher's batch norms normalise by each batch, as in train mode. Its running statistics never change."""
    index: bool = False
    """The loss or the method's memory reads ``Batch.index``."""
    draws: bool = False
    """The method draws random numbers of its own, by :mod:`vrm.randomness` with ``Progress.seed``."""
    couples_samples: bool = False
    """The loss relates the samples of a batch to each other, so splitting the batch changes the objective."""
    capturable: bool = True
    """The step may be captured as a CUDA graph."""
    separate_gradients: bool = False
    """The optimiser needs the gradients of task and distillation separately (DOT)."""
    min_batch: int = 1
    min_classes: int = 2


@dataclass(frozen=True)
class Phase:
    """A part of training with its own objective.

    ``epochs``: its length, or None for the run's own number of epochs. ``trained``: the parameter groups that are
    updated, of ``"student"`` and ``"method"``. ``terms``: the names of the active loss terms, or None for all.
    ``schedule``: ``"run"`` follows the run's learning rate schedule, ``"constant"`` keeps the base rate.
    ``fresh_optimizer``: start the phase without the momenta of the one before.
    """

    name: str = "main"
    epochs: int | None = None
    trained: tuple[Literal["student", "method"], ...] = ("student", "method")
    terms: tuple[str, ...] | None = None
    schedule: Literal["run", "constant"] = "run"
    fresh_optimizer: bool = True


@dataclass(frozen=True)
class DataInfo:
    """What a method may know about the training set; ``targets`` (N,) are the classes of its samples."""

    num_samples: int
    num_classes: int
    batch_size: int
    targets: Tensor


@dataclass(frozen=True)
class Norm:
    """The affine parameters of a batch norm, ``weight`` and ``bias``, (channels,) each."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Probe:
    """What is measured about a network before training starts.

    ``shapes``: the shape of each tap without the batch axis, in the order of the forward pass (``stem``, ``stage1`` ..
    ``stageN``, ``pooled``, ``logits``, the ``:pre`` taps that exist, and module paths that were asked for). ``signed``:
    the taps that are not the output of a ReLU. ``norms``: for a ``:pre`` tap, the batch norm that computes it.
    ``classifier``: the last linear layer, or None.
    """

    name: str
    input_size: tuple[int, int]
    num_classes: int
    shapes: Mapping[str, tuple[int, ...]]
    signed: frozenset[str] = frozenset()
    norms: Mapping[str, Norm] = field(default_factory=dict)
    classifier: nn.Linear | None = None
    unreadable: str = ""
    """Why the network has no stages although it has maps."""
    note: str = ""
    """What a user should know of how the logits were found."""

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages, ``("stage1", .., "stageN")``."""
        return tuple(name for name in self.shapes if name.startswith("stage") and name[5:].isdigit())

    def resolve(self, selectors: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the taps that the selectors stand for, without repetition.

        Raise ``ValueError`` with the nearest names if the network lacks one of them.
        """
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
                if self.unreadable and not self.stages:
                    raise ValueError(f"{self.name} has no tap {wanted!r}: {self.unreadable}")
                raise ValueError(
                    f"{self.name} has no tap {wanted!r}; {nearest(wanted, self.shapes)} "
                    "(`vrm models NAME` lists the taps of a network; any module path works too)"
                )
            names += found
        return tuple(dict.fromkeys(names))

    def channels(self, tap: str) -> int:
        """Return the number of channels of a map, or the width of tokens or of a vector."""
        shape = self.shapes[tap]
        return shape[0] if len(shape) != 2 else shape[-1]

    def stride(self, tap: str) -> float:
        """Return the input height over the tap's height. Tokens count as a square grid, vectors as one pixel."""
        shape = self.shapes[tap]
        if len(shape) == 3:
            return self.input_size[0] / shape[1]
        if len(shape) == 2:
            return float(self.input_size[0] / max(int(shape[0] ** 0.5), 1))
        return float(self.input_size[0])


NO_TEACHER_PROBE = Probe("no teacher", (0, 0), 0, {})
"""Takes the teacher's place in ``Method.build`` for methods whose ``Needs.teacher`` is false."""


@runtime_checkable
class RowLoss(Protocol):
    """A method whose distillation loss is a mean over rows of logits.

    Others build upon it: LSKD gives it standardised logits, SDD those of image regions.
    """

    ce_weight: float

    def row_loss(self, student_RC: Tensor, teacher_RC: Tensor, target_R: Tensor, progress: Progress) -> Tensor:
        """Return the weighted distillation loss of each row of logits, (R,), with the method's weights and ramps."""
        ...


class TwoGradientOptimizer(Protocol):
    """An optimiser that takes the gradients of task and distillation separately, each aligned with its parameters."""

    def step_apart(self, task: Sequence[Tensor | None], distillation: Sequence[Tensor | None]) -> None: ...


OptimizerFactory = Callable[..., torch.optim.Optimizer]


class Method(nn.Module):
    """A distillation objective. Its typed ``__init__`` is its configuration schema; the name of its file is its name.

    The docstring of ``__init__`` explains every option under ``Args``. ``published`` maps a data set to settings,
    ``{"cifar100": {"*": {...}, "resnet56/resnet20": {...}}}``. Pairs are written ``teacher/student``, and settings of
    a pair override those of ``"*"``. Values that belong to one value of an option stand in a table of their own,
    ``{"cifar100": {"base=dkd": {"*": {...}, "resnet56/resnet20": {...}}}}``, which overrides the others.
    """

    title: ClassVar[str]
    venue: ClassVar[str]
    year: ClassVar[int]
    family: ClassVar[Family]
    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    optimizer: ClassVar[OptimizerFactory | None] = None
    """``(params, *, lr, momentum, weight_decay, method) -> Optimizer``, for methods that bring an optimiser (DOT)."""

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    """Selectors of the taps that the method reads, of both networks equally many; often options of the method."""
    matched: tuple[tuple[str, str], ...] = ()
    """Pairs of taps: one of the student and the one of the teacher that it learns from. Set by :meth:`build`."""

    @property
    def needs(self) -> Needs:
        """What this instance, with its options, requires; by default a teacher's logits and the taps."""
        return Needs(student_taps=self.student_taps, teacher_taps=self.teacher_taps)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of training, in order; exactly one has ``epochs=None``."""
        return (Phase(),)

    def unused_options(self) -> Mapping[str, str]:
        """Return the options that have no effect beside the other ones, each with the reason; they are refused."""
        return {}

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Pair the taps; create projectors and memories from the measured shapes.

        Raise ``ValueError`` if the method cannot work on this pair. A method without a teacher gets
        ``NO_TEACHER_PROBE`` in the teacher's place.
        """
        self.matched = pair_taps(student, teacher, self.student_taps, self.teacher_taps)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the loss terms of one batch."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    @torch.no_grad()
    def after_step(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> None:
        """Update the method's own state, such as memories. Runs after the optimiser's step.

        Only buffers may change, and they change nowhere else.
        """
