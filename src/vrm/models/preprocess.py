"""From views to the normalised floats, of the size, that a network was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Preprocess(nn.Module):
    """Normalise images with the statistics, and resize them to the input size, of one network.

    Student and teacher each have their own. Nothing here enters a state dict.

    Args:
        mean: Mean of each channel, for values in [0, 1].
        std: Standard deviation of each channel, for values in [0, 1].
        size: (height, width) to which views of another size are resized (bilinear, antialiased); ``None`` keeps theirs.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: tuple[int, int] | None = None) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(
                f"mean and std must have one entry a channel, and std must be positive; got mean {mean}, std {std}"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(images - mean) / std`` of images (B, channels, H, W), in the dtype of ``mean``.

        Bytes are divided by 255 first; float32 images are taken as they are.
        """
        if images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"views must be uint8 or float32 batches, got {images.dtype}; pass the images as stored")
        if images.shape[1] != len(self.mean):
            raise ValueError(
                f"the views have {images.shape[1]} channels, the normalisation {len(self.mean)}; "
                "give one mean and std for each channel"
            )
        x = images.to(self.mean.dtype)
        x = x / 255 if images.dtype == torch.uint8 else x
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Return the settings, for ``print``."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}, size={self.size}"
