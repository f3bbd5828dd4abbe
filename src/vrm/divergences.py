"""Softened cross entropies and divergences of logits, in log space, in one careful place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lift(x: Tensor) -> Tensor:
    """Half types to float32; float32 and float64 stay. Losses are never evaluated in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cross_entropy(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    """Mean cross entropy (scalar, nats) of logits (B, C) against class indices (B,)."""
    return F.cross_entropy(lift(logits_BC), target_B)


def soft_kl(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> Tensor:
    """KL(teacher || student) of softened predictions, one value a row (B,), in nats, without the factor T^2."""
    student = F.log_softmax(lift(student_BC) / temperature, dim=1)
    teacher = F.log_softmax(lift(teacher_BC) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
