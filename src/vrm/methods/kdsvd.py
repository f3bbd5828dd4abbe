"""KDSVD: Lee, Kim, Song, "Self-supervised Knowledge Distillation Using Singular Value Decomposition", ECCV 2018.

For each sample and stage, a matrix ``X`` has the right singular vectors ``V`` and singular values ``S``, in descending
order.

    teacher: W_t = V_t[:k] * S_t[:k] / |S_t[:k]|
    student: W_s = for each of V_t[:k] the one of V_s[:k+3] with the greatest |cosine|, times its sign, scaled as W_t
    R_i[p, q, c] = exp(-(W_i[p, c] - W_{i-1}[q, c])^2 / 8)                        for neighbouring stages i-1, i
    L = feature_weight * 1/B * sum over stages i, samples, p, q, c of (R^s_i - R^t_i)^2

With ``layout="channel_space"`` (RepDistiller, the paper's idea) ``X`` is the map as a matrix (H W, C), so student and
teacher need equal channels. ``layout="width_space"`` is mdistiller's, a transcription error: ``X`` is the map as a
matrix (C H, W), so they need equal widths. The authors' TensorFlow code differs from both: k + 1 vectors on both sides,
half the sum times sqrt(k), no division by the batch.

The signs of singular vectors are arbitrary, and the released loss depends on those that a library returns. Here the
teacher's vectors have a non-negative sum (for non-negative maps the first one is then the non-negative one), and the
student's follow the teacher's, so that all devices agree. The gradient of singular vectors is infinite where singular
values coincide (dead channels, maps of low rank). There the released gradient is NaN; here those directions contribute
none. Only first derivatives exist. mdistiller's loss of MobileNetV1's first stage (see AT) is not reproduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.projectors import as_map, map_shape

# B batch, C channels, H height, W width; X is B matrices of M rows and N columns, R = min(M, N); K vectors are kept

Layout = Literal["channel_space", "width_space"]


def as_matrix(features_BCHW: Tensor, layout: Layout) -> Tensor:
    """Return one matrix (M, N) a sample: (H * W, C) for ``channel_space``, (C * H, W) for ``width_space``."""
    if layout == "channel_space":
        return features_BCHW.flatten(2).mT
    return features_BCHW.flatten(1, 2)


def singular_vectors(x_BMN: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Return the first ``count`` right singular vectors, as columns (B, N, K), and all singular values (B, R).

    Gradients reach the matrices through the vectors: their first-order response to a change of ``x`` is added, for a
    change whose value is zero. It leaves out rotations between (nearly) equal singular values, which would be infinite.
    """
    with torch.no_grad():
        # The decomposition refuses values that are not finite; they still reach the loss through ``change``.
        u_BMR, s_BR, v_BRN = torch.linalg.svd(x_BMN.nan_to_num(), full_matrices=False)
        largest_B1 = s_BR[:, :1]
        unit_B11 = torch.where(largest_B1 > 0, 1 / largest_B1, 0)[:, :, None]
        r_BR = s_BR * unit_B11[:, 0]  # relative singular values cannot overflow; those below ``floor`` are noise
        floor = max(x_BMN.shape[1:]) * torch.finfo(s_BR.dtype).eps
        gap_BRK = r_BR[:, None, :count].square() - r_BR[:, :, None].square()
        inverse_gap_BRK = torch.where(gap_BRK.abs() > floor, 1 / gap_BRK, 0)
        inverse_BK = torch.where(r_BR[:, :count] > floor, 1 / r_BR[:, :count], 0)
    change_BMN = x_BMN - x_BMN.detach()
    left_BRN = u_BMR.mT @ change_BMN
    inner_BRR = left_BRN @ v_BRN.mT
    # First-order perturbation of the eigenvectors of X^T X, within the row space of X and out of it.
    within_BRK = r_BR[:, None, :count] * inner_BRR.mT[:, :, :count] + r_BR[:, :, None] * inner_BRR[:, :, :count]
    response_BNK = v_BRN.mT @ (inverse_gap_BRK * within_BRK)
    if v_BRN.shape[1] < v_BRN.shape[2]:
        outside_BNK = left_BRN.mT[:, :, :count] - v_BRN.mT @ inner_BRR.mT[:, :, :count]
        response_BNK = response_BNK + inverse_BK[:, None] * outside_BNK
    return v_BRN[:, :count].mT + unit_B11 * response_BNK, s_BR


