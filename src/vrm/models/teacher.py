"""The frozen teacher, and the check that it shares nothing with the student."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from vrm.contract import Outputs
from vrm.models.taps import TappedNetwork


class FrozenTeacher(nn.Module):
    """A tapped network that never learns: without gradient, and in eval mode at every call.

    If someone calls ``train()`` on the network inside, or on a part of it, the next forward pass sets eval mode again
    before it runs. Batch-norm statistics never move and dropout never drops.
    """

    def __init__(self, teacher: TappedNetwork) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self._parts = tuple(teacher.modules())
        self._norms = tuple(part for part in self._parts if isinstance(part, _BatchNorm))
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever ``mode`` is."""
        super().train(False)
        for part in self._parts:  # a network's own train() may leave parts of it in train mode
            part.training = False
        return self

    @torch.no_grad()
    def forward(self, images: Tensor, *, batch_statistics: bool = False) -> Outputs:
        """Return the teacher's outputs on one view, without gradient.

        With ``batch_statistics`` its batch norms normalise by this batch, as in train mode (dropout still drops
        nothing); their running statistics stay as they are.
        """
        if any(part.training for part in self._parts):
            self.train(False)
        if not batch_statistics:
            outputs: Outputs = self.teacher(images)
            return outputs
        copies = {name: buffer.clone() for name, buffer in self.teacher.named_buffers()}  # train mode writes to these
        for norm in self._norms:
            norm.training = True
        try:
            outputs = functional_call(self.teacher, copies, (images,))
        finally:
            for norm in self._norms:
                norm.training = False
        return outputs


NamedTensors = Iterable[tuple[str, Tensor]]


def check_separate(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ``ValueError`` if student and teacher share a module, a parameter, a buffer or any byte of memory.

    Freezing one would freeze both, and training one would change the other.
    """
    own = {id(module): name for name, module in teacher.named_modules()}
    for name, module in student.named_modules():
        if id(module) in own:
            where = f"the student's {name or 'whole'!r} is the teacher's {own[id(module)] or 'whole'!r}"
            raise ValueError(
                f"student and teacher are the same network, or share a module ({where}); create them separately, or "
                "give the teacher copy.deepcopy(network)"
            )
    common = common_memory(_tensors(student), _tensors(teacher))
    if common is not None:
        raise ValueError(
            f"the student's {common[0]!r} and the teacher's {common[1]!r} are the same memory; "
            "give the teacher copy.deepcopy(network)"
        )


def common_memory(one: NamedTensors, other: NamedTensors | None = None) -> tuple[str, str] | None:
    """Return the names of a tensor of ``one`` and a tensor of ``other`` that have bytes in common, or ``None``.

    Without ``other`` the two tensors are both of ``one``. Views into one storage count by the bytes they span, so two
    halves of a flat tensor have nothing in common, nor have tensors without memory (empty, or on the meta device).
    """
    sides = (one,) if other is None else (one, other)
    spans = sorted((*_span(tensor), side, name) for side, named in enumerate(sides) for name, tensor in named)
    furthest = [(0, "")] * len(sides)  # the highest end of each side's spans so far, and its tensor's name
    for first, end, side, name in spans:
        reach, holder = furthest[(side + 1) % len(sides)]
        if first < min(reach, end):
            return (holder, name) if side or other is None else (name, holder)
        furthest[side] = max(furthest[side], (end, name))
    return None


def _tensors(network: nn.Module) -> NamedTensors:
    """Return all parameters and buffers once each, also those that are not in the state dict."""
    return (*network.named_parameters(), *network.named_buffers())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the one after its last; (0, 0) if it has no memory."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or not tensor.numel():
        return (0, 0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())
