"""The random steps that views are made of: crops, flips, RandAugment, Cutout, erasing.

A step (:class:`Transform`) takes uint8 images (B, C, H, W) and the :class:`Draws` of their view, and returns uint8
images. Its fields are its whole configuration. All random numbers come from :mod:`vrm.randomness`, keyed by the sample.

Shapes: B batch, C channels, H height, W width, A attempts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from vrm import randomness
from vrm.data.views import geometry, pixels
from vrm.data.views.randaugment import apply_operations


@dataclass(frozen=True)
class Draws:
    """The random numbers of one view of the samples of a batch.

    ``key`` (B,): 64 random bits for each sample. ``drawn``: uniform numbers (count, B) drawn already, by purpose.
    """

    seed: int
    key: Tensor
    drawn: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def for_view(cls, index: Tensor, *, epoch: int | Tensor, view: int, seed: int) -> Draws:
        """Return the draws of view number ``view`` (0 is the real one) of the samples ``index`` (B,)."""
        return cls(seed, randomness.bits(seed, "view", epoch, view, index))

    @classmethod
    def for_views(
        cls, index: Tensor, *, epoch: int | Tensor, seed: int, steps: Sequence[Sequence[Transform]]
    ) -> tuple[Draws, ...]:
        """Return the draws of views 0, 1, .., with all uniform numbers that their ``steps`` use drawn at once.

        Each number is the one that :meth:`for_view` would draw; on a GPU this takes a tenth of the kernels.
        """
        counts: dict[tuple[int, str], int] = {}
        for view, transforms in enumerate(steps):
            for purpose, count in (transform.uniforms for transform in transforms):
                counts[view, purpose] = max(count, counts.get((view, purpose), 0))
        view_V1 = torch.arange(len(steps), device=index.device)[:, None]
        key_VB = randomness.bits(seed, "view", epoch, view_V1, index)
        drawn: list[dict[str, Tensor]] = [{} for _ in steps]
        if counts:
            rows = [(view, purpose, number) for (view, purpose), count in counts.items() for number in range(count)]
            views, purposes, numbers = zip(*rows, strict=True)
            view_R, number_R = (pixels.constant(each, torch.int64, index.device) for each in (views, numbers))
            names = tuple(f"view: {purpose}" for purpose in purposes)
            uniform_RB = randomness.uniform(seed, names, key_VB[view_R], number_R[:, None])
            parts = torch.split(uniform_RB, list(counts.values()))
            for (view, purpose), part in zip(counts, parts, strict=True):
                drawn[view][purpose] = part
        return tuple(cls(seed, key_B, numbers) for key_B, numbers in zip(key_VB, drawn, strict=True))

    def at(self, rows: Tensor) -> Draws:
        """Return the draws of only these rows of the batch."""
        return Draws(self.seed, self.key[rows])

    def uniform(self, purpose: str, count: int) -> Tensor:
        """Return ``count`` uniform float64 in [0, 1) for every sample, (count, B)."""
        if purpose in self.drawn:
            return self.drawn[purpose][:count]
        return randomness.uniform(self.seed, f"view: {purpose}", self.key, self._numbers(count))

    def normal(self, purpose: str, count: int) -> Tensor:
        """Return ``count`` standard normal float64 for every sample, (count, B)."""
        return randomness.normal(self.seed, f"view: {purpose}", self.key, self._numbers(count))

    def _numbers(self, count: int) -> Tensor:
        return torch.arange(count, device=self.key.device)[:, None]


class Transform(Protocol):
    """One random step of a view, from uint8 (B, C, H, W) to uint8 (B, C, h, w)."""

    @property
    def uniforms(self) -> tuple[str, int]:
        """The purpose of the uniform numbers that the step draws, and how many it draws for a sample."""

    def __call__(self, images: Tensor, draws: Draws) -> Tensor: ...


@dataclass(frozen=True)
class RandomCrop:
    """Pad with black on every side and cut the original size out at a uniformly drawn place."""

    padding: int

    @property
    def uniforms(self) -> tuple[str, int]:
        """Top and left."""
        return "crop", 2

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        top, left = (draws.uniform(*self.uniforms) * (2 * self.padding + 1)).long()
        return geometry.crop(images, top, left, padding=self.padding)


@dataclass(frozen=True)
class RandomFlip:
    """Mirror left and right with this probability."""

    probability: float = 0.5

    @property
    def uniforms(self) -> tuple[str, int]:
        """Whether to flip."""
        return "flip", 1

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        return geometry.flip(images, draws.uniform(*self.uniforms)[0] < self.probability)


def apply_to_floats(step: Transform, images: Tensor, draws: Draws) -> Tensor:
    """Apply a step to float32 images (B, C, H, W).

    Steps that move or resize pixels work on the values themselves. All others are defined on bytes: they see each image
    as 256 levels from its smallest value, or 0 if that is smaller, to its largest, or 1 if that is larger.
    """
    if isinstance(step, RandomResizedCrop):
        return step(images, draws)
    if isinstance(step, RandomCrop | RandomFlip):  # the bits of a float are moved as those of an integer
        return step(images.view(torch.int32), draws).view(torch.float32)
    low = images.amin((1, 2, 3), keepdim=True).clamp(max=0)
    unit = (images.amax((1, 2, 3), keepdim=True).clamp(min=1) - low) / 255
    return step(((images - low) / unit).round().to(torch.uint8), draws) * unit + low


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

    @property
    def uniforms(self) -> tuple[str, int]:
        """For each operation, its number and its argument."""
        return "randaugment", 2 * self.num_ops

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        ends = zip(*TORCHSSL.values(), strict=True)
        lows, highs = (pixels.constant(end, torch.float64, images.device) for end in ends)
        draw = draws.uniform(*self.uniforms)
        for choice, amount in zip((draw[::2] * len(TORCHSSL)).long(), draw[1::2], strict=True):
            low, high = lows[choice], highs[choice]
            images = apply_operations(images, list(TORCHSSL), choice, low + (high - low) * amount)
        return images


@dataclass(frozen=True)
class Cutout:
    """TorchSSL's Cutout: a square of uniform side, 0 .. ``max_side`` of the width, about a uniform centre."""

    max_side: float = 0.5
    fill: tuple[int, ...] = (125, 123, 114)

    @property
    def uniforms(self) -> tuple[str, int]:
        """Side, x and y."""
        return "cutout", 3

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        side, x, y = draws.uniform(*self.uniforms)
        height, width = images.shape[2:]
        return pixels.cutout(images, side * self.max_side, x * width, y * height, fill=self.fill)


