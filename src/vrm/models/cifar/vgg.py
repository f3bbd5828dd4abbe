"""VGG networks with batch norm and one linear layer (Simonyan & Zisserman, ICLR 2015), as in the KD literature."""

from __future__ import annotations

from torch import Tensor, nn

from vrm.models.cifar.initialisation import kaiming_fan_out
from vrm.models.taps import Tap

_CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def _block(in_channels: int, channels: int, num_convolutions: int) -> nn.Sequential:
    """Build convolutions with a batch norm after each and a ReLU between each two."""
    layers: list[nn.Module] = []
    for _ in range(num_convolutions):
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers[:-1])


class VGG(nn.Module):
    """A VGG for small images: five blocks, max pooling between the first four.

    As in the literature, the pooling between the last two blocks is skipped for 32x32 images and used for 64x64; here
    it is used from 64 pixels on. The smallest image is 8x8.

    Args:
        depth: 8, 11, 13, 16 or 19.
        num_classes: Width of the logits.
        in_channels: Channels of the image.
    """

    def __init__(self, depth: int, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        num = _CONVOLUTIONS[depth]
        self.block0, self.relu0 = _block(in_channels, 64, num[0]), nn.ReLU()
        self.block1, self.relu1 = _block(64, 128, num[1]), nn.ReLU()
        self.block2, self.relu2 = _block(128, 256, num[2]), nn.ReLU()
        self.block3, self.relu3 = _block(256, 512, num[3]), nn.ReLU()
        self.block4, self.relu4 = _block(512, 512, num[4]), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(512, num_classes)
        kaiming_fan_out(self, linear_std=0.01)

    def declared_taps(self) -> dict[str, Tap]:
        blocks = {1: self.block1, 2: self.block2, 3: self.block3, 4: self.block4}
        return {
            "stem": Tap("relu0"),
            **{f"stage{k}": Tap(f"relu{k}") for k in blocks},
            "map": Tap("relu4"),
            "pooled": Tap("classifier", "input"),
            "logits": Tap("classifier"),
            **{f"stage{k}:pre": Tap(f"relu{k}", "input", norm=f"block{k}.{len(b) - 1}") for k, b in blocks.items()},
        }

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, in_channels, H, W)."""
        size = min(x.shape[2:])
        if size < 8:
            raise ValueError(f"VGG needs images of at least 8x8, got {x.shape[2]}x{x.shape[3]}; enlarge them")
        x = self.relu0(self.block0(x))
        x = self.relu1(self.block1(self.pool(x)))
        x = self.relu2(self.block2(self.pool(x)))
        x = self.relu3(self.block3(self.pool(x)))
        x = self.relu4(self.block4(self.pool(x) if size >= 64 else x))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
