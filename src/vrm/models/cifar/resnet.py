"""ResNets of the CIFAR experiments: depth 6n + 2, three stages of basic blocks (He et al., CVPR 2016, section 4.2).

Parameter names follow the KD literature's checkpoints; shortcuts that change the shape are 1x1 convolutions with batch
norm, as there (the paper pads with zeros).
"""

from __future__ import annotations

from torch import Tensor, nn

from vrm.models.cifar.initialisation import kaiming_fan_out
from vrm.models.taps import Tap


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the last ReLU, ``relu2``, follows the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        activated: Tensor = self.relu2(self.bn2(self.conv2(y)) + self.downsample(x))
        return activated


class ResNet(nn.Module):
    """A ResNet of ``6n + 2`` layers for small images of any size.

    Args:
        depth: Number of layers.
        widths: Channels of the stem and of the three stages.
        num_classes: Width of the logits.
        in_channels: Channels of the image.
    """

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int], *, num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.blocks_per_stage = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = self._stage(widths[0], widths[1], 1)
        self.layer2 = self._stage(widths[1], widths[2], 2)
        self.layer3 = self._stage(widths[2], widths[3], 2)
        self.fc = nn.Linear(widths[3], num_classes)
        kaiming_fan_out(self)

    def _stage(self, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(self.blocks_per_stage - 1)))

    def declared_taps(self) -> dict[str, Tap]:
        last = {k: f"layer{k}.{self.blocks_per_stage - 1}" for k in (1, 2, 3)}
        return {
            "stem": Tap("relu"),
            **{f"stage{k}": Tap(f"layer{k}") for k in last},
            "map": Tap("layer3"),
            "pooled": Tap("fc", "input"),
            "logits": Tap("fc"),
            **{f"stage{k}:pre": Tap(f"{block}.relu2", "input", norm=f"{block}.bn2") for k, block in last.items()},
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, in_channels, H, W)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
