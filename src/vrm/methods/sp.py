"""SP: Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.

    G = F F^T,   each row divided by its norm;   L = sp_weight * 1/B^2 * sum_ij (G^t_ij - G^s_ij)^2

with ``F`` (B, CHW) the flattened map of the last stage. mdistiller and RepDistiller agree and are followed: the last map
only, where the paper allows several pairs of layers (:func:`sp_loss` sums over any number). Nothing is resized: maps of
different sizes compare as they are. The published weight 3000 is for batches of 64, since a row of unit norm over B^2
shrinks like 1/B. A student sample that is entirely zero while the teacher's is not has, as released, a huge (finite)
gradient through the row's norm. For a batch of one the loss is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, lift

# B batch


def similarities(features: Tensor) -> Tensor:
    """Inner products (B, B) of flattened features (B, ...), each row scaled to unit norm. Tung & Mori, eq. 1-2."""
    flat = lift(features).flatten(1)
    return F.normalize(flat @ flat.T, dim=1)


def sp_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared distance of similarities, one value a pair of layers (number of layers,), without unit.

    The n-th feature (B, ...) of the student is compared with the n-th of the teacher; their shapes are free.
    Tung & Mori, eq. 4, whose sum over layers is this function's ``.sum()``.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([(similarities(t.detach()) - similarities(s)).square().mean() for s, t in pairs])


class SP(Method):
    """Images that excite the teacher alike shall excite the student alike."""

    title = "Similarity-Preserving Knowledge Distillation"
    venue = "ICCV"
    year = 2019
    family = "relation"
    published: ClassVar = {"cifar100": {"*": {"sp_weight": 3000.0, "ce_weight": 1.0}}}

    def __init__(self, sp_weight: float = 3000.0, ce_weight: float = 1.0) -> None:
        """The weights multiply the two terms; ``sp_weight`` is tied to the batch size (see the module's text)."""
        super().__init__()
        self.sp_weight = sp_weight
        self.ce_weight = ce_weight
        self._taps = ("last", "last")

    @property
    def needs(self) -> Needs:
        """The last feature map of both networks; every pair of samples counts."""
        return Needs(student_taps=("last",), teacher_taps=("last",), couples_samples=True)

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Nothing but the names of the last stages."""
        self._taps = (*student.resolve(("last",)), *teacher.resolve(("last",)))

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Task term and distillation term."""
        of_student, of_teacher = self._taps
        loss = sp_loss([student.real.taps[of_student]], [teacher.real.taps[of_teacher]]).sum()
        return Losses(
            ce=Term(cross_entropy(student.real.logits, batch.target), self.ce_weight, "task"),
            sp=Term(loss, self.sp_weight),
        )
