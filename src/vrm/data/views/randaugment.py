"""RandAugment's operations on a batch in which every image drew its own: TorchSSL's 14, timm's 15.

Every operation is one of three kinds: a table of values (:mod:`vrm.data.views.pixels`), an affine map
(:mod:`vrm.data.views.geometry`), or a blend with a degenerate image. Each kind is applied to the batch at once. On an
accelerator it runs on all images, with arguments that leave the images of other kinds unchanged, so that shapes do not
depend on the draws and the step can be captured; on the CPU it runs on the images that drew it. The pixels are equal.

Shapes: B batch, C channels, H height, W width, T the 256 entries of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vrm.compilation import constant
from vrm.data.views import geometry, pixels

TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda images, _: pixels.autocontrast_table(images),
    "Equalize": lambda images, _: pixels.equalize_table(images),
    "Invert": lambda images, _: pixels.invert_table(images),
    "Posterize": pixels.posterize_table,
    "Solarize": pixels.solarize_table,
    "SolarizeAdd": pixels.solarize_add_table,
}
"""Operations on values alone, as functions (images, argument) -> table (B, C, 256)."""

MAPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
"""Operations that move pixels. Their arguments are degrees (Rotate), slopes, and fractions of the side."""

BLENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Brightness": lambda images: images.new_zeros(len(images), 1, 1, 1),
    "Contrast": pixels.mean_grey,
    "Color": pixels.grey,
    "Sharpness": pixels.smooth,
}
"""Operations that blend, as functions images -> degenerate images. The argument weighs the image; 1 changes nothing."""

OPERATIONS = (*TABLES, *MAPS, *BLENDS, "Identity")
"""All operations, grouped by kind."""


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
        static: whether shapes must not depend on the draws; by default everywhere but on the CPU, and where compiled.
    """
    unknown = [name for name in operations if name not in OPERATIONS]
    if unknown:
        raise ValueError(f"unknown operations {', '.join(unknown)}; known: {', '.join(OPERATIONS)}")
    if static is None:
        static = images_BCHW.device.type != "cpu" or torch.compiler.is_compiling()
    # From positions in `operations` to positions in OPERATIONS, where operations of a kind are neighbours.
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
    """Apply every kind to every image; kinds that an image did not draw get the argument that changes nothing."""
    numbers = pixels.constant(tuple(map(OPERATIONS.index, operations)), torch.int64, operation_B.device)
    drawn = dict(zip(operations, (operation_B == numbers[:, None])[..., None, None, None].unbind(), strict=True))
    table_BCT, degenerate = pixels.identity_table(images), images.new_zeros(1, 1, 1, 1)
    for name, drawn_B111 in drawn.items():
        if name in TABLES:
            table_BCT = torch.where(drawn_B111[..., 0], TABLES[name](images, argument_B), table_BCT)
        elif name in BLENDS:
            degenerate = torch.where(drawn_B111, BLENDS[name](images), degenerate)
    blended = pixels.constant(tuple(name in BLENDS for name in OPERATIONS), torch.bool, operation_B.device)
    # Each image drew one operation, so the look-up leaves those that blend unchanged.
    images = pixels.look_up(images, table_BCT)
    images = pixels.blend(degenerate, images, torch.where(blended[operation_B], argument_B, 1.0))
    return geometry.affine(images, _maps(operation_B, argument_B, *images.shape[2:]), resample=resample, fill=fill)


def _maps(operation_B: Tensor, argument_B: Tensor, height: int, width: int) -> Tensor:
    """Return the affine map (B, 6) of every image: the identity where the operation moves nothing."""
    unit_B6 = pixels.constant(_units(height, width), torch.float64, argument_B.device).view(-1, 6)[operation_B]
    map_B6 = geometry.identity(argument_B) + argument_B[:, None] * unit_B6
    rotated_B = operation_B == OPERATIONS.index("Rotate")
    return torch.where(rotated_B[:, None], geometry.rotation(argument_B, height, width), map_B6)


@constant
def _units(height: int, width: int) -> tuple[float, ...]:
    """Return, for each operation, what an argument of 1 adds to the six numbers of the identity map."""
    units = [0.0] * 6 * len(OPERATIONS)
    places = {"ShearX": (1, 1), "ShearY": (3, 1), "TranslateX": (2, width), "TranslateY": (5, height)}
    for name, (place, unit) in places.items():
        units[6 * OPERATIONS.index(name) + place] = unit
    return tuple(units)


def _apply_in_groups(
    images: Tensor, operation_B: Tensor, argument_B: Tensor, resample: geometry.Resample, fill: tuple[int, ...]
) -> Tensor:
    """Sort the images by operation and apply each to its own; tables and maps are then applied together."""
    order_B = operation_B.argsort()
    sizes = operation_B.bincount(minlength=len(OPERATIONS)).tolist()
    images, operation_B, argument_B = (x.index_select(0, order_B) for x in (images, operation_B, argument_B))
    groups = zip(torch.split(images, sizes), torch.split(argument_B, sizes), strict=True)
    drawn = {name: group for name, group in zip(OPERATIONS, groups, strict=True) if len(group[0])}

    tables = [function(*drawn[name]) for name, function in TABLES.items() if name in drawn]
    done = []
    if tables:
        table_BCT = torch.cat(tables)
        done.append(pixels.look_up(images[: len(table_BCT)], table_BCT))
    start = sum(map(len, done))
    moved = slice(start, start + sum(sizes[OPERATIONS.index(name)] for name in MAPS))
    map_B6 = _maps(operation_B[moved], argument_B[moved], *images.shape[2:])
    done.append(geometry.affine(images[moved], map_B6, resample=resample, fill=fill))
    for name, function in BLENDS.items():
        if name in drawn:
            own, factor_B = drawn[name]
            done.append(pixels.blend(function(own), own, factor_B))
    done.append(images[len(images) - sizes[-1] :])
    return torch.cat(done).index_select(0, order_B.argsort())
