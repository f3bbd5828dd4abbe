"""What the input of a network is, as far as the network itself or its library tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from vrm.models.preprocess import LUMA
from vrm.models.taps import accepts

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's channels, by which most published networks normalise."""


class LibraryInput(NamedTuple):
    """The input that a library's published weights of a network were trained with."""

    origin: str
    """Whose word it is, after "of"."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    """(height, width); ``None`` if the library does not tell."""


def library_input(network: nn.Module, name: str = "") -> LibraryInput | None:
    """Return what timm or torchvision says of the input of one of their networks; None for any other.

    ``name`` is the one that :func:`vrm.models.create` was given, if it made the network. Of a torchvision network
    without a name the mean and standard deviation are ImageNet's, which nearly all of its weights have.
    """
    known = getattr(network, "pretrained_cfg", None)
    if isinstance(known, dict) and {"mean", "std", "input_size"} <= known.keys():
        built_for = getattr(getattr(network, "patch_embed", None), "img_size", None)  # the option img_size counts
        height, width = built_for if isinstance(built_for, tuple) else known["input_size"][1:]
        return LibraryInput("timm's pretrained_cfg", tuple(known["mean"]), tuple(known["std"]), (height, width))
    if name.startswith("torchvision:"):
        from torchvision.models import get_model_weights

        transforms = next(iter(get_model_weights(name.partition(":")[2]))).transforms()
        side = getattr(network, "image_size", None) or transforms.crop_size[0]  # ViTs keep their option
        size = (side, side)
        return LibraryInput("torchvision's weights", tuple(transforms.mean), tuple(transforms.std), size)
    if type(network).__module__.startswith("torchvision.models."):
        return LibraryInput("torchvision's weights", *IMAGENET, None)
    return None


def input_channels(network: nn.Module, input_size: tuple[int, int]) -> int:
    """Return 1 for a network that takes grey images (B, 1, height, width) and no coloured ones, else 3.

    A network whose first convolution takes more than one channel takes colour; any other is run on both.
    """
    convolution = next((part for part in network.modules() if isinstance(part, nn.Conv2d)), None)
    if convolution is not None and convolution.in_channels != 1:
        return 3
    colour, grey = (accepts(network, input_size=input_size, in_channels=channels) for channels in (3, 1))
    return 1 if grey and not colour else 3


def grey_statistics(values: Sequence[float]) -> tuple[float, ...]:
    """Return the mean, or the standard deviation, of the grey of images from those of the channels R, G, B.

    Exact for a mean, and for a standard deviation where the channels vary together, as in grey images; elsewhere it is
    slightly too large.
    """
    return (float(torch.tensor(LUMA, dtype=torch.float64) @ torch.tensor(values, dtype=torch.float64)) / 2**16,)
