"""TTM: Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024 (arXiv 2402.11148).

    q = softmax(t)^gamma / sum_c softmax(t)_c^gamma = softmax(gamma * t)
    L = ce_weight * CE(s, y) + kd_weight * mean_b KL(q_b || softmax(s_b))

The power transform of the teacher's prediction softens it by the temperature ``1 / gamma``. The student has no
temperature, and there is no factor ``T^2``. Paper and released code (zkxufo/TTM) agree. The released code takes the
power of a computed softmax, where in float32 shares below 1e-45 are 0, and stay 0 where their power should not be
small. Here the logits are multiplied by ``gamma``, which is the same and exact.

The repository gives settings for vgg13/vgg8 alone; those of the other pairs are in the paper's appendix. The default
``kd_weight`` is smaller than the published 45, which makes a small network predict a constant on the ten classes of the
digits. Without a transform (``gamma = 1``) this is KD at temperature 1.

The numbers of TTM in the VRM paper's Table 12 are TTM's, those in its Table 13 are WTTM's (``wttm``).
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from vrm.contract import Batch, Losses, Method, Progress, Term, Views
from vrm.divergences import cross_entropy, lift, soft_kl


def ttm_rows(student_BC: Tensor, teacher_BC: Tensor, *, gamma: float = 0.1) -> Tensor:
    """Return the divergence from the transformed teacher of each row of logits (B, C), (B,), in nats."""
    return soft_kl(student_BC, gamma * lift(teacher_BC.detach()), temperature=1.0)


def ttm_loss(student_BC: Tensor, teacher_BC: Tensor, *, gamma: float = 0.1) -> Tensor:
    """Return the mean divergence from the transformed teacher of logits (B, C), a scalar in nats."""
    return ttm_rows(student_BC, teacher_BC, gamma=gamma).mean()


class TTM(Method):
    """Match the power transform of the teacher's predictions, without a temperature of the student."""

    title = "Knowledge Distillation Based on Transformed Teacher Matching"
    venue = "ICLR"
    year = 2024
    family = "logit"
    published: ClassVar = {
        "cifar100": {"*": {"ce_weight": 1.0}, "vgg13/vgg8": {"gamma": 0.1, "kd_weight": 45.0}},
    }

    def __init__(self, gamma: float = 0.1, ce_weight: float = 1.0, kd_weight: float = 10.0) -> None:
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
        return self.kd_weight * ttm_rows(student_RC, teacher_RC, gamma=self.gamma)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the distillation term."""
        s, t = student.real.logits, teacher.real.logits
        return Losses(
            ce=Term(cross_entropy(s, batch.target), self.ce_weight, "task"),
            ttm=Term(ttm_loss(s, t, gamma=self.gamma), self.kd_weight),
        )
