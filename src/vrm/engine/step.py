"""One training step, on one page: views, teacher, student, losses, backward, finite guard, update.

Nothing in it waits for the device: what is measured accumulates there and is read once per log interval. On a GPU the
whole of it is recorded once and replayed (:mod:`vrm.engine.cuda_graphs`); the same function runs eagerly elsewhere.
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
from vrm.engine.distiller import Distiller, taught_by
from vrm.engine.distribution import World
from vrm.engine.guard import Average, Guard, Incident, LossScale
from vrm.engine.streams import Lanes
from vrm.models import FrozenTeacher

if TYPE_CHECKING:
    from vrm.data.stores.store import Store
    from vrm.engine.teacher_cache import TeacherCache


Measured = tuple[tuple[str, ...], Tensor]
"""Names, and as many float64 values on the device."""


class Meter:
    """Sums on the device, by name, and the number of samples behind them."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero."""
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, names: Sequence[str], value_N: Tensor) -> None:
        """Add a float64 to each of these sums."""
        for name in names:
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
        torch._foreach_add_([self.sums[name] for name in names], list(value_N.unbind()))

    def read(self, world: World) -> dict[str, float]:
        """Means over the samples since the last reading (of steps: counts); starts anew. Waits for the device."""
        if not self.sums:
            return {"samples": 0.0, "nonfinite": 0.0, "overflows": 0.0}
        values = dict(zip(self.sums, world.sum(torch.stack([*self.sums.values()])).tolist(), strict=True))
        for value in self.sums.values():
            value.zero_()
        counts = {name: values.pop(name) for name in ("samples", "nonfinite", "overflows")}
        counts |= {name: counts[name] / world.size for name in ("nonfinite", "overflows")}
        return {name: value / max(counts["samples"], 1.0) for name, value in values.items()} | counts


