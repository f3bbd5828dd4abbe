"""VID: Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation", CVPR 2019 (arXiv 1904.05835).

    mu    = W3 relu(W2 relu(W1 s))                      1x1 convolutions without bias, widths Cs -> Ct -> Ct -> Ct
    var_c = softplus(a_c) + eps                         one number per channel of the teacher, initially var_c = 5
    L     = ce_weight * CE + feature_weight * sum over stages of mean of ((mu - t)^2 / var_c + log var_c) / 2

This is a Gaussian bound on the information that the student keeps about the teacher's maps. The constant
``log(2 pi) / 2`` is left out, so the loss may be negative. Maps of different sizes are average-pooled to the smaller.
HobbitLong/RepDistiller, which produced the published table, trains ``a``; that is the method, and the default.
megvii-research/mdistiller never trains it (it is in no optimiser and no checkpoint), as with ``learn_variance=false``.
Their ``log(1 + exp(a))`` overflows for large ``a``; ``softplus`` does not. Not reproduced: their pooling to squares,
and mdistiller's loss of MobileNetV1's first stage (see AT).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm.contract import Batch, DataInfo, Losses, Method, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.projectors import as_map, map_shape, to_smaller

# B batch, C channels (of the teacher), H height, W width


def vid_loss(mean_BCHW: Tensor, teacher_BCHW: Tensor, variance_C: Tensor) -> Tensor:
    """Return the negative log-likelihood of the teacher's map without its constant, a scalar in nats.

    Ahn et al., eq. 5 and 6.
    """
    variance_C11 = variance_C[:, None, None]
    squares_BCHW = (lift(mean_BCHW) - lift(teacher_BCHW.detach())).pow(2)
    return 0.5 * (squares_BCHW / variance_C11 + variance_C11.log()).mean()


def initial_log_scale(variance: float, *, eps: float = 1e-5) -> float:
    """Return the ``a`` for which ``softplus(a) + eps`` is ``variance``."""
    return variance - eps + math.log(-math.expm1(eps - variance))


class VariationalRegressor(nn.Module):
    """Predict mean (B, C_teacher, H, W) and variance (C_teacher,) of a teacher's map from the student's."""

    def __init__(self, inputs: int, outputs: int, *, variance: float, eps: float, learn_variance: bool) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 1, bias=False),
        )
        log_scale = torch.full((outputs,), initial_log_scale(variance, eps=eps))
        self.log_scale = nn.Parameter(log_scale, requires_grad=learn_variance)
        self.eps = eps

    def forward(self, student_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance of the Gaussian."""
        return self.mean(student_BCHW), F.softplus(self.log_scale) + self.eps


class VID(Method):
    """Make the teacher's maps as likely as possible given the student's."""

    title = "Variational Information Distillation for Knowledge Transfer"
    venue = "CVPR"
    year = 2019
    family = "feature"
    published: ClassVar = {"cifar100": {"*": {"ce_weight": 1.0, "feature_weight": 1.0, "initial_variance": 5.0}}}

    def __init__(
        self,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
        learn_variance: bool = True,
        ce_weight: float = 1.0,
        feature_weight: float = 1.0,
        student_taps: tuple[str, ...] = ("stages",),
        teacher_taps: tuple[str, ...] = ("stages",),
    ) -> None:
        """Set the options.

        Args:
            initial_variance: variance of every channel at the start.
            eps: smallest variance.
            learn_variance: train the variances.
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the distillation term.
            student_taps: taps of the student, paired with the teacher's by position; ``stages`` pair by scale.
            teacher_taps: taps of the teacher.
        """
        super().__init__()
        if not 0 < eps < initial_variance:
            raise ValueError(
                f"eps and initial_variance must satisfy 0 < eps < initial_variance; got {eps} and {initial_variance}"
            )
        self.initial_variance = initial_variance
        self.eps = eps
        self.learn_variance = learn_variance
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)
        self.regressors = nn.ModuleList()

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Pair the stages and create a regressor for each pair."""
        super().build(student, teacher, data)
        self.regressors = nn.ModuleList(
            VariationalRegressor(
                map_shape(student.shapes[a])[0],
                map_shape(teacher.shapes[b])[0],
                variance=self.initial_variance,
                eps=self.eps,
                learn_variance=self.learn_variance,
            )
            for a, b in self.matched
        )

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the sum over stages."""
        s, t = student.real, teacher.real
        stages = []
        for (a, b), regressor in zip(self.matched, self.regressors, strict=True):
            s_BCHW, t_BCHW = to_smaller(as_map(s.taps[a]), as_map(t.taps[b]))
            mean_BCHW, variance_C = regressor(s_BCHW)
            stages.append(vid_loss(mean_BCHW, t_BCHW, variance_C))
        return Losses(
            ce=Term(cross_entropy(s.logits, batch.target), self.ce_weight, "task"),
            vid=Term(torch.stack(stages).sum(), self.feature_weight),
        )