def stage_vectors(
    student_BMN: Tensor, teacher_BMN: Tensor, *, num_vectors: int = 1, num_extra: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's vectors aligned with the teacher's, the teacher's, (B, N, K) each, and the scale of both.

    The scale (B, K) is that of the teacher's singular values, normalised.
    """
    student_BNJ, _ = singular_vectors(lift(student_BMN), count=num_vectors + num_extra)
    teacher_BNK, values_BR = singular_vectors(lift(teacher_BMN.detach()), count=num_vectors)
    teacher_BNK = torch.where(teacher_BNK.sum(1, keepdim=True) < 0, -teacher_BNK, teacher_BNK)
    cosine_BJK = student_BNJ.mT @ teacher_BNK
    nearest_B1K = cosine_BJK.detach().abs().argmax(1, keepdim=True)
    sign_B1K = cosine_BJK.detach().gather(1, nearest_B1K).sign()
    aligned_BNK = student_BNJ.gather(2, nearest_B1K.expand(-1, student_BNJ.shape[1], -1)) * sign_B1K
    return aligned_BNK, teacher_BNK, F.normalize(values_BR[:, :num_vectors], dim=1)


def relation(front_BPK: Tensor, back_BQK: Tensor, *, denominator: float = 8.0) -> Tensor:
    """Return the Gaussian kernel of all entries of two stages' vectors, column by column, (B, P, Q, K).

    Lee et al., eq. 6.
    """
    return (-(front_BPK[:, :, None] - back_BQK[:, None]).square() / denominator).exp()


def kdsvd_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    num_vectors: int = 1,
    layout: Layout = "channel_space",
) -> Tensor:
    """Return the squared distance of kernels for each pair of neighbouring stages, (stages - 1,), without unit.

    Maps are (B, C, H, W), shallow to deep. Student and teacher must agree in channels or width, depending on
    ``layout``.
    """
    stages = []
    for s, t in zip(student, teacher, strict=True):
        vectors = stage_vectors(as_matrix(s, layout), as_matrix(t, layout), num_vectors=num_vectors)
        stages.append((vectors[0] * vectors[2][:, None], vectors[1] * vectors[2][:, None]))
    losses = [
        (relation(here[0], before[0]) - relation(here[1], before[1])).square().sum() / len(here[0])
        for before, here in pairwise(stages)
    ]
    return torch.stack(losses)


class KDSVD(Method):
    """Match the principal directions of the maps, and how they change from stage to stage."""

    title = "Self-supervised Knowledge Distillation Using Singular Value Decomposition"
    venue = "ECCV"
    year = 2018
    family = "relation"
    published: ClassVar = {"cifar100": {"*": {"num_vectors": 1, "ce_weight": 1.0, "feature_weight": 1.0}}}

    def __init__(
        self,
        num_vectors: int = 1,
        layout: Layout = "channel_space",
        ce_weight: float = 1.0,
        feature_weight: float = 1.0,
        student_taps: tuple[str, ...] = ("stages",),
        teacher_taps: tuple[str, ...] = ("stages",),
    ) -> None:
        """Set the options.

        Args:
            num_vectors: number of singular vectors of the teacher that are kept at each stage.
            layout: the matrix of a map, (H W, C) for ``channel_space`` and (C H, W) for ``width_space``.
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the distillation term.
            student_taps: taps of the student, paired with the teacher's by position; ``stages`` pair by scale.
            teacher_taps: taps of the teacher.
        """
        super().__init__()
        if num_vectors < 1:
            raise ValueError(f"num_vectors must be at least 1, got {num_vectors}")
        if layout not in get_args(Layout):
            raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
        self.num_vectors = num_vectors
        self.layout: Layout = layout
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)

    @property
    def needs(self) -> Needs:
        """The stages of both networks. A decomposition asks the host whether it converged, so no graph can hold it."""
        return Needs(student_taps=self.student_taps, teacher_taps=self.teacher_taps, capturable=False)

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Pair the maps.

        Raise ``ValueError`` if maps or singular vectors are too few, or if the vectors differ in length.
        """
        super().build(student, teacher, data)
        if len(self.matched) < 2:
            raise ValueError(
                f"KDSVD compares neighbouring maps and needs two at least, found {self.matched}; name more with "
                "student_taps and teacher_taps"
            )
        axis, what = (0, "channels") if self.layout == "channel_space" else (2, "columns")
        for tap_s, tap_t in self.matched:
            ours, theirs = map_shape(student.shapes[tap_s]), map_shape(teacher.shapes[tap_t])
            if ours[axis] != theirs[axis]:
                raise ValueError(
                    f"KDSVD with layout={self.layout} needs equal {what}, but {tap_s} of {student.name} has "
                    f"{ours[axis]} and {tap_t} of {teacher.name} has {theirs[axis]}; choose other taps or layout"
                )
            for shape, name in ((ours, f"{tap_s} of {student.name}"), (theirs, f"{tap_t} of {teacher.name}")):
                sizes = as_matrix(torch.empty(1, *shape, device="meta"), self.layout).shape[1:]
                if min(sizes) < self.num_vectors:
                    raise ValueError(
                        f"{name} has {min(sizes)} singular vectors, fewer than num_vectors={self.num_vectors}; lower it"
                    )

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the distillation term."""
        s, t = student.real, teacher.real
        loss = kdsvd_loss(
            [as_map(s.taps[a]) for a, _ in self.matched],
            [as_map(t.taps[b]) for _, b in self.matched],
            num_vectors=self.num_vectors,
            layout=self.layout,
        )
        return Losses(
            ce=Term(cross_entropy(s.logits, batch.target), self.ce_weight, "task"),
            kdsvd=Term(loss.sum(), self.feature_weight),
        )
