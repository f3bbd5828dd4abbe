"""Views: what the networks see of an image, as a pure function of (seed, epoch, sample, view).

A :class:`ViewPolicy` makes the real view and any number of virtual views of a batch. Every random choice is drawn with
:mod:`vrm.randomness` from the sample's own index, so neither the batch a sample is in, nor the number of views, nor the
device changes a pixel; a teacher's outputs can be cached. Images go in and come out as uint8: normalisation belongs
to each network.

>>> policy = view_policy("cifar")
>>> real, virtual = policy(images, index, epoch=1, seed=0, num_virtual=1)

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vrm import randomness
from vrm.data import geometry, pixels
from vrm.data.randaugment import apply_operations


@dataclass(frozen=True)
class Draws:
    """The random numbers of one view of the samples ``index`` (B,), at one epoch."""

    seed: int
    epoch: int | Tensor
    view: int
    index: Tensor

    def uniform(self, purpose: str, count: int) -> Tensor:
        """``count`` uniform float64 in [0, 1) for every sample, (count, B)."""
        number = torch.arange(count, device=self.index.device)[:, None]
        return randomness.uniform(self.seed, f"view: {purpose}", self.epoch, self.view, self.index, number)


class Transform(Protocol):
    """One random step of a view: uint8 (B, C, H, W) to uint8 (B, C, h, w)."""

    def __call__(self, images: Tensor, draws: Draws) -> Tensor: ...


@dataclass(frozen=True)
class RandomCrop:
    """Pad with black on every side and cut the original size out at a uniform place."""

    padding: int

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        top, left = (draws.uniform("crop", 2) * (2 * self.padding + 1)).long()
        return geometry.crop(images, top, left, padding=self.padding)


@dataclass(frozen=True)
class RandomFlip:
    """Mirror left and right with this probability."""

    probability: float = 0.5

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        return geometry.flip(images, draws.uniform("flip", 1)[0] < self.probability)


TORCHSSL: Mapping[str, tuple[float, float]] = {
    "AutoContrast": (0, 1),
    "Brightness": (0.05, 0.95),
    "Color": (0.05, 0.95),
    "Contrast": (0.05, 0.95),
    "Equalize": (0, 1),
    "Identity": (0, 1),
    "Posterize": (4, 8),
    "Rotate": (-30, 30),
    "Sharpness": (0.05, 0.95),
    "ShearX": (-0.3, 0.3),
    "ShearY": (-0.3, 0.3),
    "Solarize": (0, 256),
    "TranslateX": (-0.3, 0.3),
    "TranslateY": (-0.3, 0.3),
}
"""The operations of TorchSSL's RandAugment and the range of each one's argument, as released."""


@dataclass(frozen=True)
class RandAugment:
    """TorchSSL's RandAugment: operations drawn with replacement, each applied with an argument uniform in its range."""

    num_ops: int = 2

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        ranges = torch.tensor(list(TORCHSSL.values()), dtype=torch.float64, device=images.device)
        draw = draws.uniform("randaugment", 2 * self.num_ops)
        for choice, amount in zip((draw[::2] * len(TORCHSSL)).long(), draw[1::2], strict=True):
            low, high = ranges[choice].unbind(1)
            images = apply_operations(images, list(TORCHSSL), choice, low + (high - low) * amount)
        return images


@dataclass(frozen=True)
class Cutout:
    """TorchSSL's Cutout: a square with side uniform in 0 .. ``max_side`` of the width, its centre uniform."""

    max_side: float = 0.5
    fill: tuple[int, ...] = (125, 123, 114)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        side, x, y = draws.uniform("cutout", 3)
        height, width = images.shape[2:]
        return pixels.cutout(images, side * self.max_side, x * width, y * height, fill=self.fill)


@dataclass(frozen=True)
class RandomAffine:
    """Rotate about the centre by up to ``degrees`` and shear by up to ``shear``, both ways (bilinear, black outside)."""

    degrees: float
    shear: float

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        angle, slant = 2 * draws.uniform("affine", 2) - 1
        height, width = images.shape[2:]
        a, b, _, d, e, _ = geometry.rotation(angle * self.degrees, height, width).unbind(1)
        slant = slant * self.shear
        b, e = b + a * slant, e + d * slant
        c, f = width / 2 - a * width / 2 - b * height / 2, height / 2 - d * width / 2 - e * height / 2
        return geometry.affine(images, torch.stack([a, b, c, d, e, f], dim=1), resample="bilinear")


@dataclass(frozen=True)
class ViewPolicy:
    """Makes views: the steps of the real view, and those of every virtual view."""

    name: str
    real: tuple[Transform, ...]
    virtual: tuple[Transform, ...]

    def __call__(
        self, images: Tensor, index: Tensor, *, epoch: int | Tensor, seed: int, num_virtual: int
    ) -> tuple[Tensor, ...]:
        """The real view, then ``num_virtual`` virtual views, uint8 (B, C, h, w) each.

        Args:
            images: uint8 (B, C, H, W), on any device.
            index: integer (B,), which samples of the data set these are, on the same device.
            epoch: an integer, or an integer scalar on the device.
            seed: the run's ``data.seed``.
            num_virtual: how many virtual views.
        """
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"views are made of uint8 images (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if index.shape != images.shape[:1]:
            raise ValueError(f"one index for each of the {len(images)} images is needed, got {tuple(index.shape)}")
        views = []
        for view in range(1 + num_virtual):
            draws, made = Draws(seed, epoch, view, index), images
            for transform in self.virtual if view else self.real:
                made = transform(made, draws)
            views.append(made)
        return tuple(views)

    def describe(self) -> dict[str, Any]:
        """Everything that decides the pixels beside seed, epoch, sample and view, as JSON-able values."""
        steps = {
            kind: [{"transform": type(step).__name__, **asdict(step)} for step in transforms]  # type: ignore[call-overload]
            for kind, transforms in (("real", self.real), ("virtual", self.virtual))
        }
        return {"name": self.name, **steps}


def cifar(*, padding: int = 4, num_ops: int = 2, max_cutout: float = 0.5) -> ViewPolicy:
    """CIFAR in the VRM paper: padded crop and flip; virtual views add TorchSSL's RandAugment and Cutout."""
    real = (RandomCrop(padding), RandomFlip())
    return ViewPolicy("cifar", real, (*real, RandAugment(num_ops), Cutout(max_cutout)))


def digits(*, padding: int = 1, degrees: float = 15.0, shear: float = 0.2) -> ViewPolicy:
    """Small digits: a padded crop and no flip; virtual views add a small rotation and shear."""
    return ViewPolicy("digits", (RandomCrop(padding),), (RandomCrop(padding), RandomAffine(degrees, shear)))


def none() -> ViewPolicy:
    """The images as they are, for every view."""
    return ViewPolicy("none", (), ())


POLICIES: dict[str, Callable[..., ViewPolicy]] = {"cifar": cifar, "digits": digits, "none": none}
"""View policies by name: functions whose keyword arguments are the options."""


def view_policy(name: str, **options: Any) -> ViewPolicy:
    """The policy of this name with these options; ``ValueError`` names the near ones for what is unknown."""
    if name not in POLICIES:
        raise ValueError(f"unknown view policy {name!r}; {_nearest(name, POLICIES)}")
    known = inspect.signature(POLICIES[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"view policy {name!r} has no option {option!r}; {_nearest(option, known)}")
    return POLICIES[name](**options)


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
