"""Operations that move pixels, batched with one argument per image, equal to PIL's pixel for pixel.

Images are uint8 (B, C, H, W) on any device; arguments are float64 or integers, one per image. An affine map
(B, 6) holds PIL's six numbers: output pixel (x, y) is read at ``(a x + b y + c, d x + e y + f)``, all at pixel centres.

Arithmetic follows Pillow's ``Geometry.c`` and ``Resample.c``: nearest neighbour in 16.16 fixed point, except for maps
that only scale and shift, which are computed in double precision, as are bilinear and bicubic.

Shapes: B batch, C channels, H height, W width, h and w the output's, N = H W pixels, M = h w.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.data.views import pixels

Resample = Literal["nearest", "bilinear", "bicubic"]

MAX_SIDE = 1 << 13
"""Longest side of an image for an affine map: up to it no coordinate reaches 2^15, where PIL leaves fixed point."""


def flip(images_BCHW: Tensor, flipped_B: Tensor) -> Tensor:
    """Mirror left and right the images for which ``flipped`` is true."""
    # XOR with the difference where an image is flipped: on the CPU several times faster than torch.where.
    changes = images_BCHW.flip(3).bitwise_xor_(images_BCHW).mul_(flipped_B.byte().view(-1, 1, 1, 1))
    return changes.bitwise_xor_(images_BCHW)


def crop(images_BCHW: Tensor, top_B: Tensor, left_B: Tensor, *, padding: int) -> Tensor:
    """Pad with ``padding`` black pixels on every side, then cut the original size out at (top, left) of that.

    ``top`` and ``left`` are in ``0 .. 2 * padding``.
    """
    batch, channels, height, width = images_BCHW.shape
    padded = F.pad(images_BCHW, (padding,) * 4).contiguous()
    side = padded.shape[3]
    # Every stretch of `width` bytes of the padded batch, overlapping: a row of a crop is one of them.
    stretches = padded.view(-1).as_strided((max(padded.numel() - width + 1, 0), width), (1, 1))
    plane = torch.arange(batch * channels, device=padded.device).view(batch, channels, 1)
    row = torch.arange(height, device=padded.device) + top_B.long().view(-1, 1, 1)
    start = (plane * padded.shape[2] + row) * side + left_B.long().view(-1, 1, 1)
    return stretches.index_select(0, start.flatten()).view_as(images_BCHW)


def rotation(degrees_B: Tensor, height: int, width: int) -> Tensor:
    """Return the map (B, 6) of ``Image.rotate``: counter-clockwise about the centre."""
    radians = torch.remainder(degrees_B, 360.0) * (-math.pi / 180.0)
    # PIL rounds to 15 decimals, which also absorbs the last bits in which libraries and devices differ.
    cos, sin = trig_2B = torch.stack([radians.cos(), radians.sin()]).round(decimals=15)
    # c = cos (-x) + sin (-y) + x, f = -sin (-x) + cos (-y) + y about the centre (x, y)
    x, y = width / 2.0, height / 2.0
    about = pixels.constant((-x, -y, -y, x), torch.float64, degrees_B.device).view(2, 2, 1)
    c, f = (about * trig_2B).sum(1) + pixels.constant((x, y), torch.float64, degrees_B.device)[:, None]
    return torch.stack([cos, sin, c, -sin, cos, f], dim=1)


def identity(value_B: Tensor) -> Tensor:
    """Return the map (B, 6) that changes nothing, with the dtype, device and number of these values."""
    return pixels.constant((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), value_B.dtype, value_B.device).expand(len(value_B), -1)


def affine(
    images_BCHW: Tensor, map_B6: Tensor, *, resample: Resample = "nearest", fill: tuple[int, ...] = (0,)
) -> Tensor:
    """Apply ``Image.transform(size, AFFINE, map, resample)``; what is read outside the image has the colour ``fill``.

    ``fill`` has one value per channel, or one for all. Sides are at most ``MAX_SIDE``.
    """
    batch, channels, height, width = images_BCHW.shape
    if resample not in get_args(Resample):
        raise ValueError(f"resample must be one of {', '.join(get_args(Resample))}, got {resample!r}")
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"images of {height} x {width} are too large for an affine map; sides are at most {MAX_SIDE}")
    colour = pixels.colour(fill, images_BCHW)
    if resample == "nearest":
        # A frame of the fill's colour stands for everything outside, so one gather without a mask is enough.
        framed = colour.expand(batch, channels, height + 2, width + 2).clone()
        framed[:, :, 1:-1, 1:-1] = images_BCHW
        return _gather(framed, _nearest(map_B6, height, width))
    x_BHW, y_BHW = _exact(map_B6, height, width)
    inside_BHW = (x_BHW >= 0) & (x_BHW < width) & (y_BHW >= 0) & (y_BHW < height)
    interpolate = _bilinear if resample == "bilinear" else _bicubic
    values = interpolate(images_BCHW, x_BHW - 0.5, y_BHW - 0.5).clamp_(0, 255).to(torch.uint8)
    return torch.where(inside_BHW[:, None], values, colour)


def _gather(images_BCHW: Tensor, source_Bhw: Tensor) -> Tensor:
    """Return the pixels (B, C, h, w) of the images at flat positions."""
    source = source_Bhw.long().flatten(1)[:, None].expand(-1, images_BCHW.shape[1], -1)
    return images_BCHW.flatten(2).gather(2, source).view(*images_BCHW.shape[:2], *source_Bhw.shape[1:])


def _nearest(map_B6: Tensor, height: int, width: int) -> Tensor:
    """Return source positions (B, H, W), int32, in images with a frame of one pixel that stands for all outside."""
    of_column_B2, of_row_B2, offset_B2 = map_B6.view(-1, 2, 3).unbind(2)
    place = torch.arange(max(height, width), dtype=torch.int32, device=map_B6.device)

    # Fixed point: a start, a step per column and a step per row.
    start_B2 = offset_B2 + of_column_B2 * 0.5 + of_row_B2 * 0.5
    fixed_3B2 = (torch.stack([start_B2, of_column_B2, of_row_B2]) * 65536.0 + 0.5).floor().int()
    start_B21, of_column_B21, of_row_B21 = fixed_3B2[..., None].unbind()
    along_B2W, down_B2H = start_B21 + of_column_B21 * place[:width], of_row_B21 * place[:height]

    # Maps that only scale and shift: source columns depend on columns alone, source rows on rows.
    own_B21 = map_B6[:, ::4, None]
    scaled_B2S = offset_B2[..., None] + own_B21 * 0.5 + own_B21 * place
    scaled_B2S = scaled_B2S.floor().clamp_(-32768, 32766).int() << 16
    x_21 = pixels.constant((1, 0), torch.int32, map_B6.device)[:, None]
    scales_B11 = (map_B6[:, 1:4:2] == 0).all(1)[:, None, None]
    along_B2W = torch.where(scales_B11, scaled_B2S[..., :width] * x_21, along_B2W)
    down_B2H = torch.where(scales_B11, scaled_B2S[..., :height] * (1 - x_21), down_B2H)

    down_B2H += 1 << 16  # the frame's pixel, in both coordinates
    x_BHW, y_BHW = (along_B2W[:, :, None] + down_B2H[..., None]).bitwise_right_shift_(16).unbind(1)
    return y_BHW.clamp_(0, height + 1).mul_(width + 2).add_(x_BHW.clamp_(0, width + 1))


def _exact(map_B6: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return source points (B, H, W), float64; a pixel's centre is at a half."""
    a, b, c, d, e, f = (number.view(-1, 1, 1) for number in map_B6.unbind(1))
    x = torch.arange(width, dtype=torch.float64, device=map_B6.device) + 0.5
    y = (torch.arange(height, dtype=torch.float64, device=map_B6.device) + 0.5)[:, None]
    return a * x + b * y + c, d * x + e * y + f


