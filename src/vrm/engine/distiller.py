"""Student and method as one module, which is what DDP wraps, and the teacher's passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.profiler import record_function

from vrm.contract import NO_TEACHER, Batch, Losses, Method, Needs, Progress, Views
from vrm.divergences import lift
from vrm.models import FrozenTeacher, TappedNetwork

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which networks compute: half precision where ``precision`` names one.

    Casts of weights are not cached: a recorded step could not tell when they are stale.
    """
    if precision not in HALF:
        return nullcontext()
    return torch.autocast(device.type, HALF[precision], cache_enabled=False)


def run_teacher(
    teacher: FrozenTeacher | None,
    views: Sequence[Tensor],
    needs: Needs,
    stream: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> Views:
    """Return the teacher's outputs on uint8 views (each (B, 3, H, W), the real one first), as a method needs them.

    The pass on view ``number`` runs inside ``stream(number)``.
    """
    if teacher is None:
        return NO_TEACHER
    outputs = []
    for number, view in enumerate(views):
        with stream(number):
            outputs.append(teacher(view, batch_statistics=needs.teacher_batch_statistics).apply(lift))
    return Views.of(outputs)


def _frozen_norms(network: nn.Module) -> list[nn.Module]:
    """Return the norms that keep statistics and lie in a part of ``network`` whose parameters are all frozen."""
    found: list[nn.Module] = []

    def visit(module: nn.Module, frozen: bool) -> None:
        parameters = [*module.parameters()]
        frozen = not any(parameter.requires_grad for parameter in parameters) if parameters else frozen
        if frozen and isinstance(module, _NormBase):
            found.append(module)
        for child in module.children():
            visit(child, frozen)

    visit(network, False)
    return found


class Distiller(nn.Module):
    """Student and method. The student sees each view in a pass of its own, so batch-norm statistics never mix.

    ``views=2`` gives a single-view method a second, virtual view: its loss is computed on each view and averaged.
    """

    def __init__(self, student: TappedNetwork, method: Method, *, views: int = 1) -> None:
        """Join a student that returns ``Outputs`` and a method.

        ``views`` counts the real view. Raise ``ValueError`` if it is given for a method that declares virtual views.
        """
        super().__init__()
        wanted = method.needs.virtual_views
        if wanted and views != 1:
            raise ValueError(f"views={views}: this method already trains on {1 + wanted} views; leave views out")
        self.student = student
        self.method = method
        self.num_virtual = wanted or views - 1
        self.average_views = wanted == 0 and views > 1
        network = student.network
        in_eval = [part for part in network.modules() if not part.training] if network.training else []
        self._fixed = tuple(dict.fromkeys([*in_eval, *_frozen_norms(network)]))

    def train(self, mode: bool = True) -> Self:
        """Switch to train mode, except the norms of frozen parts and what the student's owner put in eval mode.

        A student that came in eval mode as a whole, as loaded networks often do, is trained as a whole. A norm belongs
        to a frozen part if its own parameters are frozen, or without any, all those of the module that holds it.
        """
        super().train(mode)
        for part in self._fixed:
            part.training = False
        return self

    @property
    def num_fixed_norms(self) -> int:
        """Number of the student's norms whose running statistics stay as they are."""
        return sum(isinstance(part, _NormBase) and part.running_mean is not None for part in self._fixed)

    def forward(
        self,
        images: tuple[Tensor, ...],
        teacher: Views,
        batch: Batch,
        progress: Progress,
        terms: Sequence[str] | None = None,
        before_losses: Callable[[], None] | None = None,
    ) -> tuple[Losses, Views]:
        """Return the losses of uint8 views (each (B, 3, H, W), the real one first) and the student's outputs.

        Only the named ``terms`` (None: all) carry gradients; the other terms and the outputs are detached, to be
        measured only. So DDP finds which parameters the backward pass will reach. ``before_losses`` is called before
        the teacher's outputs are read.
        """
        # Networks may compute in half precision, methods never do.
        student = Views.of(self.student(view).apply(lift) for view in images)
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
        return active, Views.of(view.apply(Tensor.detach) for view in student.each())

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
