"""Operations on pixel values, batched with one argument per image, equal to PIL's pixel for pixel.

An operation that maps each value of a channel to another, whatever its position, is a *table* of 256 entries per image
and channel, which :func:`look_up` applies: a batch in which every image has another operation costs one gather. The
other operations blend the image with a degenerate one (:func:`blend`): black, its mean grey, its luma, or itself
smoothed.

Images are uint8 on any device, with 3 channels (or 1, which is PIL's mode ``L``). Arguments are float64, one per image.
Arithmetic follows Pillow's: the C sources ``Blend.c``, ``Filter.c``, ``Convert.c``, ``Point.c``, and
``ImageOps``, ``ImageEnhance``, ``ImageDraw``.

Shapes: B batch, C channels, H height, W width, T the 256 entries of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vrm import compilation

_LEVELS = tuple(range(256))


@compilation.constant
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on the device, copied there once: a captured step may not copy from the host."""
    return torch.tensor(values, dtype=dtype, device=device)


def colour(fill: tuple[int, ...], images_BCHW: Tensor) -> Tensor:
    """Return a colour, given as one value per channel or one for all, as bytes (1, C or 1, 1, 1)."""
    if len(fill) not in (1, images_BCHW.shape[1]):
        raise ValueError(f"the colour {fill} does not fit images of {images_BCHW.shape[1]} channels; give 1 or as many")
    return constant(fill, torch.uint8, images_BCHW.device).view(1, -1, 1, 1)


def look_up(images_BCHW: Tensor, table_BCT: Tensor) -> Tensor:
    """Replace every value by its entry in the table (B, C, 256) of its image and channel."""
    return table_BCT.gather(2, images_BCHW.flatten(2).long()).view_as(images_BCHW)


def grey(images_BCHW: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W), float32, by ITU-R 601-2 in PIL's 16-bit fixed point; one channel is its own."""
    values = images_BCHW.float()
    if values.shape[1] == 1:
        return values
    if values.shape[1] != 3:
        raise ValueError(f"images must have 1 or 3 channels, got {values.shape[1]}; luma is defined for RGB alone")
    red, green, blue = values.unbind(1)
    # All sums are whole numbers below 2^24 and exact in float32.
    luma = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000)
    return luma.mul_(2.0**-16).floor_()[:, None]


def blend(degenerate: Tensor, images: Tensor, factor_B: Tensor) -> Tensor:
    """Return ``degenerate + factor * (image - degenerate)``, in float32, clipped and truncated to bytes (B, ...).

    ``degenerate`` holds whole numbers of any type, of a shape that broadcasts. A factor of 1 returns the image exactly.
    """
    factor = factor_B.float().view(-1, *[1] * (images.dim() - 1))
    base = degenerate.float()
    return (images.float() - base).mul_(factor).add_(base).clamp_(0, 255).to(torch.uint8)


def mean_grey(images_BCHW: Tensor) -> Tensor:
    """Return the mean luma (B, 1, 1, 1), rounded, with which ``ImageEnhance.Contrast`` blends."""
    luma = grey(images_BCHW).flatten(1)
    mean = (2 * luma.sum(1, dtype=torch.float64).long() + luma.shape[1]) // (2 * luma.shape[1])
    return mean.view(-1, 1, 1, 1)


def smooth(images_BCHW: Tensor) -> Tensor:
    """Apply PIL's SMOOTH filter (weights 1/13, centre 5/13), float32; a border of one pixel stays as it is."""
    smoothed = images_BCHW.float()
    if min(images_BCHW.shape[2:]) >= 3:
        values = images_BCHW.short()
        rows = (values[:, :, :-2] + values[:, :, 1:-1]).add_(values[:, :, 2:])
        weighted = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:]).add_(values[:, :, 1:-1, 1:-1], alpha=4)
        # 13 is odd, so no sum lies nearer than 1/26 to a rounding boundary: float32 cannot err.
        smoothed[:, :, 1:-1, 1:-1] = weighted.float().div_(13).add_(0.5).floor_()
    return smoothed


def identity_table(images_BCHW: Tensor) -> Tensor:
    """Return the table (B, C, 256) that changes nothing."""
    return constant(_LEVELS, torch.uint8, images_BCHW.device).expand(*images_BCHW.shape[:2], 256)


