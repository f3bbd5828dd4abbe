"""The CIFAR networks of the knowledge distillation literature, one family a file; ``NETWORKS`` names them."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from vrm.models.cifar.mobilenet import MobileNetV2
from vrm.models.cifar.resnet import ResNet
from vrm.models.cifar.resnet_four_stage import FourStageResNet
from vrm.models.cifar.shufflenet import ShuffleNetV1, ShuffleNetV2
from vrm.models.cifar.vgg import VGG
from vrm.models.cifar.wide_resnet import WideResNet

_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)

NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(ResNet, depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth, _WIDE) for depth in (8, 32)},
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth in (16, 40) for width in (1, 2)},
    **{f"vgg{depth}": partial(VGG, depth) for depth in (8, 11, 13, 16, 19)},
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    **{f"resnet{depth}": partial(FourStageResNet, depth) for depth in (18, 50)},
}
"""A class or its partial for each name; call it with ``num_classes`` and, where not 3, ``in_channels``."""
