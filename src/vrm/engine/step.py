"""One training step, on one page: views, teacher, student, losses, backward, finite guard, update.

Nothing here waits for the device: measurements accumulate on it and are read once per log interval. On a GPU the whole
step is recorded once and replayed (:mod:`vrm.engine.cuda_graphs`); elsewhere the same function runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from vrm.contract import Batch, Losses, Phase, Progress, TwoGradientOptimizer, Views
from vrm.data.views.policies import ViewPolicy
from vrm.engine.distiller import Distiller, run_teacher
from vrm.engine.distribution import World
from vrm.engine.guard import Average, Guard, Incident, LossScale
from vrm.engine.meter import Measured, Meter
from vrm.engine.streams import SideStreams
from vrm.models import FrozenTeacher
from vrm.tasks import Task

if TYPE_CHECKING:
    from vrm.data import Store
    from vrm.engine.teacher_cache import TeacherCache


@dataclass
class Step:
    """A training step and everything it works on, for one phase of a run."""

    distiller: Distiller
    model: nn.Module
    """The distiller, or the module that distributes it over processes."""
    teacher: FrozenTeacher | None
    task: Task
    cache: TeacherCache | None
    store: Store
    policy: ViewPolicy
    make_views: Callable[..., tuple[Tensor, ...]]
    """The policy, or its compiled form."""
    optimizer: torch.optim.Optimizer
    phase: Phase
    progress: Progress
    epoch: Tensor
    """Counts from 1 over the whole run; the views depend on it."""
    data_seed: int
    accumulate: int
    """Number of parts into which a batch is split, whose gradients are summed."""
    guard: Guard
    meter: Meter
    incident: Incident
    loss_scale: LossScale | None
    average: Average | None
    autocast: AbstractContextManager[object]
    world: World
    side_streams: SideStreams
    """Where the teacher's passes run, beside each other and beside the student's."""
    weight: float = 1.0
    """Weight of this process's mean over its samples in the mean over processes."""
    apart: dict[str, list[Tensor | None]] = field(default_factory=dict)
    """Gradients by role, ``"task"`` and ``"distillation"``, for a method that declares ``separate_gradients``."""

    def __call__(self, index_B: Tensor, *images: Tensor) -> None:
        """Train on the samples ``index_B``: stored here, or given as one tensor of images, or as one for each view."""
        with record_function("vrm/guard"):
            self.guard.save()
        names, value_N = self.forward_backward(index_B, *images)
        with record_function("vrm/guard"):
            finite = self.world.all(self.guard.judge(value_N[0], self.gradients))
            self.guard.announce(finite)
        with record_function("vrm/optimizer"):
            self._update()
        with record_function("vrm/guard"):
            self.guard.commit(finite)
            if self.average is not None:
                self.average.update(finite)
        with record_function("vrm/measure"):
            self._measure(names, value_N, index_B, finite)
            self.progress.step.add_(1)

    def forward_backward(self, index_B: Tensor, *images: Tensor) -> Measured:
        """Run everything up to the gradients, for all parts of the batch; return the measurements, the loss first.

        The gradients are left on the parameters, or in :attr:`apart`: averaged over processes, without the loss scale.
        Besides them only what a forward pass changes is changed: batch-norm statistics and the method's memory.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.apart.clear()
        measured: list[Measured] = []
        parts = list(zip(*(x.chunk(self.accumulate) for x in (index_B, *images)), strict=True))
        for number, part in enumerate(parts, start=1):
            with self.world.synchronised(self.model, number == len(parts) and not self._separate):
                measured.append(self._add_gradients(*part, share=len(part[0]) / len(index_B)))
        names, value_N = measured[0]
        for _, more_N in measured[1:]:
            value_N = value_N + more_N
        with record_function("vrm/guard"):
            if self._separate:
                self.world.average(self.gradients)
            if self.loss_scale is not None:
                torch._foreach_mul_(self.gradients, self.loss_scale.value.reciprocal())
        return names, value_N

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that this phase trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def gradients(self) -> list[Tensor]:
        """All gradients that the last :meth:`forward_backward` left."""
        found = chain(*self.apart.values()) if self._separate else (p.grad for p in self.parameters)
        return [gradient for gradient in found if gradient is not None]

    @property
    def variant(self) -> bool:
        """The one Python value that a recording depends on: whether the teacher's outputs are read from the cache."""
        return self.cache is not None and self.cache.known

    @property
    def _separate(self) -> bool:
        return self.distiller.method.needs.separate_gradients

    def _add_gradients(self, index_B: Tensor, *images: Tensor, share: float) -> Measured:
        """Add ``share`` times the gradients of these samples; return ``share`` times the measurements, loss first."""
        batch = Batch(index_B, self.store.targets[index_B])
        with record_function("vrm/views"):
            views = self.views(index_B, *images)
        with self.autocast, record_function("vrm/teacher"):
            teacher = self._teacher_outputs(views, index_B)
        with self.autocast, record_function("vrm/student"):
            losses, student = self.model(views, teacher, batch, self.progress, self.phase.terms, self.side_streams.join)
        loss = losses.total(names=self.phase.terms)
        with record_function("vrm/backward"):
            self._backward(losses, loss, share * self.weight)
        self.distiller.method.after_step(student, teacher, batch, self.progress)

        with record_function("vrm/measure"):
            score = self.task.training_score(student.real.logits, batch.target)
            loss_N = torch.stack([loss.detach(), *(term.value.detach() for term in losses.values())]).double()
            value_N = torch.cat([loss_N, score[None]]) * share
        return ("loss", *(f"loss/{name}" for name in losses), self.task.primary.key), value_N

    def views(self, index_B: Tensor, *images: Tensor) -> tuple[Tensor, ...]:
        """Make the uint8 views of these samples, each (B, 3, H, W), the real one first."""
        if not images:
            images = (self.store.batch(index_B),)
        pixels: Tensor | tuple[Tensor, ...] = images if self.store.crops(self.policy) else images[0]
        num_virtual = self.distiller.num_virtual
        return self.make_views(pixels, index_B, epoch=self.epoch, seed=self.data_seed, num_virtual=num_virtual)

    def _teacher_outputs(self, views: Sequence[Tensor], index_B: Tensor) -> Views:
        """Return the teacher's outputs on every view, computed now or read from the cache."""
        if self.cache is not None and self.cache.known:
            return self.cache.views(index_B)
        outputs = run_teacher(self.teacher, views, self.distiller.method.needs, self.side_streams.on)
        if self.cache is None:
            return outputs
        self.side_streams.join()
        self.cache.record(index_B, outputs)
        return self.cache.views(index_B)

    def _backward(self, losses: Losses, loss: Tensor, weight: float) -> None:
        scale = weight if self.loss_scale is None else weight * self.loss_scale.value
        if not self._separate:
            torch.autograd.backward(scale * self._required(loss))
            return
        for role in ("task", "distillation"):
            term = scale * self._required(losses.total(role=role))
            found = torch.autograd.grad(term, self.parameters, retain_graph=role == "task", allow_unused=True)
            before = self.apart.get(role, [None] * len(found))
            self.apart[role] = [_add(b, g) for b, g in zip(before, found, strict=True)]

    def _required(self, loss: Tensor) -> Tensor:
        if not loss.requires_grad:
            trained = " and ".join(self.phase.trained)
            raise ValueError(f"no active loss term leads to what this phase trains: {trained}")
        return loss

    def _update(self) -> None:
        if self._separate:
            cast(TwoGradientOptimizer, self.optimizer).step_apart(self.apart["task"], self.apart["distillation"])
        else:
            self.optimizer.step()

    def _measure(self, names: Sequence[str], value_N: Tensor, index_B: Tensor, finite: Tensor) -> None:
        bad = ~finite
        overflow = torch.zeros_like(bad)
        if self.loss_scale is not None:  # float16 gradients out of range are what the scale exists for: no incident
            overflow = bad & torch.isfinite(value_N[0]) & (self.loss_scale.value >= 1)
            self.loss_scale.update(finite)
            bad = bad & ~overflow
        self.incident.note(bad, self.progress.step, index_B, names, value_N)
        num_samples = len(index_B)
        counts = torch.stack([num_samples * finite, bad, overflow]).double()
        sum_N = torch.where(finite, value_N * num_samples, 0.0)
        self.meter.add(("samples", "nonfinite", "overflows", *names), torch.cat([counts, sum_N]))


def _add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Add two gradients, where None stands for zero."""
    return one if other is None else other if one is None else one + other
