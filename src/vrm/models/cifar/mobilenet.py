"""MobileNetV2 at half width (Sandler et al., CVPR 2018), as the KD literature runs it on 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

from vrm.models.cifar.initialisation import kaiming_fan_out
from vrm.models.taps import Tap

# Expansion, channels at full width, blocks, stride of the first block; at 24 channels it is 1 (2 in the paper).
_SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, and project linearly, with no ReLU at the end."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / stride, W / stride), signed."""
        y: Tensor = self.conv(x)
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """MobileNetV2 of half width with strides for small images of any size.

    Stages are linear bottlenecks, signed, with no ReLU after them: there are no ``:pre`` taps.

    Args:
        num_classes: Width of the logits.
        in_channels: Channels of the image.
    """

    def __init__(self, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(in_channels, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential()
        width = 16
        for expansion, full_channels, num_blocks, stride in _SETTINGS:
            channels = full_channels // 2
            self.blocks.append(
                nn.Sequential(
                    InvertedResidual(width, channels, stride, expansion),
                    *(InvertedResidual(channels, channels, 1, expansion) for _ in range(num_blocks - 1)),
                )
            )
            width = channels
        self.conv2 = nn.Sequential(nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        kaiming_fan_out(self, linear_std=0.01)

    def declared_taps(self) -> dict[str, Tap]:
        return {
            "stem": Tap("conv1"),
            **{f"stage{k}": Tap(f"blocks.{block}") for k, block in enumerate((1, 2, 4, 6), start=1)},
            "map": Tap("conv2"),
            "pooled": Tap("classifier.0", "input"),
            "logits": Tap("classifier.0"),
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, in_channels, H, W)."""
        x = self.conv2(self.blocks(self.conv1(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
