"""SP: Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.

    G = F F^T,   each row divided by its norm;   L = feature_weight * 1/B^2 * sum_ij (G^t_ij - G^s_ij)^2

where ``F`` (B, CHW) is the flattened map of the last stage. mdistiller and RepDistiller agree and are followed: they
use the last map only, whereas the paper allows several pairs of layers (``student_taps``, ``teacher_taps``; their
losses add up). Nothing is resized, because maps of different sizes can be compared as they are. The published weight
3000 is for batches of 64, since the mean over B^2 of rows of unit norm shrinks like 1/B. A student sample that is
entirely zero while the teacher's is not has a huge (finite) gradient through the row's norm, as released. For a batch
of one the loss is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Needs, Progress, Term, Views
from vrm.divergences import cross_entropy, lift

# B batch


def similarities(features: Tensor) -> Tensor:
    """Return the inner products (B, B) of flattened features (B, ...), each row scaled to unit norm.

    Tung & Mori, eq. 1-2.
    """
    flat = lift(features).flatten(1)
    return F.normalize(flat @ flat.T, dim=1)


def sp_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean squared difference of similarities of each pair of layers, (number of layers,), without unit.

    Feature n (B, ...) of the student is compared with feature n of the teacher; their shapes may differ. Tung & Mori,
    eq. 4, whose sum over layers is this function's ``.sum()``.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([(similarities(t.detach()) - similarities(s)).square().mean() for s, t in pairs])


class SP(Method):
    """Make images that excite the teacher alike excite the student alike."""

    title = "Similarity-Preserving Knowledge Distillation"
    venue = "ICCV"
    year = 2019
    family = "relation"
    published: ClassVar = {"cifar100": {"*": {"ce_weight": 1.0, "feature_weight": 3000.0}}}

    def __init__(
        self,
        ce_weight: float = 1.0,
        feature_weight: float = 3000.0,
        student_taps: tuple[str, ...] = ("last",),
        teacher_taps: tuple[str, ...] = ("last",),
    ) -> None:
        """Set the options.

        Args:
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the distillation term, for batches of 64 (see above).
            student_taps: taps of the student, paired with the teacher's by position; ``stages`` pair by scale.
            teacher_taps: taps of the teacher.
        """
        super().__init__()
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)

    @property
    def needs(self) -> Needs:
        """The taps of both networks, and batches kept whole because every pair of samples counts."""
        return Needs(student_taps=self.student_taps, teacher_taps=self.teacher_taps, couples_samples=True)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the distillation term."""
        s, t = student.real, teacher.real
        loss = sp_loss([s.taps[a] for a, _ in self.matched], [t.taps[b] for _, b in self.matched])
        return Losses(
            ce=Term(cross_entropy(s.logits, batch.target), self.ce_weight, "task"),
            sp=Term(loss.sum(), self.feature_weight),
        )
