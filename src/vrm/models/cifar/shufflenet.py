"""ShuffleNetV1 (Zhang et al., CVPR 2018) and V2 (Ma et al., ECCV 2018) with the small stem of the KD literature."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vrm.models.taps import Tap


class ChannelShuffle(nn.Module):
    """Interleave the channels of ``groups`` groups (PyTorch's own has no gradient on the CPU in some versions)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        batch, channels, height, width = x.shape
        grouped = x.reshape(batch, self.groups, channels // self.groups, height, width)
        return grouped.transpose(1, 2).reshape(x.shape)


class BottleneckV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; a block of stride 2 appends its pooled input."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        inner = channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.shuffle = ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H, W); stride 2: (B, channels + in_channels, H / 2, W / 2)."""
        y = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        y = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(y)))))
        y = torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else y + x
        activated: Tensor = self.relu3(y)
        return activated


class ShuffleNetV1(nn.Module):
    """ShuffleNetV1 with three groups and stages of 240, 480 and 960 channels, for small images of any size.

    Args:
        num_classes: Width of the logits.
        in_channels: Channels of the image.
    """

    def __init__(self, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(24, 240, 4, first_groups=1)
        self.layer2 = self._stage(240, 480, 8, first_groups=3)
        self.layer3 = self._stage(480, 960, 4, first_groups=3)
        self.linear = nn.Linear(960, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, num_blocks: int, first_groups: int) -> nn.Sequential:
        first = BottleneckV1(in_channels, channels - in_channels, 2, 3, first_groups)
        return nn.Sequential(first, *(BottleneckV1(channels, channels, 1, 3, 3) for _ in range(num_blocks - 1)))

    def declared_taps(self) -> dict[str, Tap]:
        last = {1: "layer1.3", 2: "layer2.7", 3: "layer3.3"}
        return {
            "stem": Tap("relu"),
            **{f"stage{k}": Tap(f"layer{k}") for k in last},
            "map": Tap("layer3"),
            "pooled": Tap("linear", "input"),
            "logits": Tap("linear"),
            **{f"stage{k}:pre": Tap(f"{block}.relu3", "input", norm=f"{block}.bn3") for k, block in last.items()},
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, in_channels, H, W)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class BasicBlockV2(nn.Module):
    """Keep half of the channels, transform the other half, and shuffle all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to the same shape."""
        passing, y = x.chunk(2, 1)
        y = self.bn3(self.conv3(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(y)))))))
        # The passing half comes out of a ReLU: a second one does not change it, and makes the pre-activation one tensor
        shuffled: Tensor = self.shuffle(self.relu2(torch.cat([passing, y], 1)))
        return shuffled


class DownBlockV2(nn.Module):
    """Halve the map in two branches that give half of the output channels each, and shuffle all."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / 2, W / 2)."""
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.relu(self.bn3(self.conv3(x)))
        right = self.bn5(self.conv5(self.bn4(self.conv4(right))))
        shuffled: Tensor = self.shuffle(self.relu(torch.cat([left, right], 1)))
        return shuffled


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 1x: stages of 116, 232 and 464 channels, for small images of any size.

    A stage's ``:pre`` is its last block before ReLU and before the shuffle: its channels are in another order than the
    stage's, and the first half is activated already. No single batch norm precedes it.

    Args:
        num_classes: Width of the logits.
        in_channels: Channels of the image.
    """

    def __init__(self, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu1 = nn.ReLU()
        self.layer1 = self._stage(24, 116, 3)
        self.layer2 = self._stage(116, 232, 7)
        self.layer3 = self._stage(232, 464, 3)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, num_blocks: int) -> nn.Sequential:
        return nn.Sequential(DownBlockV2(in_channels, channels), *(BasicBlockV2(channels) for _ in range(num_blocks)))

    def declared_taps(self) -> dict[str, Tap]:
        last = {1: "layer1.3", 2: "layer2.7", 3: "layer3.3"}
        return {
            "stem": Tap("relu1"),
            **{f"stage{k}": Tap(f"layer{k}") for k in last},
            "map": Tap("relu2"),
            "pooled": Tap("linear", "input"),
            "logits": Tap("linear"),
            **{f"stage{k}:pre": Tap(f"{block}.relu2", "input") for k, block in last.items()},
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, in_channels, H, W)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