TIMM = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
)
"""The operations of timm's RandAugment; timm calls the last two TranslateXRel and TranslateYRel."""


@dataclass(frozen=True)
class TimmRandAugment:
    """timm's ``rand-m9-mstd0.5-inc1``: each of ``num_ops`` operations is applied with probability one half.

    The magnitude is normal, clipped to 0 .. 10, and means the stronger change the larger it is. Maps fill with the
    mean colour of ImageNet and interpolate by ``resample`` (``"random"``: bilinear or bicubic, each half the time).

    One deviation: at magnitude 10 timm asks Posterize to keep 0 bits, which recent Pillow refuses; here 1 is kept.
    """

    num_ops: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    probability: float = 0.5
    resample: Literal["nearest", "bilinear", "bicubic", "random"] = "bicubic"
    fill: tuple[int, ...] = (124, 116, 104)

    @property
    def uniforms(self) -> tuple[str, int]:
        """For each operation which, whether, its sign, and bicubic or not."""
        return "timm randaugment", 4 * self.num_ops

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        draw = draws.uniform(*self.uniforms)
        # Rounded to 2^-20: devices may differ in the last bits of a normal number, and must not in a pixel.
        noise = (draws.normal("timm magnitude", self.num_ops) * 2.0**20).round() * 2.0**-20
        operations = [*TIMM, "Identity"]
        for number in range(self.num_ops):
            operation, applied, negated, cubic = draw[4 * number : 4 * number + 4]
            level = (self.magnitude + self.magnitude_std * noise[number]).clamp(0, 10)
            choice = (operation * len(TIMM)).long()
            argument = timm_arguments(level, negated > 0.5).gather(0, choice[None])[0]
            choice = torch.where(applied > self.probability, len(TIMM), choice)
            if self.resample != "random":
                images = apply_operations(images, operations, choice, argument, resample=self.resample, fill=self.fill)
                continue
            linear = torch.where(cubic < 0.5, choice, len(TIMM))
            images = apply_operations(images, operations, linear, argument, resample="bilinear", fill=self.fill)
            cubic = torch.where(cubic < 0.5, len(TIMM), choice)
            images = apply_operations(images, operations, cubic, argument, resample="bicubic", fill=self.fill)
        return images


