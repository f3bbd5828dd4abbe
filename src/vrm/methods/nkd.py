"""NKD: Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach
with Normalized Loss and Customized Soft Labels", ICCV 2023 (arXiv 2303.13005).

    p, q   = softmax(s), softmax(t) of student and teacher;  y = label
    ph, qh = softmax(s / T), softmax(t / T) over the classes other than y
    L = ce_weight * CE(s, y) - mean_b q_y * log p_y - gamma * T^2 * mean_b sum_{c != y} qh_c * log ph_c

Both terms are cross entropies: the teacher's entropy is not subtracted, so the minimum is not 0. ``T`` does not act on
the first one. Paper and released code (yzd-v/cls_KD) agree. With two classes the second is 0. The functions also take
soft labels (mixup, CutMix), of which they use only the class with the largest share, as released.

``keep_target`` keeps the target among the classes of ``qh`` and ``ph``, as the released code of SDD does by mistake:
the mask that should remove it is written as ones into ones. It is not part of NKD.

Released settings for ImageNet are ``T = 1`` and ``gamma = 1.5``, and ``gamma = 1`` for DeiT III teachers of DeiT
students; for CIFAR-100 with the ImageNet ResNets in their CIFAR form ``T = 3`` and ``gamma = 3.5``. The settings for
all other pairs of CIFAR-100 are those of the NKD in the released code of CRLD.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Progress, Term, Views
from vrm.divergences import check_temperature, cross_entropy, hide_classes, lift, soften

# B batch, C classes


def largest_class(target: Tensor) -> Tensor:
    """Return the class of each sample, (B,), from classes (B,) or soft labels (B, C)."""
    return target if target.ndim == 1 else target.argmax(1)


def target_rows(student_BC: Tensor, teacher_BC: Tensor, target: Tensor) -> Tensor:
    """Return ``-q_y * log p_y`` of each row of logits (B, C), (B,), in nats.

    ``target`` are classes (B,) or soft labels (B, C).
    """
    target_B = largest_class(target)
    share_B = (-F.cross_entropy(lift(teacher_BC.detach()), target_B, reduction="none")).exp()
    return share_B * F.cross_entropy(lift(student_BC), target_B, reduction="none")


def nontarget_rows(
    student_BC: Tensor, teacher_BC: Tensor, target: Tensor, *, temperature: float = 1.0, keep_target: bool = False
) -> Tensor:
    """Return the cross entropy among the non-target classes of each row of logits (B, C), (B,), in nats.

    It comes without the factor T^2, and is zero for two classes. ``target`` are classes (B,) or soft labels (B, C);
    with ``keep_target`` the target stays among the classes.
    """
    student_BC, teacher_BC = soften(student_BC, temperature), soften(teacher_BC.detach(), temperature)
    if not keep_target:
        target_B1 = largest_class(target)[:, None]
        student_BC, teacher_BC = hide_classes(student_BC, target_B1), hide_classes(teacher_BC, target_B1)
    return F.cross_entropy(student_BC, teacher_BC.softmax(1), reduction="none")


def nkd_loss(
    student_BC: Tensor,
    teacher_BC: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    keep_target: bool = False,
) -> Tensor:
    """Return the normalised distillation loss of logits (B, C), a scalar in nats.

    ``target`` are classes (B,) or soft labels (B, C).
    """
    nontarget_B = nontarget_rows(student_BC, teacher_BC, target, temperature=temperature, keep_target=keep_target)
    return (target_rows(student_BC, teacher_BC, target) + gamma * temperature**2 * nontarget_B).mean()


class NKD(Method):
    """Distil the target class, and the other classes normalised among themselves."""

    title = (
        "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and "
        "Customized Soft Labels"
    )
    venue = "ICCV"
    year = 2023
    family = "logit"
    published: ClassVar = {
        "cifar100": {
            "*": {"gamma": 1.5, "temperature": 1.0, "ce_weight": 1.0},
            "resnet34/resnet18": {"gamma": 3.5, "temperature": 3.0},
        },
        "imagenet": {"*": {"gamma": 1.5, "temperature": 1.0, "ce_weight": 1.0}},
    }

    def __init__(
        self, gamma: float = 1.5, temperature: float = 1.0, keep_target: bool = False, ce_weight: float = 1.0
    ) -> None:
        """Set the options.

        Args:
            gamma: weight of the cross entropy among the non-target classes.
            temperature: softens the predictions of both networks among the non-target classes.
            keep_target: do not remove the target from them, as the released code of SDD.
            ce_weight: weight of the cross entropy.
        """
        super().__init__()
        check_temperature(temperature)
        self.gamma = gamma
        self.temperature = temperature
        self.keep_target = keep_target
        self.ce_weight = ce_weight

    def unused_options(self) -> dict[str, str]:
        """Return what only the non-target classes read, if they have no weight."""
        reason = "method.gamma=0 leaves out the non-target classes"
        return {} if self.gamma else dict.fromkeys(("temperature", "keep_target"), reason)

    def _others(self, student_RC: Tensor, teacher_RC: Tensor, target_R: Tensor) -> Tensor:
        """Return the term of the non-target classes of each row of logits, without its weight, (R,)."""
        others_R = nontarget_rows(
            student_RC, teacher_RC, target_R, temperature=self.temperature, keep_target=self.keep_target
        )
        return self.temperature**2 * others_R

    def row_loss(self, student_RC: Tensor, teacher_RC: Tensor, target_R: Tensor, progress: Progress) -> Tensor:
        """Return the sum of both weighted terms of each row of logits, (R,)."""
        others_R = self._others(student_RC, teacher_RC, target_R)
        return target_rows(student_RC, teacher_RC, target_R) + self.gamma * others_R

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the two distillation terms."""
        s, t, target = student.real.logits, teacher.real.logits, batch.target
        return Losses(
            ce=Term(cross_entropy(s, target), self.ce_weight, "task"),
            target=Term(target_rows(s, t, target).mean()),
            nontarget=Term(self._others(s, t, target).mean(), self.gamma),
        )
