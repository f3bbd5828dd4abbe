"""OFD: Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.

    s' = bn(conv(s));   t = teacher's pre-activation, average-pooled to the student's size
    z  = max(t, margin_c);   margin_c = E[x | x < 0] for x ~ N(beta_c, gamma_c^2), of the batch norm before the ReLU
    L_i = 1 / B * sum over b, c, h, w of [s' > z or t > 0] * (s' - z)^2
    L   = ce_weight * CE + feature_weight * sum over stages i of 2^(i-n+1) * L_i

Positive targets attract the student from both sides, other targets only a student above the margin. Stages count from
the shallow (i = 0) to the deep (n - 1). Paper and released code (megvii-research/mdistiller) agree in the loss. Where
``gamma`` is 0 the released margin divides by zero; here it is its limit, ``min(beta, 0)``.

The released codes, also the authors', leave the teacher in train mode: its batch norms normalise by each batch, and
their running statistics drift while the student learns. Here it normalises by each batch too, as in the published
numbers, but its running statistics, which have no effect in train mode, never change.
``teacher_batch_statistics=false`` uses the teacher in eval mode instead, as it was given.

mdistiller's lists of channels lack the stem of some networks (ResNet50 on CIFAR), so its margins and stages are shifted
against each other, and its margins are in no checkpoint. Here each margin belongs to its stage and is a buffer. The
loss is summed over pixels, so it grows with the maps; the weights are those for 32x32 (1e-3) and 224x224 images (1e-4,
with batches of 128).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.projectors import as_map, map_shape, resize

# B batch, C channels (of the teacher), H height, W width


def margin(weight_C: Tensor, bias_C: Tensor) -> Tensor:
    """Return the mean of the negative part of each channel, (C,), from the affine parameters of its batch norm.

    Heo et al., eq. 2. If less than a thousandth of the channel is negative, it is ``-3 |weight|`` as released.
    """
    scale_C, mean_C = weight_C.detach().double().abs(), bias_C.detach().double()
    ratio_C = mean_C / torch.where(scale_C > 0, scale_C, 1.0)
    negative_C = torch.special.ndtr(-ratio_C)
    density_C = torch.exp(-(ratio_C**2) / 2) / math.sqrt(2 * math.pi)
    margin_C = torch.where(negative_C > 0.001, mean_C - scale_C * density_C / negative_C, -3 * scale_C)
    return torch.where(scale_C > 0, margin_C, mean_C.clamp(max=0)).to(weight_C.dtype)


def ofd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, margin_C: Tensor) -> Tensor:
    """Return the partial distance of connected student and teacher pre-activations, a scalar.

    It is summed over channels and pixels and averaged over the batch.
    """
    student_BCHW, teacher_BCHW = lift(student_BCHW), lift(teacher_BCHW.detach())
    target_BCHW = torch.maximum(teacher_BCHW, margin_C[:, None, None])
    active_BCHW = (student_BCHW > target_BCHW) | (teacher_BCHW > 0)
    return ((student_BCHW - target_BCHW).pow(2) * active_BCHW).sum() / student_BCHW.shape[0]


def connector(inputs: int, outputs: int, *, kernel_size: int = 1) -> nn.Sequential:
    """Return a convolution without bias and a batch norm, initialised as released."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / (kernel_size**2 * outputs)))
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class OFD(Method):
    """Regress pre-activations where they matter."""

    title = "A Comprehensive Overhaul of Feature Distillation"
    venue = "ICCV"
    year = 2019
    family = "feature"
    published: ClassVar = {
        "cifar100": {"*": {"ce_weight": 1.0, "feature_weight": 1e-3, "kernel_size": 1}},
        "imagenet": {"*": {"ce_weight": 1.0, "feature_weight": 1e-4, "kernel_size": 1}},
    }

    def __init__(
        self,
        kernel_size: int = 1,
        teacher_batch_statistics: bool = True,
        ce_weight: float = 1.0,
        feature_weight: float = 1e-3,
        student_taps: tuple[str, ...] = ("stages:pre",),
        teacher_taps: tuple[str, ...] = ("stages:pre",),
    ) -> None:
        """Set the options.

        Args:
            kernel_size: size of the connectors' convolutions, odd.
            teacher_batch_statistics: the teacher's batch norms normalise by each batch, as released.
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the distillation term.
            student_taps: taps of the student, paired with the teacher's by position; ``stages:pre`` pair by scale.
            teacher_taps: taps of the teacher.
        """
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd and positive, so that it keeps the size of a map; got {kernel_size}"
            )
        self.kernel_size = kernel_size
        self.teacher_batch_statistics = teacher_batch_statistics
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)
        self.connectors = nn.ModuleList()

    @property
    def needs(self) -> Needs:
        """The pre-activations of the stages of both networks."""
        return Needs(
            student_taps=self.student_taps,
            teacher_taps=self.teacher_taps,
            teacher_batch_statistics=self.teacher_batch_statistics,
        )

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Pair the stages, and create a connector and the margins for each pair.

        Raise ``ValueError`` if the teacher has no pre-activations.
        """
        if not teacher.norms:
            raise ValueError(
                f"OFD takes its margins from the batch norm before a stage's last ReLU, and {teacher.name} has none; "
                "choose a teacher with ':pre' taps (`vrm models NAME` lists taps)"
            )
        super().build(student, teacher, data)
        for _, b in self.matched:
            if b not in teacher.norms:
                raise ValueError(
                    f"OFD takes its margins from the batch norm before a stage's last ReLU, and knows none for {b} of "
                    f"{teacher.name}; choose among {', '.join(teacher.norms)}"
                )
        shapes = [(map_shape(student.shapes[a]), map_shape(teacher.shapes[b])) for a, b in self.matched]
        self.connectors = nn.ModuleList(connector(s[0], t[0], kernel_size=self.kernel_size) for s, t in shapes)
        for i, (_, b) in enumerate(self.matched):
            self.register_buffer(f"margin{i}", margin(teacher.norms[b].weight, teacher.norms[b].bias))

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the weighted sum over stages."""
        s, t = student.real, teacher.real
        stages = []
        for i, ((a, b), connect) in enumerate(zip(self.matched, self.connectors, strict=True)):
            s_BCHW = connect(as_map(s.taps[a]))
            t_BCHW = resize(as_map(t.taps[b]), (s_BCHW.shape[2], s_BCHW.shape[3]))
            weight = 2.0 ** (i + 1 - len(self.matched))
            stages.append(weight * ofd_loss(s_BCHW, t_BCHW, self.get_buffer(f"margin{i}")))
        return Losses(
            ce=Term(cross_entropy(s.logits, batch.target), self.ce_weight, "task"),
            ofd=Term(torch.stack(stages).sum(), self.feature_weight),
        )
