"""WTTM: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024 (arXiv 2402.11148).

    U_b = sum_c softmax(t_b)_c^gamma,   q_b = softmax(t_b)^gamma / U_b = softmax(gamma * t_b)
    L   = ce_weight * CE(s, y) + kd_weight * mean_b U_b * KL(q_b || softmax(s_b))

This is TTM with a weight for each sample. For ``gamma`` below 1 it lies between 1 and ``C^(1 - gamma)``, and is the
larger the smoother the teacher's prediction. It is a constant, and not normalised over the batch. As in TTM, the
student has no temperature, there is no factor ``T^2``, and logits are multiplied by ``gamma`` where the released code
(zkxufo/TTM) takes powers of a softmax. Otherwise paper and released code agree.

The repository gives settings for vgg13/vgg8 alone, which are the defaults here. There WTTM stands beside CRD with the
weight 0.8. Settings of the other pairs are in the paper's appendix. With ``gamma = 1`` this is KD at temperature 1.

The numbers that the VRM paper's Table 13 has for TTM are WTTM's; those in its Table 12 are TTM's (``ttm``).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Progress, Term, Views
from vrm.divergences import cross_entropy, lift, soft_kl


def power_sum(logits_BC: Tensor, *, gamma: float = 0.2) -> Tensor:
    """Return ``sum_c softmax(logits)_c^gamma`` of each row of logits (B, C), (B,)."""
    return (gamma * F.log_softmax(lift(logits_BC), dim=1)).exp().sum(1)


def wttm_rows(student_BC: Tensor, teacher_BC: Tensor, *, gamma: float = 0.2) -> Tensor:
    """Return the divergence from the transformed teacher of each row of logits (B, C) times its weight, (B,)."""
    teacher_BC = lift(teacher_BC.detach())
    return power_sum(teacher_BC, gamma=gamma) * soft_kl(student_BC, gamma * teacher_BC, temperature=1.0)


def wttm_loss(student_BC: Tensor, teacher_BC: Tensor, *, gamma: float = 0.2) -> Tensor:
    """Return the mean weighted divergence from the transformed teacher of logits (B, C), a scalar in nats."""
    return wttm_rows(student_BC, teacher_BC, gamma=gamma).mean()


class WTTM(Method):
    """Match the power transform of the teacher's predictions, more so where these are smooth."""

    title = "Knowledge Distillation Based on Transformed Teacher Matching"
    venue = "ICLR"
    year = 2024
    family = "logit"
    published: ClassVar = {
        "cifar100": {"*": {"ce_weight": 1.0}, "vgg13/vgg8": {"gamma": 0.2, "kd_weight": 4.0}},
    }

    def __init__(self, gamma: float = 0.2, ce_weight: float = 1.0, kd_weight: float = 4.0) -> None:
        """Set the options.

        Args:
            gamma: exponent of the teacher's predictions; below 1 it softens them, by the temperature 1 / gamma.
            ce_weight: weight of the cross entropy.
            kd_weight: weight of the distillation term.
        """
        super().__init__()
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be above 0 and finite (it is 1 / temperature); got {gamma}")
        self.gamma = gamma
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight

    def unused_options(self) -> dict[str, str]:
        """Return ``gamma`` if the distillation term has no weight."""
        return {} if self.kd_weight else {"gamma": "method.kd_weight=0 leaves out the teacher's predictions"}

    def row_loss(self, student_RC: Tensor, teacher_RC: Tensor, target_R: Tensor, progress: Progress) -> Tensor:
        """Return the weighted divergence of each row of logits, (R,)."""
        return self.kd_weight * wttm_rows(student_RC, teacher_RC, gamma=self.gamma)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the distillation term."""
        s, t = student.real.logits, teacher.real.logits
        return Losses(
            ce=Term(cross_entropy(s, batch.target), self.ce_weight, "task"),
            wttm=Term(wttm_loss(s, t, gamma=self.gamma), self.kd_weight),
        )
