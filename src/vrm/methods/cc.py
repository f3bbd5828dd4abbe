"""CC: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019.

    a = E_s(f_s),  b = E_t(f_t),  D = |a - b|,   L = feature_weight * 1/(B-1) * sum_{i<B-1} sum_d D_id * D_{i+1,d}

``E`` are linear embeddings (with bias) of the pooled vectors to 128 features, both trained. This is RepDistiller's
code, which it received from the authors and which produced the published tables. The paper matches kernel matrices
between all pairs of samples (Gaussian RBF by Taylor expansion), beside CE and KD. The code only multiplies the absolute
differences of neighbours in the batch, so it depends on the order of the samples, and it is NaN for a batch of one,
which is refused here. Because the teacher's embedding is trained too, both can shrink towards each other, which lowers
the loss without any transfer.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, lift

# B batch, E embedding features


def cc_loss(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """Return the mean product of neighbours' absolute differences of embeddings (B, E), a scalar, as released.

    Gradients reach both embeddings. Raise ``ValueError`` for a batch of one, which has no neighbours.
    """
    if len(student_BE) < 2:
        raise ValueError("CC compares neighbours in a batch and got a batch of one; use batches of two or more")
    difference_BE = (lift(student_BE) - lift(teacher_BE)).abs()
    return (difference_BE[:-1] * difference_BE[1:]).sum(1).mean()


class CC(Method):
    """Correlate the embedded differences of student and teacher over neighbouring samples."""

    title = "Correlation Congruence for Knowledge Distillation"
    venue = "ICCV"
    year = 2019
    family = "relation"
    student_taps = teacher_taps = ("pooled",)
    published: ClassVar = {"cifar100": {"*": {"embed_dim": 128, "ce_weight": 1.0, "feature_weight": 0.02}}}

    embed_student: nn.Linear
    embed_teacher: nn.Linear

    def __init__(self, embed_dim: int = 128, ce_weight: float = 1.0, feature_weight: float = 0.02) -> None:
        """Set the options.

        Args:
            embed_dim: width of the common embedding.
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the distillation term.
        """
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be at least 1, got {embed_dim}")
        self.embed_dim = embed_dim
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight

    @property
    def needs(self) -> Needs:
        """Pooled vectors, and batches kept whole because neighbours are multiplied."""
        return Needs(student_taps=self.student_taps, teacher_taps=self.teacher_taps, couples_samples=True, min_batch=2)

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Create a linear embedding for the pooled vector of each network."""
        super().build(student, teacher, data)
        self.embed_student = nn.Linear(student.channels("pooled"), self.embed_dim)
        self.embed_teacher = nn.Linear(teacher.channels("pooled"), self.embed_dim)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the distillation term."""
        a_BE = self.embed_student(lift(student.real.taps["pooled"]))
        b_BE = self.embed_teacher(lift(teacher.real.taps["pooled"].detach()))
        return Losses(
            ce=Term(cross_entropy(student.real.logits, batch.target), self.ce_weight, "task"),
            cc=Term(cc_loss(a_BE, b_BE), self.feature_weight),
        )
