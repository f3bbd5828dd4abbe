"""The teacher: a network that gives outputs and takes nothing."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from vrm.contract import Outputs
from vrm.models.taps import TappedNetwork


class FrozenTeacher(nn.Module):
    """A tapped network that never learns: no gradient, always in eval mode, whatever ``train()`` says above it."""

    def __init__(self, teacher: TappedNetwork) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode (the released OFD trains its teacher's batch norm by accident)."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """The teacher's outputs on one view, without gradient."""
        outputs: Outputs = self.teacher(images)
        return outputs


def check_separate(student: nn.Module, teacher: nn.Module) -> None:
    """``ValueError`` if student and teacher share a module, parameter or buffer: freezing one would freeze both."""
    shared = {id(module) for module in student.modules()} & {id(module) for module in teacher.modules()}
    if shared:
        raise ValueError(
            "student and teacher are the same network, or share a module; create them separately, or give the teacher "
            "copy.deepcopy(network)"
        )
    held = {tensor.data_ptr(): name for name, tensor in teacher.state_dict().items()}
    held.pop(0, None)  # empty tensors and those without storage
    for name, tensor in student.state_dict().items():
        if tensor.data_ptr() in held:
            raise ValueError(
                f"the student's {name!r} and the teacher's {held[tensor.data_ptr()]!r} are the same memory; "
                "give the teacher copy.deepcopy(network)"
            )
