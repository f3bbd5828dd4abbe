"""A batch in which every image has an operation of its own: the 14 of TorchSSL's RandAugment, the 15 of timm's.

All operations belong to three kinds: a table of values (:mod:`vrm.data.pixels`), an affine map
(:mod:`vrm.data.geometry`), a blend with a degenerate image. Each kind is applied to the batch at once, with arguments
that leave alone the images of the other kinds. On an accelerator it runs on all images, so that shapes do not depend
on the draws and the step can be captured; on the CPU on those alone that drew it. Both give the same pixels.

Shapes: B batch, C channels, H height, W width, T the 256 entries of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vrm.data import geometry, pixels

TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda images, _: pixels.autocontrast_table(images),
    "Brightness": pixels.brightness_table,
    "Contrast": pixels.contrast_table,
    "Equalize": lambda images, _: pixels.equalize_table(images),
    "Invert": lambda images, _: pixels.invert_table(images),
    "Posterize": pixels.posterize_table,
    "Solarize": pixels.solarize_table,
    "SolarizeAdd": pixels.solarize_add_table,
}
"""Operations on values alone: (images, argument) -> table (B, C, 256)."""

MAPS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "Rotate": geometry.rotation,
    "ShearX": geometry.shear_x,
    "ShearY": geometry.shear_y,
    "TranslateX": geometry.translate_x,
    "TranslateY": geometry.translate_y,
}
"""Operations that move pixels: (argument, height, width) -> affine map (B, 6). Degrees, fractions of the side."""

BLENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Color": pixels.color, "Sharpness": pixels.sharpness}
"""Operations that blend: (images, factor) -> images; a factor of 1 changes nothing."""

OPERATIONS = ("Identity", *TABLES, *MAPS, *BLENDS)


def _rows(chosen_B: Tensor) -> Tensor | None:
    """Which images to work on: the chosen ones on the CPU, all (None) where shapes must not depend on data."""
    return chosen_B.nonzero().squeeze(1) if chosen_B.device.type == "cpu" else None


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _put(tensor: Tensor, rows: Tensor | None, replacement: Tensor) -> Tensor:
    """The tensor with these rows replaced."""
    if rows is None:
        return replacement
    position = torch.arange(len(tensor))
    position[rows] = torch.arange(len(tensor), len(tensor) + len(rows))
    # For bytes several times faster than writing rows in place.
    return torch.cat([tensor, replacement]).index_select(0, position)


def apply_operations(
    images_BCHW: Tensor,
    operations: Sequence[str],
    choice_B: Tensor,
    argument_B: Tensor,
    *,
    resample: geometry.Resample = "nearest",
    fill: tuple[int, ...] = (0,),
) -> Tensor:
    """Apply ``operations[choice[b]]`` with ``argument[b]`` to image b.

    Args:
        images_BCHW: uint8 images with 1 or 3 channels.
        operations: names out of ``OPERATIONS``.
        choice_B: int64 positions in ``operations``.
        argument_B: float64 arguments, in the operation's own unit (those without one ignore it).
        resample: how maps read between pixels.
        fill: the colour of what a map reads outside the image.
    """
    unknown = [name for name in operations if name not in OPERATIONS]
    if unknown:
        raise ValueError(f"unknown operations {', '.join(unknown)}; known: {', '.join(OPERATIONS)}")
    images = _apply_tables(images_BCHW, operations, choice_B, argument_B)
    images = _apply_maps(images, operations, choice_B, argument_B, resample, fill)
    for name, function in BLENDS.items():
        if name in operations:
            chosen = choice_B == operations.index(name)
            rows = _rows(chosen)
            factor = torch.where(chosen, argument_B, 1.0)
            images = _put(images, rows, function(_take(images, rows), _take(factor, rows)))
    return images


def _member(operations: Sequence[str], kind: Sequence[str], choice_B: Tensor) -> Tensor:
    """True (B,) where the choice is an operation of this kind."""
    chosen = torch.zeros_like(choice_B, dtype=torch.bool)
    for name in kind:
        chosen |= choice_B == operations.index(name)
    return chosen


def _apply_tables(images: Tensor, operations: Sequence[str], choice_B: Tensor, argument_B: Tensor) -> Tensor:
    names = [name for name in operations if name in TABLES]
    rows = _rows(_member(operations, names, choice_B))
    part, choice, argument = _take(images, rows), _take(choice_B, rows), _take(argument_B, rows)
    table_BCT = pixels.identity_table(part)
    for name in names:
        chosen = choice == operations.index(name)
        selected = _rows(chosen)
        table = TABLES[name](_take(part, selected), _take(argument, selected))
        if selected is None:
            table = torch.where(chosen[:, None, None], table, table_BCT)
        table_BCT = _put(table_BCT, selected, table)
    return _put(images, rows, pixels.look_up(part, table_BCT))


def _apply_maps(
    images: Tensor,
    operations: Sequence[str],
    choice_B: Tensor,
    argument_B: Tensor,
    resample: geometry.Resample,
    fill: tuple[int, ...],
) -> Tensor:
    names = [name for name in operations if name in MAPS]
    rows = _rows(_member(operations, names, choice_B))
    part, choice, argument = _take(images, rows), _take(choice_B, rows), _take(argument_B, rows)
    map_B6 = geometry.identity(argument)
    for name in names:
        chosen = choice == operations.index(name)
        map_B6 = torch.where(chosen[:, None], MAPS[name](argument, *part.shape[2:]), map_B6)
    return _put(images, rows, geometry.affine(part, map_B6, resample=resample, fill=fill))
