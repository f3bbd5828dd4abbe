"""DKD: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022 (arXiv 2203.08679).

    p, q = softmax(s / T), softmax(t / T) of student and teacher;  y = label
    TCKD = T^2 * mean_b KL((q_y, 1 - q_y) || (p_y, 1 - p_y))
    NCKD = T^2 * mean_b KL(q without y, renormalised || p without y, renormalised)
    L    = ce_weight * CE(s, y) + min(epoch / warmup_epochs, 1) * (alpha * TCKD + beta * NCKD)

KD is ``TCKD + (1 - q_y) * NCKD``; DKD replaces the second factor by a constant. Paper and released code
(megvii-research/mdistiller) agree. The released code takes logarithms of softmaxes and hides the target by subtracting
1000 from its logit, so it becomes infinite or NaN for confident students. Here both divergences are computed in log
space and the target's column is left out, which gives the same values where the released ones are finite. ``beta`` for
each pair, the ramp and the weights are the released ones. With two classes NCKD is 0.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Progress, Term, Views
from vrm.divergences import check_temperature, cross_entropy, lift, soft_kl

# B batch, C classes, R = C - 1 classes other than the target


def drop_target(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    """Return all columns but the target's, (B, C-1), with static shapes."""
    columns_R = torch.arange(logits_BC.shape[1] - 1, device=logits_BC.device)
    return logits_BC.gather(1, columns_R + (columns_R >= target_B[:, None]).long())


def tckd_rows(student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Return the target-class divergence of each row of logits (B, C), (B,), in nats, without the factor T^2."""

    def binary(logits_BC: Tensor) -> Tensor:
        softened_BC = lift(logits_BC) / temperature
        rest_B1 = drop_target(softened_BC, target_B).logsumexp(1, keepdim=True)
        return torch.cat([softened_BC.gather(1, target_B[:, None]), rest_B1], dim=1)

    return soft_kl(binary(student_BC), binary(teacher_BC.detach()), temperature=1.0)


def nckd_rows(student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Return the divergence among the non-target classes of each row of logits (B, C), (B,), without the factor T^2."""
    student_BR, teacher_BR = drop_target(student_BC, target_B), drop_target(teacher_BC.detach(), target_B)
    return soft_kl(student_BR, teacher_BR, temperature=temperature)


def tckd_loss(student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Return the target-class divergence of logits (B, C), a scalar in nats times ``temperature**2``.

    Eq. 6, first term.
    """
    return temperature**2 * tckd_rows(student_BC, teacher_BC, target_B, temperature=temperature).mean()


def nckd_loss(student_BC: Tensor, teacher_BC: Tensor, target_B: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Return the divergence among the non-target classes of logits (B, C), a scalar in nats times ``temperature**2``.

    It is zero for two classes. Eq. 6, second term.
    """
    return temperature**2 * nckd_rows(student_BC, teacher_BC, target_B, temperature=temperature).mean()


def dkd_loss(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target_B: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Return the decoupled distillation loss of logits (B, C), a scalar. Zhao et al., eq. 7."""
    tckd = tckd_loss(student_BC, teacher_BC, target_B, temperature=temperature)
    return alpha * tckd + beta * nckd_loss(student_BC, teacher_BC, target_B, temperature=temperature)


class DKD(Method):
    """Distil the target class and the other classes separately."""

    title = "Decoupled Knowledge Distillation"
    venue = "CVPR"
    year = 2022
    family = "logit"
    published: ClassVar = {
        "cifar100": {
            "*": {"alpha": 1.0, "temperature": 4.0, "warmup_epochs": 20, "ce_weight": 1.0},
            "resnet56/resnet20": {"beta": 2.0},
            "resnet110/resnet32": {"beta": 2.0},
            "wrn_40_2/wrn_16_2": {"beta": 6.0},
            "wrn_40_2/wrn_40_1": {"beta": 6.0},
            "vgg13/vgg8": {"beta": 6.0},
            "vgg13/mobilenetv2": {"beta": 6.0},
            "resnet32x4/resnet8x4": {"beta": 8.0},
            "resnet32x4/shufflenetv1": {"beta": 8.0},
            "resnet32x4/shufflenetv2": {"beta": 8.0},
            "resnet50/mobilenetv2": {"beta": 8.0},
            "wrn_40_2/shufflenetv1": {"beta": 8.0},
        },
        "imagenet": {
            "*": {"alpha": 1.0, "temperature": 1.0, "warmup_epochs": 1, "ce_weight": 1.0},
            "resnet34/resnet18": {"beta": 0.5},
            "resnet50/mobilenetv1": {"beta": 2.0},
        },
    }

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup_epochs: int = 20,
        ce_weight: float = 1.0,
    ) -> None:
        """Set the options.

        Args:
            alpha: weight of the target-class divergence.
            beta: weight of the divergence among the other classes.
            temperature: softens the predictions of both networks.
            warmup_epochs: number of epochs over which both divergences rise to their weight.
            ce_weight: weight of the cross entropy.
        """
        super().__init__()
        check_temperature(temperature)
        if warmup_epochs < 1:
            raise ValueError(f"warmup_epochs must be at least 1 (no ramp), got {warmup_epochs}")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.warmup_epochs = warmup_epochs
        self.ce_weight = ce_weight

    def row_loss(self, student_RC: Tensor, teacher_RC: Tensor, target_R: Tensor, progress: Progress) -> Tensor:
        """Return both weighted divergences of each row of logits under the ramp, (R,)."""
        tckd_R = tckd_rows(student_RC, teacher_RC, target_R, temperature=self.temperature)
        nckd_R = nckd_rows(student_RC, teacher_RC, target_R, temperature=self.temperature)
        return progress.ramp(self.warmup_epochs) * self.temperature**2 * (self.alpha * tckd_R + self.beta * nckd_R)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term, and the two divergences under the ramp."""
        s, t, target = student.real.logits, teacher.real.logits, batch.target
        ramp = progress.ramp(self.warmup_epochs)
        return Losses(
            ce=Term(cross_entropy(s, target), self.ce_weight, "task"),
            tckd=Term(tckd_loss(s, t, target, temperature=self.temperature), self.alpha * ramp),
            nckd=Term(nckd_loss(s, t, target, temperature=self.temperature), self.beta * ramp),
        )
