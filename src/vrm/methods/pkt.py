"""PKT: Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018.

    S_ij = (cos(f_i, f_j) + 1) / 2,   P_ij = S_ij / sum_k S_ik   (j = i included)
    L = feature_weight * 1/B^2 * sum_ij P^t_ij * log((P^t_ij + eps) / (P^s_ij + eps)),   eps = 1e-7

on pooled vectors, where ``cos`` is that of ``f / (|f| + eps)``. The authors' code, RepDistiller and mdistiller agree
and are followed; the paper writes the divergence as a sum. It is a mean over B^2 of rows that sum to 1, so it shrinks
like 1/B: the published weight 30000 is for batches of 64. The released code has a NaN gradient at an all-zero row of
the student; here it is finite.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Needs, Progress, Term, Views
from vrm.divergences import cross_entropy, lift

# B batch, D features


def similarity_distribution(features_BD: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return the shifted cosine similarities of a batch with itself, (B, B), each row normalised to sum 1.

    Passalis & Tefas, eq. 5.
    """
    norm_B1 = torch.linalg.vector_norm(features_BD, dim=1, keepdim=True)  # its gradient at a zero row is 0, not NaN
    direction_BD = features_BD / (norm_B1 + eps)
    similarity_BB = (direction_BD @ direction_BD.T + 1) / 2
    distribution_BB: Tensor = similarity_BB / similarity_BB.sum(1, keepdim=True)
    return distribution_BB


def pkt_loss(student: Tensor, teacher: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return the divergence of the similarity distributions of a batch, a scalar in nats.

    Features are (B, ...), flattened to vectors; student and teacher may differ in width. It is 0 for a batch of one.
    """
    student_BB = similarity_distribution(lift(student).flatten(1), eps=eps)
    teacher_BB = similarity_distribution(lift(teacher.detach()).flatten(1), eps=eps)
    return (teacher_BB * ((teacher_BB + eps).log() - (student_BB + eps).log())).mean()


class PKT(Method):
    """Match the neighbourhoods of samples in feature space, as probability distributions."""

    title = "Learning Deep Representations with Probabilistic Knowledge Transfer"
    venue = "ECCV"
    year = 2018
    family = "relation"
    student_taps = teacher_taps = ("pooled",)
    published: ClassVar = {"cifar100": {"*": {"ce_weight": 1.0, "feature_weight": 30000.0}}}

    def __init__(self, ce_weight: float = 1.0, feature_weight: float = 30000.0) -> None:
        """Set the options.

        Args:
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the distillation term, for batches of 64 (see above).
        """
        super().__init__()
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight

    @property
    def needs(self) -> Needs:
        """Pooled vectors, and batches kept whole because every pair of samples counts."""
        return Needs(student_taps=self.student_taps, teacher_taps=self.teacher_taps, couples_samples=True)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the distillation term."""
        s, t = student.real.taps["pooled"], teacher.real.taps["pooled"]
        return Losses(
            ce=Term(cross_entropy(student.real.logits, batch.target), self.ce_weight, "task"),
            pkt=Term(pkt_loss(s, t), self.feature_weight),
        )
