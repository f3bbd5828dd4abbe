"""ReviewKD: Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021 (arXiv 2104.09044).

The student's stages and its pooled vector, as a 1 x 1 map, are fused from the deep to the shallow. For i = n .. 0:

    x   = bn(conv1x1(s_i))                                            ``mid`` channels
    x   = w_0 * x + w_1 * u,  u = carried map at the size of s_i,  w = sigmoid(conv1x1([x, u]))       unless i = n
    carried = x, nearest-resized to the teacher's size;   r_i = bn(conv3x3(carried))

    L = ce_weight * CE + review_weight * min(epoch / warmup_epochs, 1) * sum_i HCL(r_i, t_i)

HCL is the hierarchical context loss: the squared errors of the whole maps and of their 4 x 4, 2 x 2 and 1 x 1 averages,
where these are smaller, with weights 1, 1/2, 1/4, 1/8 in that order, normalised. The teacher's maps are
pre-activations, the student's are outputs of stages (for ImageNet: pre-activations too). A student's stages may be
signed (wide residual networks, MobileNetV2), as in the published numbers; they pass through a convolution anyway. A
teacher whose stages end without a ReLU has no pre-activations and is refused.

The released code (the authors', megvii-research/mdistiller) is followed. ``mid`` is min(max_mid_channels, channels of
the pooled vector); mdistiller ignores this option, and the authors set it to 256 for ResNet50/MobileNetV1. The ramp is
mdistiller's, 1/20 in the first epoch, whereas the authors' begins with 0. Weights are those of the authors' scripts,
and for vgg13/vgg8 the one that mdistiller's maintainers give. None is published for vgg8 and MobileNetV2 with other
teachers, which therefore use the default. Sizes are measured, whereas the released code lists them for each pair, as
squares. Batch norm on a 1 x 1 map needs at least two samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.pairing import pair_taps
from vrm.projectors import as_map, map_shape, resize

# B batch, C channels (of the teacher), M mid channels, H height, W width

Shape = tuple[int, int, int]


def hcl_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return the hierarchical context loss of two maps of one shape, a scalar.

    Chen et al., section 3.3, as released.
    """
    student_BCHW, teacher_BCHW = lift(student_BCHW), lift(teacher_BCHW.detach())
    loss = F.mse_loss(student_BCHW, teacher_BCHW)
    weight = total = 1.0
    for level in (4, 2, 1):
        if level < student_BCHW.shape[2]:
            weight /= 2
            total += weight
            size = (level, level)
            loss = loss + weight * F.mse_loss(resize(student_BCHW, size), resize(teacher_BCHW, size))
    return loss / total


