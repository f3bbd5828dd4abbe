"""The trained half of a distillation: student and method as one module, which is also what DDP wraps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from vrm.contract import NO_TEACHER, Batch, Losses, Method, Needs, Outputs, Progress, Views
from vrm.divergences import lift
from vrm.models import FrozenTeacher, TappedNetwork

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """What networks compute in: half precision where ``precision`` names one.

    Casts of weights are not cached: a recorded step could not tell when they are stale.
    """
    if precision not in HALF:
        return nullcontext()
    return torch.autocast(device.type, HALF[precision], cache_enabled=False)


def in_full_precision(outputs: Outputs) -> Outputs:
    """Half types lifted to float32: networks may compute in half precision, methods never do."""
    pooled = None if outputs.pooled is None else lift(outputs.pooled)
    return Outputs(lift(outputs.logits), pooled, {name: lift(value) for name, value in outputs.taps.items()})


def detached(outputs: Outputs) -> Outputs:
    """The same values, without the way back to the parameters."""
    pooled = None if outputs.pooled is None else outputs.pooled.detach()
    return Outputs(outputs.logits.detach(), pooled, {name: value.detach() for name, value in outputs.taps.items()})


def taught_by(
    teacher: FrozenTeacher | None,
    views: Sequence[Tensor],
    needs: Needs,
    lane: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> Views:
    """What the teacher says about uint8 views (each (B, 3, H, W), the real one first), as a method needs it.

    Each pass is made within ``lane(number)`` of its view.
    """
    if teacher is None:
        return NO_TEACHER
    outputs = []
    for number, view in enumerate(views):
        with lane(number):
            outputs.append(in_full_precision(teacher(view, batch_statistics=needs.teacher_batch_statistics)))
    return Views(outputs[0], tuple(outputs[1:]))


class Distiller(nn.Module):
    """Student and method. Each view is a pass of its own, so batch-norm statistics never mix.

    ``views=2`` gives a single-view method a second, virtual view: its loss is formed on each, and averaged.
    """

    def __init__(self, student: TappedNetwork, method: Method, *, views: int = 1) -> None:
        """``student`` returns ``Outputs``; ``views`` counts the real one and applies to single-view methods."""
        super().__init__()
        wanted = method.needs.virtual_views
        if wanted and views != 1:
            raise ValueError(f"views={views}: this method already trains on {1 + wanted} views; leave views out")
        self.student = student
        self.method = method
        self.num_virtual = wanted or views - 1
        self.average_views = wanted == 0 and views > 1
        network = student.network
        self._still = tuple(m for m in network.modules() if not m.training) if network.training else ()

    def train(self, mode: bool = True) -> Self:
        """Train mode, but for parts that were in eval mode within a student in train mode: frozen batch norms stay so.

        A student that is in eval mode as a whole, as loaded networks often are, is trained as a whole.
        """
        super().train(mode)
        for part in self._still:
            part.training = False
        return self

    def forward(
        self,
        images: tuple[Tensor, ...],
        teacher: Views,
        batch: Batch,
        progress: Progress,
        terms: Sequence[str] | None = None,
        before_losses: Callable[[], None] | None = None,
    ) -> tuple[Losses, Views]:
        """Losses of a batch of uint8 views (each (B, 3, H, W), the real one first), and the student's outputs.

        Only the named ``terms`` (``None``: all) lead back to the parameters; the other terms and the outputs are
        values, to be measured. So DDP finds what the backward pass will reach. ``before_losses`` is called before the
        teacher's outputs are read.
        """
        outputs = [in_full_precision(self.student(view)) for view in images]
        student = Views(outputs[0], tuple(outputs[1:]))
        if before_losses is not None:
            before_losses()
        with torch.autocast(images[0].device.type, enabled=False), record_function("vrm/loss"):
            losses = self._losses(student, teacher, batch, progress)
        active = Losses(
            {
                name: term if terms is None or name in terms else replace(term, value=term.value.detach())
                for name, term in losses.items()
            }
        )
        return active, Views(detached(student.real), tuple(detached(view) for view in student.virtual))

    def _losses(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        if not self.average_views:
            losses: Losses = self.method(student, teacher, batch, progress)
            return losses
        taught = teacher.each() if self.method.needs.teacher else (teacher.real,) * len(student.each())
        each = [
            self.method(Views(s), Views(t), batch, replace(progress, view=view))
            for view, (s, t) in enumerate(zip(student.each(), taught, strict=True))
        ]
        mean = {
            name: replace(term, value=torch.stack([losses[name].value for losses in each]).mean())
            for name, term in each[0].items()
        }
        return Losses(mean)
