"""CC: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019.

    a = E_s(f_s),  b = E_t(f_t),  D = |a - b|,   L = feature_weight * 1/(B-1) * sum_{i<B-1} sum_d D_id * D_{i+1,d}

with linear embeddings ``E`` (with bias) of the pooled vectors to 128 features, both trained. This is RepDistiller's
code, had from the authors, and behind the published tables. The paper matches kernel matrices between all pairs of
samples (Gaussian RBF by Taylor expansion) beside CE and KD; the code only multiplies the absolute differences of
neighbours in the batch, so it depends on the order of the samples, and is NaN for a batch of one, which is refused
here. Since the teacher's embedding is trained too, both
can shrink towards each other, which lowers the loss without any transfer.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.pairing import pair_taps

# B batch, E embedding features


def cc_loss(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """Product of neighbours' absolute differences of embeddings (B, E): a scalar. As released.

    Gradients reach both embeddings. ``ValueError`` for a batch of one, which has no neighbours.
    """
    if len(student_BE) < 2:
        raise ValueError("CC compares neighbours in a batch and got a batch of one; use batches of two or more")
    difference_BE = (lift(student_BE) - lift(teacher_BE)).abs()
    return (difference_BE[:-1] * difference_BE[1:]).sum(1).mean()


class CC(Method):
    """Embedded differences of student and teacher, correlated over neighbouring samples."""

    title = "Correlation Congruence for Knowledge Distillation"
    venue = "ICCV"
    year = 2019
    family = "relation"
    published: ClassVar = {"cifar100": {"*": {"embed_dim": 128, "ce_weight": 1.0, "feature_weight": 0.02}}}

    embed_student: nn.Linear
    embed_teacher: nn.Linear

    def __init__(self, embed_dim: int = 128, ce_weight: float = 1.0, feature_weight: float = 0.02) -> None:
        """``embed_dim``: the width of the common embedding; the weights multiply the two terms."""
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {embed_dim}")
        self.embed_dim = embed_dim
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight

    @property
    def needs(self) -> Needs:
        """Pooled vectors; neighbours in the batch are multiplied."""
        return Needs(student_taps=("pooled",), teacher_taps=("pooled",), couples_samples=True, min_batch=2)

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """A linear embedding for each network's pooled vector."""
        self.matched = pair_taps(student, teacher, ("pooled",), ("pooled",))
        self.embed_student = nn.Linear(student.channels("pooled"), self.embed_dim)
        self.embed_teacher = nn.Linear(teacher.channels("pooled"), self.embed_dim)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Task term and distillation term."""
        a_BE = self.embed_student(lift(student.real.taps["pooled"]))
        b_BE = self.embed_teacher(lift(teacher.real.taps["pooled"].detach()))
        return Losses(
            ce=Term(cross_entropy(student.real.logits, batch.target), self.ce_weight, "task"),
            cc=Term(cc_loss(a_BE, b_BE), self.feature_weight),
        )