class Fusion(nn.Module):
    """Attention-based fusion of a student map with the map carried from deeper ones, into the shape of a teacher's map.

    ``deepest``: there is no map to fuse with.
    """

    def __init__(self, student: Shape, mid: int, teacher: Shape, *, deepest: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(student[0], mid, 1, bias=False)
        self.bn_in = nn.BatchNorm2d(mid)
        self.attention = None if deepest else nn.Conv2d(2 * mid, 2, 1)
        self.conv_out = nn.Conv2d(mid, teacher[0], 3, padding=1, bias=False)
        self.bn_out = nn.BatchNorm2d(teacher[0])
        self.size = teacher[1:]
        for conv in (self.conv_in, self.conv_out):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, student_BCHW: Tensor, carried_BMHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fused map with the teacher's size and channels, and the map to carry on."""
        x_BMHW: Tensor = self.bn_in(self.conv_in(student_BCHW))
        if self.attention is not None:
            carried_BMHW = F.interpolate(carried_BMHW, x_BMHW.shape[2:], mode="nearest")
            own_B1HW, other_B1HW = self.attention(torch.cat([x_BMHW, carried_BMHW], dim=1)).sigmoid().split(1, dim=1)
            x_BMHW = own_B1HW * x_BMHW + other_B1HW * carried_BMHW
        if x_BMHW.shape[2:] != self.size:
            x_BMHW = F.interpolate(x_BMHW, self.size, mode="nearest")
        return self.bn_out(self.conv_out(x_BMHW)), x_BMHW


class Review(nn.Module):
    """All fusions, from student maps of given shapes (C, H, W) to the teacher's shapes, both shallow to deep."""

    def __init__(self, student: Sequence[Shape], teacher: Sequence[Shape], *, mid_channels: int) -> None:
        super().__init__()
        last = len(student) - 1
        self.fusions = nn.ModuleList(
            Fusion(s, mid_channels, t, deepest=i == last) for i, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(self, students: Sequence[Tensor]) -> list[Tensor]:
        """Return the fused maps, shallow to deep like ``students``."""
        carried = students[-1]
        fused: list[Tensor] = []
        for fusion, student_BCHW in zip(reversed(self.fusions), reversed(students), strict=True):
            out, carried = fusion(student_BCHW, carried)
            fused.insert(0, out)
        return fused


class ReviewKD(Method):
    """Let the student's deep stages review the teacher's shallow ones."""

    title = "Distilling Knowledge via Knowledge Review"
    venue = "CVPR"
    year = 2021
    family = "feature"
    published: ClassVar = {
        "cifar100": {
            "*": {"ce_weight": 1.0, "warmup_epochs": 20, "max_mid_channels": 512},
            "resnet32x4/resnet8x4": {"review_weight": 5.0},
            "resnet56/resnet20": {"review_weight": 0.6},
            "resnet110/resnet32": {"review_weight": 1.0},
            "wrn_40_2/wrn_16_2": {"review_weight": 5.0},
            "wrn_40_2/wrn_40_1": {"review_weight": 5.0},
            "vgg13/vgg8": {"review_weight": 5.0},
            "wrn_40_2/shufflenetv1": {"review_weight": 5.0},
            "resnet32x4/shufflenetv1": {"review_weight": 5.0},
            "resnet32x4/shufflenetv2": {"review_weight": 8.0},
        },
        "imagenet": {
            "*": {"ce_weight": 1.0, "warmup_epochs": 1, "student_taps": ("stages:pre",)},
            "resnet34/resnet18": {"review_weight": 1.0},
            "resnet50/mobilenetv1": {"review_weight": 8.0, "max_mid_channels": 256},
        },
    }

    def __init__(
        self,
        ce_weight: float = 1.0,
        review_weight: float = 5.0,
        warmup_epochs: int = 20,
        max_mid_channels: int = 512,
        student_taps: tuple[str, ...] = ("stages",),
        teacher_taps: tuple[str, ...] = ("stages:pre",),
    ) -> None:
        """Set the options.

        Args:
            ce_weight: weight of the cross entropy.
            review_weight: weight of the distillation term.
            warmup_epochs: number of epochs over which the distillation term rises to its weight.
            max_mid_channels: upper limit of the fusions' channels.
            student_taps: taps of the student, shallow to deep, paired with the teacher's by position; ``stages`` pair
                by scale.
            teacher_taps: taps of the teacher.
        """
        super().__init__()
        if warmup_epochs < 1:
            raise ValueError(f"warmup_epochs must be at least 1 (no ramp), got {warmup_epochs}")
        if max_mid_channels < 1:
            raise ValueError(f"max_mid_channels must be at least 1, got {max_mid_channels}")
        self.ce_weight = ce_weight
        self.review_weight = review_weight
        self.warmup_epochs = warmup_epochs
        self.max_mid_channels = max_mid_channels
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)
        self.review: nn.Module = nn.Identity()

    @property
    def needs(self) -> Needs:
        """Stages of the student, pre-activations of the teacher, and two samples for batch norm on 1 x 1 maps."""
        taps = (*self.student_taps, "pooled"), (*self.teacher_taps, "pooled")
        return Needs(student_taps=taps[0], teacher_taps=taps[1], min_batch=2)

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Pair the maps and create a fusion for each pair. Raise ``ValueError`` if a tap does not exist."""
        self.matched = pair_taps(student, teacher, self.needs.student_taps, self.needs.teacher_taps)
        students = [map_shape(student.shapes[a]) for a, _ in self.matched]
        teachers = [map_shape(teacher.shapes[b]) for _, b in self.matched]
        self.review = Review(students, teachers, mid_channels=min(self.max_mid_channels, students[-1][0]))

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term, and the sum over maps under the ramp."""
        s, t = student.real, teacher.real
        fused = self.review([as_map(s.taps[a]) for a, _ in self.matched])
        losses = [hcl_loss(f, as_map(t.taps[b])) for f, (_, b) in zip(fused, self.matched, strict=True)]
        return Losses(
            ce=Term(cross_entropy(s.logits, batch.target), self.ce_weight, "task"),
            review=Term(torch.stack(losses).sum(), self.review_weight * progress.ramp(self.warmup_epochs)),
        )
