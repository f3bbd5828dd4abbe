"""SDD: Luo, "Scale Decoupled Distillation", CVPR 2024 (arXiv 2403.13512).

    F = feature map whose mean is classified;  P_4 = F pooled to 4 x 4;  P_2, P_1 = P_4 pooled to 2 x 2 and to 1 x 1
    s_n, t_n = classifier of the n-th of the N regions of P_1, P_2, .. (N = 5 for scales 1 and 2, 21 with 4)
    w_bn = 1 if the teacher is as right about region n of sample b as about the global one, else complementary_weight
    L = ce_weight * CE(s, y) + 1 / (B N) * sum_bn w_bn * base(s_bn, t_bn, y_b)

Every network's own linear classifier is applied to the mean features of image regions, and another method, the base,
compares the resulting rows of logits: KD, DKD, NKD or any method whose distillation is a mean over rows. The base keeps
its options (``method.base_options.beta=6``), its ramp and its weight of the cross entropy, which is of the network's
normal logits. The classifier learns from all regions.

As in the released code (shicaiwei123/SDD-CVPR2024), the global region is the mean of P_4, which differs from the mean
of F where the height is no multiple of 4 (7 x 7), and regions are compared by correctness alone: a teacher that is
wrong about both in different ways is consistent. The released NKD form keeps the target among the other classes by
mistake; ``base=nkd`` leaves it out, and ``method.base_options.keep_target=true`` keeps it. A map of fewer than 4 x 4
pixels is stretched, so its regions overlap or repeat.

The numbers in the VRM paper's Table 13 are those of SD-KD, ``base=kd``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm.contract import Batch, DataInfo, Losses, Method, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.methods._base import build_base

# B batch, C classes, D channels, P = H * W pixels, N regions, R = B * N rows

SCALES = (1, 2, 4)
"""The grids into which a map may be divided, as released."""


def region_logits(map_BDHW: Tensor, classifier: nn.Linear, *, scales: tuple[int, ...] = (1, 2)) -> Tensor:
    """Return the logits of image regions, (B, N, C): the classifier on the mean of each, scale by scale, row-major."""
    height, width = map_BDHW.shape[2:]
    pixels = torch.eye(height * width, dtype=lift(map_BDHW).dtype, device=map_BDHW.device)
    finest = F.adaptive_avg_pool2d(pixels.view(-1, height, width), SCALES[-1])
    share_PN = torch.cat([F.adaptive_avg_pool2d(finest, scale).flatten(1) for scale in scales], dim=1)
    pooled_BND = (lift(map_BDHW).flatten(2) @ share_PN).transpose(1, 2)
    bias = None if classifier.bias is None else classifier.bias.to(pooled_BND)
    return F.linear(pooled_BND, classifier.weight.to(pooled_BND), bias)


def region_weights(teacher_BNC: Tensor, target_B: Tensor, *, complementary_weight: float = 2.0) -> Tensor:
    """Return the weight of each region, (B, N): 1 where the teacher is as right there as globally (region 1)."""
    right_BN = teacher_BNC.argmax(2) == target_B[:, None]
    return 1.0 + (complementary_weight - 1.0) * (right_BN != right_BN[:, :1]).to(teacher_BNC.dtype)


def sdd_loss(rows_BN: Tensor, weights_BN: Tensor) -> Tensor:
    """Return the weighted mean, a scalar, of the losses of all regions of all samples, (B, N). Luo, eq. 9."""
    return (weights_BN * rows_BN).mean()


_TWO, _THREE = (1, 2), (1, 2, 4)
_OF_ONE_TYPE = ("resnet32x4/resnet8x4", "vgg13/vgg8", "wrn_40_2/wrn_16_2", "wrn_40_2/wrn_40_1", "resnet56/resnet20")
_ALL_PAIRS = {
    **dict.fromkeys((*_OF_ONE_TYPE, "resnet110/resnet32"), _TWO),
    **dict.fromkeys(("resnet32x4/shufflenetv1", "resnet32x4/shufflenetv2", "resnet32x4/mobilenetv2"), _THREE),
    **dict.fromkeys(("wrn_40_2/shufflenetv1", "wrn_40_2/vgg8", "wrn_40_2/mobilenetv2"), _THREE),
    **dict.fromkeys(("vgg13/mobilenetv2", "resnet50/mobilenetv2", "resnet50/vgg8", "resnet50/shufflenetv1"), _THREE),
}
_BETAS = {
    "vgg13/": 6.0,
    "wrn_40_2/mobilenetv2": 6.0,
    "wrn_40_2/wrn_16_2": 6.0,
    "wrn_40_2/wrn_40_1": 6.0,
    "resnet56/resnet20": 2.0,
    "resnet110/resnet32": 2.0,
}
"""The released weight of the non-target classes, 8 for all other pairs. SD-NKD inherits it as ``gamma``."""


def _released(option: str) -> dict[str, Mapping[str, Any]]:
    """Return the released settings by pair for a base whose ``option`` is the weight of the non-target classes."""
    weights = {
        pair: next((beta for begin, beta in _BETAS.items() if pair.startswith(begin)), 8.0) for pair in _ALL_PAIRS
    }
    return {pair: {"scales": scales, "base_options": {option: weights[pair]}} for pair, scales in _ALL_PAIRS.items()}


class SDD(Method):
    """Compare the networks' predictions for regions of the image, and weigh up those that contradict the global one."""

    title = "Scale Decoupled Distillation"
    venue = "CVPR"
    year = 2024
    family = "logit"
    published: ClassVar = {
        "cifar100": {
            "base=kd": {pair: {"scales": scales} for pair, scales in _ALL_PAIRS.items()},
            "base=dkd": _released("beta"),
            "base=nkd": {
                "*": {"base_options": {"temperature": 4.0}},
                **_released("gamma"),
                "resnet50/vgg8": {"scales": _TWO, "base_options": {"gamma": 8.0}},
            },
        },
        "imagenet": {
            "base=dkd": {
                "*": {"base_options": {"temperature": 1.0, "warmup_epochs": 1}},
                "resnet34/resnet18": {"scales": _TWO, "base_options": {"beta": 0.5}},
                "resnet50/mobilenetv1": {"scales": _THREE, "base_options": {"beta": 2.0}},
            },
        },
    }

    student_taps = teacher_taps = ("map",)

    def __init__(
        self,
        base: str = "kd",
        base_options: dict[str, Any] = {},  # noqa: B006
        scales: tuple[int, ...] = (1, 2),
        complementary_weight: float = 2.0,
    ) -> None:
        """Set the options.

        Args:
            base: the method that compares the logits of the regions.
            base_options: options of the base.
            scales: grids into which the map is divided: 1 for all of it, 2 for 2x2 regions, 4 for 4x4.
            complementary_weight: weight, 0 or more, of regions about which the teacher is right where it is globally
                wrong, or the other way round. All others have weight 1.
        """
        super().__init__()
        if tuple(scales) not in (_TWO, (1, 4), _THREE):
            allowed = "[1,2], [1,4] or [1,2,4]"
            raise ValueError(f"scales must be {allowed}: all of the map and its regions; got {list(scales)}")
        if not complementary_weight >= 0:
            raise ValueError(f"complementary_weight must be 0 or more; got {complementary_weight}")
        self.base = build_base(base, base_options)
        self.scales = tuple(scales)
        self.complementary_weight = complementary_weight
        self._classifiers: tuple[nn.Linear, ...] = ()

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Take the classifiers of both networks, and check that each works on the mean of a map with regions.

        Raise ``ValueError`` for a network whose logits are not those of a linear layer on the mean of a map, or whose
        map is a single pixel.
        """
        classifiers = []
        for probe in (student, teacher):
            shape = probe.shapes.get("map")
            if shape is None or probe.classifier is None:
                raise ValueError(
                    f"{probe.name} does not end in one linear layer on the mean of a map, so its image regions have no "
                    "logits; choose a convolutional network with global average pooling, or another method"
                )
            if shape[1:] == (1, 1):
                raise ValueError(f"the last map of {probe.name} is a single pixel without regions; give larger images")
            classifiers.append(probe.classifier)
        self._classifiers = tuple(classifiers)  # in a tuple they do not become parameters of the method
        super().build(student, teacher, data)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term on the normal logits, and the base's loss of the regions."""
        of_student, of_teacher = self._classifiers
        s_BNC = region_logits(student.real.taps["map"], of_student, scales=self.scales)
        t_BNC = region_logits(teacher.real.taps["map"], of_teacher, scales=self.scales).detach()
        weights_BN = region_weights(t_BNC, batch.target, complementary_weight=self.complementary_weight)
        target_R = batch.target.repeat_interleave(weights_BN.shape[1])
        rows_R = self.base.row_loss(s_BNC.flatten(0, 1), t_BNC.flatten(0, 1), target_R, progress)
        return Losses(
            ce=Term(cross_entropy(student.real.logits, batch.target), self.base.ce_weight, "task"),
            distill=Term(sdd_loss(rows_R.view_as(weights_BN), weights_BN)),
        )
