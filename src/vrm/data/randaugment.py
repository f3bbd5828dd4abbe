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

OPERATIONS = (*TABLES, *MAPS, *BLENDS, "Identity")
"""All operations, those of a kind side by side."""


def apply_operations(
    images_BCHW: Tensor,
    operations: Sequence[str],
    choice_B: Tensor,
    argument_B: Tensor,
    *,
    resample: geometry.Resample = "nearest",
    fill: tuple[int, ...] = (0,),
    static: bool | None = None,
) -> Tensor:
    """Apply ``operations[choice[b]]`` with ``argument[b]`` to image b.

    Args:
        images_BCHW: uint8 images with 1 or 3 channels.
        operations: different names out of ``OPERATIONS``.
        choice_B: int64 positions in ``operations``.
        argument_B: float64 arguments, in the operation's own unit (those without one ignore it).
        resample: how maps read between pixels.
        fill: the colour of what a map reads outside the image.
        static: whether shapes must not depend on the draws; by default everywhere but on the CPU.
    """
    unknown = [name for name in operations if name not in OPERATIONS]
    if unknown:
        raise ValueError(f"unknown operations {', '.join(unknown)}; known: {', '.join(OPERATIONS)}")
    if static is None:
        static = images_BCHW.device.type != "cpu"
    # From the caller's numbering to ours, in which operations of a kind are neighbours.
    numbers = pixels.constant(tuple(map(OPERATIONS.index, operations)), torch.int64, choice_B.device)
    operation_B = numbers[choice_B]
    if static:
        return _apply_to_all(images_BCHW, operations, operation_B, argument_B, resample, fill)
    return _apply_in_groups(images_BCHW, operation_B, argument_B, resample, fill)


def _apply_to_all(
    images: Tensor,
    operations: Sequence[str],
    operation_B: Tensor,
    argument_B: Tensor,
    resample: geometry.Resample,
    fill: tuple[int, ...],
) -> Tensor:
    """Every kind on every image; the kinds that an image did not draw get the argument that changes nothing."""
    numbers = pixels.constant(tuple(map(OPERATIONS.index, operations)), torch.int64, operation_B.device)
    drawn = dict(zip(operations, (operation_B == numbers[:, None]).unbind(), strict=True))
    table_BCT, map_B6 = pixels.identity_table(images), geometry.identity(argument_B)
    for name, drawn_B in drawn.items():
        if name in TABLES:
            table_BCT = torch.where(drawn_B[:, None, None], TABLES[name](images, argument_B), table_BCT)
        elif name in MAPS:
            map_B6 = torch.where(drawn_B[:, None], MAPS[name](argument_B, *images.shape[2:]), map_B6)
    images = pixels.look_up(images, table_BCT)
    images = geometry.affine(images, map_B6, resample=resample, fill=fill)
    for name in filter(drawn.__contains__, BLENDS):
        images = BLENDS[name](images, torch.where(drawn[name], argument_B, 1.0))
    return images


def _apply_in_groups(
    images: Tensor, operation_B: Tensor, argument_B: Tensor, resample: geometry.Resample, fill: tuple[int, ...]
) -> Tensor:
    """Sort the images by operation and work on each one's alone; tables and maps are then applied together."""
    order_B = operation_B.argsort()
    sizes = operation_B.bincount(minlength=len(OPERATIONS)).tolist()
    images = images.index_select(0, order_B)
    groups = zip(torch.split(images, sizes), torch.split(argument_B[order_B], sizes), strict=True)
    drawn = {name: group for name, group in zip(OPERATIONS, groups, strict=True) if len(group[0])}

    tables = [function(*drawn[name]) for name, function in TABLES.items() if name in drawn]
    maps = [function(drawn[name][1], *images.shape[2:]) for name, function in MAPS.items() if name in drawn]
    done = []
    if tables:
        table_BCT = torch.cat(tables)
        done.append(pixels.look_up(images[: len(table_BCT)], table_BCT))
    if maps:
        map_B6, start = torch.cat(maps), sum(map(len, done))
        done.append(geometry.affine(images[start : start + len(map_B6)], map_B6, resample=resample, fill=fill))
    done += [function(*drawn[name]) for name, function in BLENDS.items() if name in drawn]
    done += [images[len(images) - sizes[-1] :]]
    return torch.cat(done).index_select(0, order_B.argsort())