def timm_arguments(level_B: Tensor, negated_B: Tensor) -> Tensor:
    """Return the argument (15, B) of every operation in ``TIMM`` at these levels, 0 .. 10, as timm's "increasing"."""
    fraction = level_B / pixels.constant(
        (10.0,), level_B.dtype, level_B.device
    )  # not / 10, which multiplies by the rounded 1 / 10
    sign = torch.where(negated_B, -1.0, 1.0)
    enhance = (1.0 + sign * (fraction * 0.9)).clamp(min=0.1)
    none = torch.zeros_like(fraction)
    arguments = {
        "AutoContrast": none,
        "Equalize": none,
        "Invert": none,
        "Rotate": sign * (fraction * 30),
        "Posterize": 4 - (fraction * 4).trunc(),
        "Solarize": 256 - (fraction * 256).trunc(),
        "SolarizeAdd": (fraction * 110).trunc(),
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), enhance),
        **dict.fromkeys(("ShearX", "ShearY"), sign * (fraction * 0.3)),
        **dict.fromkeys(("TranslateX", "TranslateY"), sign * (fraction * 0.45)),
    }
    return torch.stack([arguments[name] for name in TIMM])


_ATTEMPTS = 10
"""Boxes drawn for a crop or an erasure; the first that fits is used, as in torchvision and timm."""


def _first_that_fits(fits_AB: Tensor, *values_AB: Tensor) -> tuple[Tensor, ...]:
    """Return for each sample the values (B,) of the first attempt that fits, or of the first attempt if none does."""
    attempt = fits_AB.int().argmax(0, keepdim=True)
    return tuple(value.gather(0, attempt)[0] for value in values_AB)


@dataclass(frozen=True)
class RandomErasing:
    """timm's RandomErasing, on bytes: a box of uniform area and log-uniform aspect gets new content.

    ``mode``: ``"const"`` fills with the mean colour, ``"rand"`` with one normal colour per box, ``"pixel"`` with one
    per pixel, of this ``mean`` and ``std`` (of values in 0 .. 1). timm erases after normalisation; here the noise is
    rounded to bytes and clipped to 0 .. 255.
    """

    probability: float = 0.25
    min_area: float = 0.02
    max_area: float = 1 / 3
    min_aspect: float = 0.3
    mode: Literal["const", "rand", "pixel"] = "pixel"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def uniforms(self) -> tuple[str, int]:
        """Whether to erase, top and left, and of each attempt area and aspect."""
        return "erasing", 3 + 2 * _ATTEMPTS

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        top, left, height, width = self.box(images, draws)
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return self._erase(images, draws, top, left, height, width)
        # Drawing a normal number for every pixel is slow: on the CPU it is done only for the images that are erased.
        rows = (height > 0).nonzero().squeeze(1)
        erased = images.clone()
        erased[rows] = self._erase(images[rows], draws.at(rows), top[rows], left[rows], height[rows], width[rows])
        return erased

    def box(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return top, left, height and width (B,) of the erased box; height is 0 where nothing is erased."""
        rows, columns = images.shape[2:]
        draw = draws.uniform(*self.uniforms)
        area = (self.min_area + (self.max_area - self.min_area) * draw[3 : 3 + _ATTEMPTS]) * (rows * columns)
        log_aspect = math.log(self.min_aspect)
        aspect = (log_aspect - 2 * log_aspect * draw[3 + _ATTEMPTS :]).exp()
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (width < columns) & (height < rows)
        erased = fits.any(0) & (draw[0] <= self.probability)
        height, width = _first_that_fits(fits, height, width)
        height, width = torch.where(erased, height, 0.0), torch.where(erased, width, 0.0)
        top, left = (draw[1] * (rows - height + 1)).floor(), (draw[2] * (columns - width + 1)).floor()
        return top, left, height, width

    def _erase(self, images: Tensor, draws: Draws, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
        batch, channels, rows, columns = images.shape
        mean, std = (
            pixels.constant(value, torch.float64, images.device).view(1, -1, 1, 1) for value in (self.mean, self.std)
        )
        shape = {"const": (0, 0), "rand": (1, 1), "pixel": (rows, columns)}[self.mode]
        noise = draws.normal("erasing content", channels * math.prod(shape)).T.reshape(batch, channels, *shape)
        content = mean + std * noise if self.mode != "const" else mean
        mask = pixels.rectangle_mask(images, top, left, top + height - 1, left + width - 1)
        return pixels.overwrite(images, mask, (content * 255).round().clamp(0, 255).to(torch.uint8))


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cut out a box of uniform area (a fraction of the image) and log-uniform aspect, and resize it to a square.

    As in torchvision and timm: of ten attempts the first that fits, else the largest central box of allowed aspect.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resample: Literal["bilinear", "bicubic"] = "bilinear"

    @property
    def uniforms(self) -> tuple[str, int]:
        """Top and left, and of each attempt area and aspect."""
        return "resized crop", 2 + 2 * _ATTEMPTS

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        size, box = (self.size, self.size), self.box(images.shape[2], images.shape[3], draws)
        return geometry.resized_crop(images, *box, size=size, resample=self.resample)

    def box(self, rows: int | Tensor, columns: int | Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return top, left, height and width (B,) of the box; ``rows`` and ``columns`` are numbers or (B,) each."""
        draw = draws.uniform(*self.uniforms)
        rows, columns = (
            side.to(draw) if isinstance(side, Tensor) else torch.full_like(draw[0], side) for side in (rows, columns)
        )
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * draw[2 : 2 + _ATTEMPTS]) * (rows * columns)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = (low + (high - low) * draw[2 + _ATTEMPTS :]).exp()
        width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (width > 0) & (width <= columns) & (height > 0) & (height <= rows)
        height, width = _first_that_fits(fits, height, width)
        top, left = (draw[0] * (rows - height + 1)).floor(), (draw[1] * (columns - width + 1)).floor()

        whole_width = torch.minimum(columns, (rows * self.ratio[1]).round())
        whole_height = torch.minimum(rows, (columns / self.ratio[0]).round())
        whole_top, whole_left = ((rows - whole_height) / 2).floor(), ((columns - whole_width) / 2).floor()
        any_fits = fits.any(0)
        top, left, height, width = (
            torch.where(any_fits, drawn, central)
            for drawn, central in (
                (top, whole_top),
                (left, whole_left),
                (height, whole_height),
                (width, whole_width),
            )
        )
        return top, left, height, width


