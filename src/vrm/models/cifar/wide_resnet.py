"""Wide ResNets: pre-activation blocks, depth 6n + 4 (Zagoruyko & Komodakis, BMVC 2016), named as in the literature."""

from __future__ import annotations

from torch import Tensor, nn

from vrm.models.cifar.initialisation import kaiming_fan_out
from vrm.models.taps import Tap


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each 3x3 convolution; a convolutional shortcut starts after the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.convShortcut = None
        if in_channels != channels:
            self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / stride, W / stride), signed."""
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        total: Tensor = y + (x if self.convShortcut is None else self.convShortcut(activated))
        return total


class Stage(nn.Module):
    """Blocks of one scale, under the name ``layer``."""

    def __init__(self, num_blocks: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        first = PreActivationBlock(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *(PreActivationBlock(channels, channels, 1) for _ in range(num_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""
        y: Tensor = self.layer(x)
        return y


class WideResNet(nn.Module):
    """A wide ResNet of ``6n + 4`` layers for small images of any size.

    Stages are the raw, signed residual stream. Their ``:pre`` is what the next batch norm makes of it, read in the
    ordinary pass: the released distillation code calls that batch norm a second time, which updates its running
    statistics twice a step.

    Args:
        depth: Number of layers.
        width: Factor on the channels 16, 32, 64 of the three stages.
        num_classes: Width of the logits.
        in_channels: Channels of the image.
    """

    def __init__(self, depth: int, width: int, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        num_blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(num_blocks, 16, 16 * width, 1)
        self.block2 = Stage(num_blocks, 16 * width, 32 * width, 2)
        self.block3 = Stage(num_blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, num_classes)
        kaiming_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def declared_taps(self) -> dict[str, Tap]:
        next_norm = {1: "block2.layer.0.bn1", 2: "block3.layer.0.bn1", 3: "bn1"}
        return {
            "stem": Tap("conv1"),
            **{f"stage{k}": Tap(f"block{k}") for k in next_norm},
            "map": Tap("relu"),
            "pooled": Tap("fc", "input"),
            "logits": Tap("fc"),
            **{f"stage{k}:pre": Tap(norm, norm=norm) for k, norm in next_norm.items()},
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, in_channels, H, W)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
