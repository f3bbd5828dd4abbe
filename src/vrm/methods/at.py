"""AT: Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017 (arXiv 1612.03928).

    a(f) = l2-normalised over space of (mean over channels of f^power)         one map a sample
    L    = ce_weight * CE + feature_weight * sum over stages of mean over b, h, w of (a(s) - a(t))^2

Maps of different sizes are average-pooled to the smaller size before the power. The paper's formula is ``beta / 2``
times the norm of the difference; the released code, also the authors' own, takes the mean of its square, hence the
weight of 1000. There is no absolute value, so an odd power keeps signs. With ``power=1`` an all-zero map has a huge
(finite) gradient through the normalisation, as released. The mean runs over h and w, so deep (small) stages count more.

mdistiller takes the first of a network's maps for its stem and leaves it out. For ImageNet, MobileNetV1 has no stem in
that list, so each of its stages learns from the stage before the right one. This bug is not reproduced: stages pair by
stride. mdistiller and RepDistiller compare heights when they pool, and pool to squares; here height and width are
treated separately, which is the same for square maps.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.projectors import as_map, to_smaller

# B batch, C channels, H height, W width, P = HW pixels


def attention(features_BCHW: Tensor, *, power: int = 2) -> Tensor:
    """Return attention maps (B, H * W) of unit norm, or zero for an all-zero map."""
    return F.normalize(lift(features_BCHW).pow(power).mean(1).flatten(1), dim=1)


def at_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, *, power: int = 2) -> Tensor:
    """Return the mean squared difference of attention maps, a scalar, as released. Channels and sizes may differ."""
    student_BCHW, teacher_BCHW = to_smaller(lift(student_BCHW), lift(teacher_BCHW.detach()))
    return (attention(student_BCHW, power=power) - attention(teacher_BCHW, power=power)).pow(2).mean()


class AT(Method):
    """Match where the networks look, stage by stage."""

    title = "Paying More Attention to Attention"
    venue = "ICLR"
    year = 2017
    family = "feature"
    published: ClassVar = {
        "cifar100": {"*": {"power": 2, "ce_weight": 1.0, "feature_weight": 1000.0}},
        "imagenet": {"*": {"power": 2, "ce_weight": 1.0, "feature_weight": 1000.0}},
    }

    def __init__(
        self,
        power: int = 2,
        ce_weight: float = 1.0,
        feature_weight: float = 1000.0,
        student_taps: tuple[str, ...] = ("stages",),
        teacher_taps: tuple[str, ...] = ("stages",),
    ) -> None:
        """Set the options.

        Args:
            power: exponent of the activations.
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the distillation term.
            student_taps: taps of the student, paired with the teacher's by position; ``stages`` pair by scale.
            teacher_taps: taps of the teacher.
        """
        super().__init__()
        if power < 1:
            raise ValueError(f"power must be a whole number of at least 1, got {power}")
        self.power = power
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the sum over stages."""
        s, t = student.real, teacher.real
        stages = [at_loss(as_map(s.taps[a]), as_map(t.taps[b]), power=self.power) for a, b in self.matched]
        return Losses(
            ce=Term(cross_entropy(s.logits, batch.target), self.ce_weight, "task"),
            at=Term(torch.stack(stages).sum(), self.feature_weight),
        )
