"""One training step, on one page: views, teacher, student, losses, backward, update, finite guard.

Nothing in it waits for the device: what is measured accumulates there and is read once per log interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vrm.contract import NO_TEACHER, Batch, Losses, Phase, Progress, TwoGradientOptimizer, Views
from vrm.data import ImageStore
from vrm.data.views import ViewPolicy
from vrm.models import FrozenTeacher
from vrm.training.distiller import Distiller, in_full_precision


class Guard:
    """Takes a non-finite step back: each parameter, buffer and momentum is chosen on the device between old and new."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Watch all tensors of ``module`` that a step can change, and the state of ``optimizer``."""
        trained = [p for p in module.parameters() if p.requires_grad]
        momenta = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        self.live: list[Tensor] = [*(p.detach() for p in trained), *module.buffers(), *momenta]
        self.saved = [tensor.clone() for tensor in self.live]

    def save(self) -> None:
        """Remember the state before the step."""
        torch._foreach_copy_(self.saved, self.live)

    def commit(self, finite: Tensor) -> None:
        """Keep the new state where ``finite`` (a boolean scalar) holds, else put the old one back."""
        for live, saved in zip(self.live, self.saved, strict=True):
            live.copy_(torch.where(finite, live, saved))


class Meter:
    """Sums on the device, by name, and the number of samples behind them."""

    def __init__(self, device: torch.device) -> None:
        """Start at zero."""
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar."""
        if name not in self.sums:
            self.sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
        self.sums[name] += value.detach()

    def read(self) -> dict[str, float]:
        """Means over the samples since the last reading (``nonfinite``: a count); starts anew. Waits for the device."""
        names = list(self.sums)
        values = (
            dict(zip(names, torch.stack([self.sums[name] for name in names]).tolist(), strict=True)) if names else {}
        )
        self.sums.clear()
        samples = values.pop("samples", 0.0)
        nonfinite = values.pop("nonfinite", 0.0)
        means = {name: value / max(samples, 1.0) for name, value in values.items()}
        return means | {"samples": samples, "nonfinite": nonfinite}


@dataclass
class Step:
    """What a training step works on. ``epoch`` counts from 1 over the whole run and keys the views."""

    distiller: Distiller
    teacher: FrozenTeacher | None
    store: ImageStore
    policy: ViewPolicy
    optimizer: torch.optim.Optimizer
    phase: Phase
    progress: Progress
    epoch: Tensor
    data_seed: int
    guard: Guard
    meter: Meter
    autocast: AbstractContextManager[object]

    def __call__(self, index_B: Tensor) -> None:
        """Train on the samples ``index_B`` of the store."""
        batch = Batch(index_B, self.store.targets[index_B])
        images = self.policy(
            self.store.batch(index_B),
            index_B,
            epoch=self.epoch,
            seed=self.data_seed,
            num_virtual=self.distiller.num_virtual,
        )
        self.guard.save()
        with self.autocast:
            teacher = NO_TEACHER if self.teacher is None else teach(self.teacher, images)
            losses, student = self.distiller(images, teacher, batch, self.progress)
        loss = losses.total(names=self.phase.terms)
        gradients = self._backward(losses, loss)
        self.distiller.method.after_step(student, teacher, batch, self.progress)

        finite = torch.stack([torch.isfinite(x).all() for x in (loss.detach(), *gradients)]).all()
        self.guard.commit(finite)
        self._measure(losses, loss, student, batch, finite)
        self.progress.step.add_(1)

    def _backward(self, losses: Losses, loss: Tensor) -> Sequence[Tensor]:
        """Gradients and the optimiser's update; returns the gradients."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not self.distiller.method.needs.separate_gradients:
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            self.optimizer.step()
            return [p.grad for p in parameters if p.grad is not None]
        task = torch.autograd.grad(losses.total(role="task"), parameters, retain_graph=True, allow_unused=True)
        distillation = torch.autograd.grad(losses.total(role="distillation"), parameters, allow_unused=True)
        cast(TwoGradientOptimizer, self.optimizer).step_apart(task, distillation)
        return [gradient for gradient in (*task, *distillation) if gradient is not None]

    def _measure(self, losses: Losses, loss: Tensor, student: Views, batch: Batch, finite: Tensor) -> None:
        count = len(batch.index)
        zero = torch.zeros((), dtype=torch.float64, device=loss.device)
        self.meter.add("samples", torch.where(finite, count, zero))
        self.meter.add("nonfinite", torch.where(finite, 0, zero + 1))
        self.meter.add("loss", torch.where(finite, loss.detach() * count, zero))
        for name, term in losses.items():
            self.meter.add(f"loss/{name}", torch.where(finite, term.value.detach() * count, zero))
        correct = (student.real.logits.argmax(1) == batch.target).sum()
        self.meter.add("top1", torch.where(finite, 100.0 * correct, zero))


def teach(teacher: FrozenTeacher, images: Sequence[Tensor]) -> Views:
    """The teacher's outputs on every view."""
    outputs = [in_full_precision(teacher(view)) for view in images]
    return Views(outputs[0], tuple(outputs[1:]))