@dataclass(frozen=True)
class CentralCrop:
    """What evaluation sees where training uses resized crops: shorter side to ``scale * size``, then the centre.

    By default a central 224 is cut out of 256 pixels, as in the literature of ImageNet. With ``scale=1`` a square image
    is resized as a whole. Images of exactly this size stay as they are.
    """

    size: int = 224
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    scale: float = 8 / 7

    def __call__(self, images: Tensor) -> Tensor:
        """Crop images (B, C, H, W) to (B, C, size, size)."""
        rows, columns = images.shape[2:]
        height, width = self.scaled(rows, columns)
        if (height, width) != (rows, columns):
            box = (torch.full((len(images),), side, device=images.device) for side in (0, 0, rows, columns))
            images = geometry.resized_crop(images, *box, size=(height, width), resample=self.resample)
        top, left = self.corner(height, width)
        return images[:, :, top : top + self.size, left : left + self.size].contiguous()

    def scaled(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the height and width to which an image is resized before its centre is cut out."""
        if rows == columns == self.size:
            return rows, columns
        shorter = round(self.size * self.scale)
        height, width = (max(shorter, round(side * shorter / min(rows, columns))) for side in (rows, columns))
        return height, width

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """Return top and left of the centre in an image of this size."""
        return (height - self.size) // 2, (width - self.size) // 2


@dataclass(frozen=True)
class RandomAffine:
    """Rotate about the centre by up to ``degrees`` and shear by up to ``shear``, both ways; bilinear, black outside."""

    degrees: float
    shear: float

    @property
    def uniforms(self) -> tuple[str, int]:
        """Angle and shear."""
        return "affine", 2

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        angle, slant = 2 * draws.uniform(*self.uniforms) - 1
        height, width = images.shape[2:]
        a, b, _, d, e, _ = geometry.rotation(angle * self.degrees, height, width).unbind(1)
        slant = slant * self.shear
        b, e = b + a * slant, e + d * slant
        c, f = width / 2 - a * width / 2 - b * height / 2, height / 2 - d * width / 2 - e * height / 2
        return geometry.affine(images, torch.stack([a, b, c, d, e, f], dim=1), resample="bilinear")
