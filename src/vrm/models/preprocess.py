"""From views to the normalised floats, of the size, that a network was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LUMA = (19595, 38470, 7471)
"""Weights of R, G, B in the grey of ITU-R 601-2 (0.299, 0.587, 0.114), in parts of 2^16 as in Pillow."""


class Preprocess(nn.Module):
    """Normalise images with the statistics, and resize them to the input size, of one network.

    Student and teacher each have their own. Nothing here enters a state dict. With one mean and one standard deviation
    the network takes one channel, and images of three become the grey of ``Image.convert("L")`` first.

    Args:
        mean: Mean of each channel, for values in [0, 1].
        std: Standard deviation of each channel, for values in [0, 1].
        size: (height, width) to which views of another size are resized (bilinear); ``None`` keeps theirs.
        antialias: Average over all pixels where an image shrinks, as Pillow does; without it, interpolate between the
            nearest four, which takes every n-th pixel where the size shrinks n times (n odd).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None = None,
        *,
        antialias: bool = True,
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(
                f"mean and std must have one entry a channel, and std must be positive; got mean {mean}, std {std}"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)
        self.size = size
        self.antialias = antialias

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(images - mean) / std`` of images (B, channels, H, W), in the dtype of ``mean``.

        Bytes are divided by 255 first; float32 images are taken as they are.
        """
        if images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"views must be uint8 or float32 batches, got {images.dtype}; pass the images as stored")
        if len(self.mean) == 1 and images.shape[1] == 3:
            images = _grey(images)
        if images.shape[1] != len(self.mean):
            raise ValueError(
                f"the views have {images.shape[1]} channels, the normalisation {len(self.mean)}; "
                "give one mean and std for each channel"
            )
        x = images.to(self.mean.dtype)
        x = x / 255 if images.dtype == torch.uint8 else x
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=self.antialias)
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Return the settings, for ``print``."""
        text = f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}, size={self.size}"
        return text if self.size is None else f"{text}, antialias={self.antialias}"


def _grey(images: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W) of images (B, 3, H, W); of bytes in whole levels, as Pillow's."""
    red, green, blue = (channel.float() * weight for channel, weight in zip(images.unbind(1), LUMA, strict=True))
    if images.dtype != torch.uint8:
        return (red + green + blue)[:, None] / 2**16
    # All sums are whole numbers below 2^24 and exact in float32.
    return (red + green + blue + 2**15).mul_(2.0**-16).floor_()[:, None].to(torch.uint8)