@dataclass
class Step:
    """What a training step works on. ``epoch`` counts from 1 over the whole run and keys the views."""

    distiller: Distiller
    model: nn.Module
    """The distiller, or what distributes it."""
    teacher: FrozenTeacher | None
    cache: TeacherCache | None
    store: Store
    policy: ViewPolicy
    make_views: Callable[..., tuple[Tensor, ...]]
    """The policy, or what is compiled of it."""
    optimizer: torch.optim.Optimizer
    phase: Phase
    progress: Progress
    epoch: Tensor
    data_seed: int
    accumulate: int
    guard: Guard
    meter: Meter
    incident: Incident
    loss_scale: LossScale | None
    average: Average | None
    autocast: AbstractContextManager[object]
    world: World
    lanes: Lanes
    """The teacher's passes, beside each other and the student's."""
    weight: float = 1.0
    """What the mean over this process's samples counts in the mean over processes."""
    apart: dict[str, list[Tensor | None]] = field(default_factory=dict)
    """For an optimiser that wants them so: the gradients of the task's terms, and of distillation."""

    def __call__(self, index_B: Tensor, *images: Tensor) -> None:
        """Train on the samples ``index_B``: stored here, or given as one tensor of images, or as one for each view."""
        with record_function("vrm/guard"):
            self.guard.save()
        self.optimizer.zero_grad(set_to_none=True)
        self.apart.clear()
        measured: list[Measured] = []
        parts = list(zip(*(x.chunk(self.accumulate) for x in (index_B, *images)), strict=True))
        for number, part in enumerate(parts, start=1):
            with self.world.synchronised(self.model, number == len(parts) and not self._separate):
                measured.append(self._learn(*part, share=len(part[0]) / len(index_B)))
        names, value_N = measured[0]
        for _, more_N in measured[1:]:
            value_N = value_N + more_N
        with record_function("vrm/guard"):
            finite = self.world.all(self.guard.judge(value_N[0], self._gradients()))
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

    @property
    def _separate(self) -> bool:
        return self.distiller.method.needs.separate_gradients

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _learn(self, index_B: Tensor, *images: Tensor, share: float) -> Measured:
        """Add ``share`` times the gradients of these samples; returns what is measured, shared so, the loss first."""
        batch = Batch(index_B, self.store.targets[index_B])
        with record_function("vrm/views"):
            views = self.make_views(
                self._pixels(index_B, images),
                index_B,
                epoch=self.epoch,
                seed=self.data_seed,
                num_virtual=self.distiller.num_virtual,
            )
        with self.autocast, record_function("vrm/teacher"):
            teacher = self._teach(views, index_B)
        with self.autocast, record_function("vrm/student"):
            losses, student = self.model(views, teacher, batch, self.progress, self.phase.terms, self.lanes.join)
        loss = losses.total(names=self.phase.terms)
        with record_function("vrm/backward"):
            self._backward(losses, loss, share * self.weight)
        self.distiller.method.after_step(student, teacher, batch, self.progress)

        with record_function("vrm/measure"):
            right_B = student.real.logits.argmax(1) == batch.target
            loss_N = torch.stack([loss.detach(), *(term.value.detach() for term in losses.values())]).double()
            value_N = torch.cat([loss_N, 100.0 * right_B.double().mean(0, keepdim=True)]) * share
        return ("loss", *(f"loss/{name}" for name in losses), "top1"), value_N

    def _pixels(self, index_B: Tensor, images: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """What the views are made of: one tensor for all, or one for each that is cropped already."""
        if not images:
            return self.store.batch(index_B)
        return images if self.store.crops(self.policy) else images[0]

    def _teach(self, views: Sequence[Tensor], index_B: Tensor) -> Views:
        """The teacher's outputs on every view, computed or kept from an earlier run."""
        if self.cache is not None and self.cache.known:
            return self.cache.views(index_B)
        taught = taught_by(self.teacher, views, self.distiller.method.needs, self.lanes)
        if self.cache is None:
            return taught
        self.lanes.join()
        self.cache.record(index_B, taught)
        return self.cache.views(index_B)

    def _backward(self, losses: Losses, loss: Tensor, weight: float) -> None:
        scale = weight if self.loss_scale is None else weight * self.loss_scale.value
        if not self._separate:
            torch.autograd.backward(scale * loss)
            return
        for role in ("task", "distillation"):
            term = scale * losses.total(role=role)
            found = torch.autograd.grad(term, self._parameters, retain_graph=role == "task", allow_unused=True)
            before = self.apart.get(role, [None] * len(found))
            self.apart[role] = [_sum(b, g) for b, g in zip(before, found, strict=True)]

    def _gradients(self) -> list[Tensor]:
        """All gradients of the step: those of every process, without the loss scale."""
        found = (p.grad for p in self._parameters)
        gradients = [g for g in (chain(*self.apart.values()) if self._separate else found) if g is not None]
        if self._separate:
            self.world.average(gradients)
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, self.loss_scale.value.reciprocal())
        return gradients

    def _update(self) -> None:
        if self._separate:
            cast(TwoGradientOptimizer, self.optimizer).step_apart(self.apart["task"], self.apart["distillation"])
        else:
            self.optimizer.step()

    def _measure(self, names: Sequence[str], value_N: Tensor, index_B: Tensor, finite: Tensor) -> None:
        bad = ~finite
        overflow = torch.zeros_like(bad)
        if self.loss_scale is not None:  # a float16 gradient out of range is what the scale is there for
            overflow = bad & torch.isfinite(value_N[0]) & (self.loss_scale.value >= 1)
            self.loss_scale.update(finite)
            bad = bad & ~overflow
        self.incident.note(bad, self.progress.step, index_B, names, value_N)
        num_samples = len(index_B)
        counts = torch.stack([num_samples * finite, bad, overflow]).double()
        sum_N = torch.where(finite, value_N * num_samples, 0.0)
        self.meter.add(("samples", "nonfinite", "overflows", *names), torch.cat([counts, sum_N]))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Of gradients, where ``None`` is zero."""
    return one if other is None else other if one is None else one + other
