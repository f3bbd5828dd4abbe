"""NST: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", arXiv 1707.01219 (2017).

    u_c = channel c of a map, flattened over space and l2-normalised;   k(u, v) = (u . v + offset)^degree
    MMD = mean_{b,i,i'} k(t_i, t_i') + mean_{b,j,j'} k(s_j, s_j') - 2 * mean_{b,i,j} k(s_j, t_i)
    L   = ce_weight * CE + feature_weight * sum over stages of MMD

Each channel is a sample of a distribution over space, so the numbers of channels may differ. Maps of different sizes
are average-pooled to the smaller. Paper and released codes (mdistiller, RepDistiller) agree (degree 2, offset 0; weight
50 as released). The released codes build a tensor of (B, Ct, Cs, HW); matrix products give the same with no more memory
than the result takes. Not reproduced: their pooling to squares, and mdistiller's loss of MobileNetV1's first stage (see
AT).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.projectors import as_map, to_smaller

# B batch, C and D channels, H height, W width, P = HW pixels


def polynomial_kernel(u_BCP: Tensor, v_BDP: Tensor, *, degree: int = 2, offset: float = 0.0) -> Tensor:
    """Return ``(u . v + offset) ** degree`` of all pairs of rows, (B, C, D)."""
    return (u_BCP @ v_BDP.mT + offset).pow(degree)


def nst_loss(student_BCHW: Tensor, teacher_BDHW: Tensor, *, degree: int = 2, offset: float = 0.0) -> Tensor:
    """Return the squared maximum mean discrepancy of the channels' selectivities, a scalar.

    Huang and Wang, section 4. Channels and sizes may differ.
    """
    student_BCHW, teacher_BDHW = to_smaller(lift(student_BCHW), lift(teacher_BDHW.detach()))
    s_BCP, t_BDP = (F.normalize(x.flatten(2), dim=2) for x in (student_BCHW, teacher_BDHW))
    within_teacher = polynomial_kernel(t_BDP, t_BDP, degree=degree, offset=offset).mean()
    within_student = polynomial_kernel(s_BCP, s_BCP, degree=degree, offset=offset).mean()
    between = polynomial_kernel(s_BCP, t_BDP, degree=degree, offset=offset).mean()
    return within_teacher + within_student - 2 * between


class NST(Method):
    """Match what the channels respond to, as a distribution."""

    title = "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer"
    venue = "arXiv"
    year = 2017
    family = "feature"
    published: ClassVar = {"cifar100": {"*": {"ce_weight": 1.0, "feature_weight": 50.0, "degree": 2, "offset": 0.0}}}

    def __init__(
        self,
        degree: int = 2,
        offset: float = 0.0,
        ce_weight: float = 1.0,
        feature_weight: float = 50.0,
        student_taps: tuple[str, ...] = ("stages",),
        teacher_taps: tuple[str, ...] = ("stages",),
    ) -> None:
        """Set the options.

        Args:
            degree: degree of the polynomial kernel.
            offset: offset of the polynomial kernel.
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the distillation term.
            student_taps: taps of the student, paired with the teacher's by position; ``stages`` pair by scale.
            teacher_taps: taps of the teacher.
        """
        super().__init__()
        if degree < 1:
            raise ValueError(f"degree must be a whole number of at least 1, got {degree}")
        self.degree = degree
        self.offset = offset
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the sum over stages."""
        s, t = student.real, teacher.real
        stages = [
            nst_loss(as_map(s.taps[a]), as_map(t.taps[b]), degree=self.degree, offset=self.offset)
            for a, b in self.matched
        ]
        return Losses(
            ce=Term(cross_entropy(s.logits, batch.target), self.ce_weight, "task"),
            nst=Term(torch.stack(stages).sum(), self.feature_weight),
        )
