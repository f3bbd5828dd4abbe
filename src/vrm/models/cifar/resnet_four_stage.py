"""ResNet18 and ResNet50 with the four stages of ImageNet and a stem for small images (He et al., CVPR 2016, table 1).

Parameter names follow the KD literature's checkpoints, in which these differ from those of the three-stage ResNets.
"""

from __future__ import annotations

from torch import Tensor, nn

from vrm.models.cifar.initialisation import kaiming_fan_out
from vrm.models.taps import Tap


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut; the last ReLU, ``relu_out``, follows the sum."""

    expansion = 1
    last_norm = "bn2"

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu_out(y + self.shortcut(x))
        return activated


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions and a shortcut; the last ReLU, ``relu_out``, follows the sum."""

    expansion = 4
    last_norm = "bn3"

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.shortcut = _shortcut(in_channels, 4 * channels, stride)
        self.relu_out = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, 4 * channels, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(y)))))
        activated: Tensor = self.relu_out(y + self.shortcut(x))
        return activated


_BLOCKS: dict[int, tuple[type[Basic] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (Basic, (2, 2, 2, 2)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class FourStageResNet(nn.Module):
    """ResNet18 or ResNet50 for small images of any size: a 3x3 stem, no pooling before the first stage.

    Args:
        depth: 18 or 50.
        num_classes: Width of the logits.
        in_channels: Channels of the image.
    """

    def __init__(self, depth: int, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.block, self.num_blocks = _BLOCKS[depth]
        expansion = self.block.expansion
        self.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(1, 64, 64, 1)
        self.layer2 = self._stage(2, 64 * expansion, 128, 2)
        self.layer3 = self._stage(3, 128 * expansion, 256, 2)
        self.layer4 = self._stage(4, 256 * expansion, 512, 2)
        self.linear = nn.Linear(512 * expansion, num_classes)
        kaiming_fan_out(self)

    def _stage(self, stage: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        rest = (self.block(channels * self.block.expansion, channels, 1) for _ in range(self.num_blocks[stage - 1] - 1))
        return nn.Sequential(self.block(in_channels, channels, stride), *rest)

    def declared_taps(self) -> dict[str, Tap]:
        last = {k: f"layer{k}.{num_blocks - 1}" for k, num_blocks in enumerate(self.num_blocks, start=1)}
        norm = self.block.last_norm
        return {
            "stem": Tap("relu"),
            **{f"stage{k}": Tap(f"layer{k}") for k in last},
            "map": Tap("layer4"),
            "pooled": Tap("linear", "input"),
            "logits": Tap("linear"),
            **{f"stage{k}:pre": Tap(f"{block}.relu_out", "input", norm=f"{block}.{norm}") for k, block in last.items()},
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, in_channels, H, W)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