def autocontrast_table(images_BCHW: Tensor) -> Tensor:
    """Return the table of ``ImageOps.autocontrast``: a channel's darkest value becomes 0, its lightest 255."""
    values = images_BCHW.flatten(2)
    low, high = values.amin(2, keepdim=True).double(), values.amax(2, keepdim=True).double()
    whole = constant((255.0,), torch.float64, values.device)
    scale = whole / (high - low)  # a Python number over a tensor would multiply by the rounded 1 / x
    identity = identity_table(images_BCHW)
    stretched = (identity * scale - low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, identity)


def equalize_table(images_BCHW: Tensor) -> Tensor:
    """Return the table of ``ImageOps.equalize``: a channel's cumulative histogram becomes linear."""
    values = images_BCHW.flatten(2).long()
    histogram = torch.zeros(*images_BCHW.shape[:2], 256, dtype=torch.int32, device=images_BCHW.device)
    histogram.scatter_add_(2, values, torch.ones((), dtype=torch.int32, device=values.device).expand_as(values))
    of_lightest = histogram.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - of_lightest) // 255
    divisor = step.clamp(min=1)
    equalized = (step // 2 + histogram.cumsum(2) - histogram) // divisor
    return torch.where(step > 0, equalized.clamp_(max=255), identity_table(images_BCHW)).to(torch.uint8)


def invert_table(images_BCHW: Tensor) -> Tensor:
    """Return the table of ``ImageOps.invert``."""
    return 255 - identity_table(images_BCHW)


def posterize_table(images_BCHW: Tensor, bits_B: Tensor) -> Tensor:
    """Return the table of ``ImageOps.posterize``: keep the leading ``bits`` of each value, truncated to an integer.

    ``bits`` outside 1 to 8, which PIL refuses, are clipped.
    """
    dropped = 8 - bits_B.trunc().clamp(1, 8).int().view(-1, 1, 1)
    return (identity_table(images_BCHW).int() >> dropped << dropped).to(torch.uint8)


def solarize_table(images_BCHW: Tensor, threshold_B: Tensor) -> Tensor:
    """Return the table of ``ImageOps.solarize``: invert the values that are not below the threshold."""
    identity = identity_table(images_BCHW)
    return torch.where(identity < threshold_B.view(-1, 1, 1), identity, 255 - identity)


def solarize_add_table(images_BCHW: Tensor, addend_B: Tensor) -> Tensor:
    """Return the table of timm's SolarizeAdd: add ``addend``, truncated to an integer, to the values below 128."""
    identity = identity_table(images_BCHW).int()
    raised = (identity + addend_B.int().view(-1, 1, 1)).clamp(max=255)
    return torch.where(identity < 128, raised, identity).to(torch.uint8)


def rectangle_mask(images_BCHW: Tensor, top_B: Tensor, left_B: Tensor, bottom_B: Tensor, right_B: Tensor) -> Tensor:
    """Return bytes (B, 1, H, W): 1 in rows ``top .. bottom`` and columns ``left .. right``, ends included, else 0."""
    height, width = images_BCHW.shape[2:]
    row = torch.arange(height, device=images_BCHW.device)
    column = torch.arange(width, device=images_BCHW.device)
    rows = (row >= top_B[:, None]) & (row <= bottom_B[:, None])
    columns = (column >= left_B[:, None]) & (column <= right_B[:, None])
    return rows.byte()[:, None, :, None] & columns.byte()[:, None, None, :]


def overwrite(images_BCHW: Tensor, mask_B1HW: Tensor, content: Tensor) -> Tensor:
    """Return ``content`` (bytes, broadcastable) where the mask is 1, and the images where it is 0."""
    # On the CPU this is several times faster than torch.where.
    return (images_BCHW ^ content).mul_(mask_B1HW).bitwise_xor_(images_BCHW)


def cutout(images_BCHW: Tensor, side_B: Tensor, x_B: Tensor, y_B: Tensor, *, fill: tuple[int, ...]) -> Tensor:
    """Fill a square about the centre (x, y), in pixels, as TorchSSL's Cutout; ``side`` is a fraction of the width.

    The square is clipped to the image and includes its far ends, as ``ImageDraw.rectangle`` draws it. A side of 0
    changes nothing.
    """
    ends = constant(tuple(images_BCHW.shape[2:]), torch.float64, images_BCHW.device)[:, None]
    side = side_B * images_BCHW.shape[3]
    first_2B = (torch.stack([y_B, x_B]) - side / 2).clamp(min=0).trunc()
    top, left = first_2B.unbind()
    bottom, right = torch.minimum(first_2B + side, ends).trunc().unbind()
    bottom = torch.where(side > 0, bottom, -1)
    mask = rectangle_mask(images_BCHW, top, left, bottom, right)
    return overwrite(images_BCHW, mask, colour(fill, images_BCHW))