def _taps(images_BCHW: Tensor, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    """Return the images' values (B, C, H, W), float64, at integer points; outside, the nearest border pixel's."""
    height, width = images_BCHW.shape[2:]
    return _gather(images_BCHW, y_BHW.clamp(0, height - 1) * width + x_BHW.clamp(0, width - 1)).double()


def _bilinear(images_BCHW: Tensor, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    x, y = x_BHW.floor(), y_BHW.floor()
    dx, dy = (x_BHW - x)[:, None], (y_BHW - y)[:, None]
    x, y = x.long(), y.long()

    def line(row: Tensor) -> Tensor:
        left, right = _taps(images_BCHW, x, row), _taps(images_BCHW, x + 1, row)
        return left + (right - left) * dx

    upper, lower = line(y), line(y + 1)
    return upper + (lower - upper) * dy


def _cubic(v1: Tensor, v2: Tensor, v3: Tensor, v4: Tensor, d: Tensor) -> Tensor:
    """Interpolate four values by the cubic with a = -1, in PIL's order of operations."""
    p2 = v3 - v1
    p3 = 2 * (v1 - v2) + v3 - v4
    p4 = v2 - v1 - v3 + v4
    return v2 + d * (p2 + d * (p3 + d * p4))


def _bicubic(images_BCHW: Tensor, x_BHW: Tensor, y_BHW: Tensor) -> Tensor:
    x, y = x_BHW.floor(), y_BHW.floor()
    dx, dy = (x_BHW - x)[:, None], (y_BHW - y)[:, None]
    x, y = x.long(), y.long()

    def line(row: Tensor) -> Tensor:
        v1, v2, v3, v4 = (_taps(images_BCHW, x + step, row) for step in (-1, 0, 1, 2))
        return _cubic(v1, v2, v3, v4, dx)

    v1, v2, v3, v4 = (line(y + step) for step in (-1, 0, 1, 2))
    return _cubic(v1, v2, v3, v4, dy)


def resized_crop(
    images_BCHW: Tensor,
    top_B: Tensor,
    left_B: Tensor,
    height_B: Tensor,
    width_B: Tensor,
    *,
    size: tuple[int, int],
    resample: Literal["bilinear", "bicubic"] = "bilinear",
) -> Tensor:
    """Apply ``Image.crop``, then ``Image.resize`` (antialiased) to ``size`` (h, w): (B, C, h, w).

    The box, in whole pixels, lies inside the image. The width is resized first, then the height, as Pillow does up to
    version 12; later versions begin with the height if that is less work, and may differ by one level.
    """
    narrowed = _resample(images_BCHW, left_B, width_B, size[1], 3, resample)
    return _resample(narrowed, top_B, height_B, size[0], 2, resample)


_WEIGHT_BITS = 22
"""Fractional bits of a weight, as in Resample.c: 32, less 8 of the value and 2 to spare."""


def _resample(
    images_BCHW: Tensor, start_B: Tensor, length_B: Tensor, size: int, axis: Literal[2, 3], resample: str
) -> Tensor:
    """Resize ``length`` pixels from ``start`` on to ``size`` along an axis, in PIL's integers, or floats.

    Each output pixel is a weighted sum of its neighbours. The n-th neighbours of all outputs are added at once, up to
    the largest number of neighbours that any output can have.
    """
    shape = [*images_BCHW.shape]
    side, shape[axis] = shape[axis], size
    reach = 1 if resample == "bilinear" else 2
    first_Bs, weights = _resize_weights(length_B, size, reach, count=2 * math.ceil(reach * max(1, side / size)) + 1)
    floats = images_BCHW.is_floating_point()
    kind, half = (torch.float64, 0) if floats else (torch.int32, 1 << _WEIGHT_BITS - 1)
    sums = torch.full(shape, half, dtype=kind, device=images_BCHW.device)
    along = (len(images_BCHW), 1, *((size, 1) if axis == 2 else (1, size)))
    for number, weight_Bs in enumerate(weights):
        source_Bs = (first_Bs + start_B.double()[:, None] + number).clamp_(max=side - 1).long()
        values = images_BCHW.gather(axis, source_Bs.view(along).expand(shape))
        sums.addcmul_(values.to(kind), weight_Bs.view(along).to(kind))
    if floats:
        return (sums / (1 << _WEIGHT_BITS)).to(images_BCHW.dtype)
    return (sums >> _WEIGHT_BITS).clamp_(0, 255).to(torch.uint8)


def _resize_weights(length_B: Tensor, size: int, reach: int, *, count: int) -> tuple[Tensor, list[Tensor]]:
    """Return each output's first neighbour (B, size), and the weights (B, size), int32, of ``count`` from it on."""
    length_B1 = length_B.double()[:, None]
    scale = length_B1 / pixels.constant(
        (float(size),), torch.float64, length_B.device
    )  # not / size, which multiplies by the rounded 1 / size
    stretch = scale.clamp(min=1)
    support = reach * stretch
    centre = (torch.arange(size, dtype=torch.float64, device=length_B.device) + 0.5) * scale
    first = (centre - support + 0.5).trunc().clamp(min=0)
    last = torch.minimum((centre + support + 0.5).trunc(), length_B1)
    weights = []
    for number in range(count):
        x = ((first + number - centre + 0.5) * (1.0 / stretch)).abs()
        if reach == 1:
            weight = 1 - x
        else:  # a = -0.5
            weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5)
        weights.append(torch.where((first + number < last) & (x < reach), weight, 0.0))
    total = sum(weights[1:], weights[0])
    scaled = (weight / total * (1 << _WEIGHT_BITS) for weight in weights)
    return first, [(weight + torch.where(weight < 0, -0.5, 0.5)).int() for weight in scaled]
