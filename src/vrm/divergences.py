"""Cross entropy and softened divergence of logits, computed in log space and never in half precision."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def lift(x: Tensor) -> Tensor:
    """Convert half types to float32, and return float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cross_entropy(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (B, C) against class indices (B,), a scalar in nats."""
    return F.cross_entropy(lift(logits_BC), target_B)


def check_temperature(temperature: float) -> None:
    """Raise ``ValueError`` unless logits can be softened by ``temperature``."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite; got {temperature}")


def hide_classes(logits_BC: Tensor, class_BK: Tensor) -> Tensor:
    """Return logits in which K classes of each row are so low that their probability is exactly 0, (B, C).

    Their log-probability stays finite, unlike that of ``-inf``, so that the product of both is 0.
    """
    return logits_BC.scatter(1, class_BK, torch.finfo(logits_BC.dtype).min / 2)


def soften(logits_BC: Tensor, temperature: float) -> Tensor:
    """Return logits (B, C) divided by ``temperature``, with half types lifted to float32."""
    return lift(logits_BC) if temperature == 1 else lift(logits_BC) / temperature


def soft_kl(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> Tensor:
    """Return KL(teacher || student) of softened predictions for each row, (B,), in nats, without the factor T^2."""
    student = F.log_softmax(soften(student_BC, temperature), dim=1)
    teacher = F.log_softmax(soften(teacher_BC, temperature), dim=1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
