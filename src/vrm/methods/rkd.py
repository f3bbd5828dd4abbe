"""RKD: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019.

    L = distance_weight * 1/B^2 * sum_ij   h(d^s_ij / mu^s, d^t_ij / mu^t)    d_ij = |e_i - e_j|, mu its mean (i != j)
      + angle_weight    * 1/B^3 * sum_ijk  h(A^s_ijk, A^t_ijk)                A_ijk = cosine of the angle at i

with the Huber loss ``h`` (threshold 1) on pooled vectors. The authors' code, RepDistiller and mdistiller agree and are
followed: the means include the diagonal and degenerate triples, which dilute them, and gradients reach the student's
``mu``. The paper's own weights (metric learning) are 1 and 2; the CIFAR-100 tables use 25 and 50. The released code
computes distances from a Gram matrix. Here they come from the differences that the angles need anyway; for (nearly)
equal rows these are exact to rounding, where the Gram matrix leaves noise. Equal rows of the student that face
different rows of the teacher have a huge (finite) gradient through the angle's normalisation, as released. For a batch
of two the loss is 0, whatever the features; a batch of one, NaN as released, is refused. Memory grows with B^3.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Needs, Progress, Term, Views
from vrm.divergences import cross_entropy, lift

# B batch, D features


def _differences(features: Tensor) -> Tensor:
    """Return ``e_j - e_i`` at [i, j] of flattened features, (B, B, D). Raise ``ValueError`` for a batch of one."""
    flat_BD = lift(features).flatten(1)
    if len(flat_BD) < 2:
        raise ValueError("RKD relates the samples of a batch and got a batch of one; use batches of three or more")
    return flat_BD[None, :] - flat_BD[:, None]


def relative_distances(features: Tensor, *, squared: bool = False, eps: float = 1e-12) -> Tensor:
    """Return the distances within a batch (B, ...) over their mean, (B, B) with a zero diagonal. Park et al., eq. 7.

    Squared distances are at least ``eps``; with ``squared`` the root is left out.
    """
    squares_BB = _differences(features).square().sum(2).clamp(min=eps)
    distances_BB = squares_BB if squared else squares_BB.sqrt()
    distances_BB = distances_BB * (1 - torch.eye(len(features), dtype=distances_BB.dtype, device=features.device))
    return distances_BB * (distances_BB > 0).sum() / distances_BB.sum()


def angles(features: Tensor) -> Tensor:
    """Return the cosine of the angle at i between j and k, (B, B, B), of features (B, ...). Park et al., eq. 9."""
    direction_BBD = F.normalize(_differences(features), dim=2)
    return direction_BBD @ direction_BBD.transpose(1, 2)


def rkd_distance_loss(student: Tensor, teacher: Tensor, *, squared: bool = False, eps: float = 1e-12) -> Tensor:
    """Return the Huber distance of relative distances, a scalar without unit. Eq. 8.

    Features are (B, ...), and student and teacher may differ in width. Raise ``ValueError`` for a batch of one.
    """
    ours_BB = relative_distances(student, squared=squared, eps=eps)
    return F.smooth_l1_loss(ours_BB, relative_distances(teacher.detach(), squared=squared, eps=eps))


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber distance of the cosines of all triples, a scalar without unit. Eq. 10.

    Features are (B, ...), and student and teacher may differ in width. Raise ``ValueError`` for a batch of one.
    """
    return F.smooth_l1_loss(angles(student), angles(teacher.detach()))


class RKD(Method):
    """Match the distances between pairs and the angles within triples of samples."""

    title = "Relational Knowledge Distillation"
    venue = "CVPR"
    year = 2019
    family = "relation"
    student_taps = teacher_taps = ("pooled",)
    published: ClassVar = {"cifar100": {"*": {"ce_weight": 1.0, "distance_weight": 25.0, "angle_weight": 50.0}}}

    def __init__(
        self,
        ce_weight: float = 1.0,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        squared: bool = False,
    ) -> None:
        """Set the options.

        Args:
            ce_weight: weight of the cross entropy.
            distance_weight: weight of the distances.
            angle_weight: weight of the angles.
            squared: compare squared distances.
        """
        super().__init__()
        self.ce_weight = ce_weight
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.squared = squared

    @property
    def needs(self) -> Needs:
        """Pooled vectors, and batches kept whole because all pairs and triples of samples count."""
        return Needs(student_taps=self.student_taps, teacher_taps=self.teacher_taps, couples_samples=True, min_batch=2)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the two distillation terms."""
        s, t = student.real.taps["pooled"], teacher.real.taps["pooled"]
        return Losses(
            ce=Term(cross_entropy(student.real.logits, batch.target), self.ce_weight, "task"),
            distance=Term(rkd_distance_loss(s, t, squared=self.squared), self.distance_weight),
            angle=Term(rkd_angle_loss(s, t), self.angle_weight),
        )
