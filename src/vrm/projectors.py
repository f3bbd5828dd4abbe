"""The small maps between the features of two networks: resizing, and learnable regressors.

Shapes: B batch, C channels, H height, W width, L tokens, D width of tokens. Taps are maps (B, C, H, W), or tokens (B,
L, D) of a square grid, perhaps behind class and register tokens. ``shape`` is a tap's shape without the batch axis,
as probed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vrm.divergences import lift

Size = tuple[int, int]


def map_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of a tap as :func:`as_map` gives it. ``ValueError`` for anything but maps, tokens and vectors."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2:
        side = math.isqrt(shape[0])
        return shape[1], side, side
    if len(shape) == 1:
        return shape[0], 1, 1
    raise ValueError(
        f"a tap must be a map (C, H, W), tokens (L, D) or a vector (D,), got shape {shape}; tap another module"
    )


def as_map(x: Tensor) -> Tensor:
    """A tap as a map (B, C, H, W), half types lifted.

    Tokens (B, L, D) lose those in front of the largest square grid (class and registers); vectors (B, D) become 1 x 1.
    """
    channels, height, width = map_shape(tuple(x.shape[1:]))
    if x.ndim == 3:
        x = x[:, x.shape[1] - height * width :].transpose(1, 2)
    return lift(x).reshape(-1, channels, height, width)


def _averages(outputs: int, inputs: int, like: Tensor) -> Tensor:
    """The matrix (outputs, inputs) of adaptive average pooling along one side, a window in each row."""
    window, place = torch.arange(outputs, device=like.device)[:, None], torch.arange(inputs, device=like.device)
    inside = (place >= window * inputs // outputs) & (place < -(-(window + 1) * inputs // outputs))
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)


def resize(x_BCHW: Tensor, size: Size) -> Tensor:
    """Adaptive average pooling to ``size`` (H, W).

    By matrix products: the gradient of ``adaptive_avg_pool2d`` has no deterministic form on CUDA.
    """
    if x_BCHW.shape[2:] == size:
        return x_BCHW
    height, width = (_averages(*sides, x_BCHW) for sides in zip(size, x_BCHW.shape[2:], strict=True))
    return height @ x_BCHW @ width.mT


def to_smaller(student_BCHW: Tensor, teacher_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps average-pooled to the smaller height and the smaller width of the two.

    The released codes of AT, NST, VID and FSP compare heights and pool to squares; the same for square maps.
    """
    height, width = (min(a, b) for a, b in zip(student_BCHW.shape[2:], teacher_BCHW.shape[2:], strict=True))
    return resize(student_BCHW, (height, width)), resize(teacher_BCHW, (height, width))


class ConvRegressor(nn.Sequential):
    """Convolution, batch norm and perhaps ReLU from a student's map to the channels and the size of a teacher's.

    The convolution has a bias and is chosen by size, as released with FitNets and AB (RepDistiller): 3x3 of stride 2 to
    halve, transposed 4x4 of stride 2 to double, else as large a kernel as takes one size to the other (1x1 if equal).

    Args:
        student: shape (C, H, W) of the student's map.
        teacher: shape (C, H, W) of the teacher's map. ``ValueError`` if no such convolution leads to it.
        norm: batch norm behind the convolution.
        relu: ReLU at the end.
    """

    def __init__(
        self, student: tuple[int, int, int], teacher: tuple[int, int, int], *, norm: bool = True, relu: bool
    ) -> None:
        (inputs, height, width), (outputs, *wanted) = student, teacher
        rows, columns = height - wanted[0], width - wanted[1]
        conv: nn.Module
        if height == 2 * wanted[0] and (width + 1) // 2 == wanted[1]:
            conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        elif [2 * height, 2 * width] == wanted:
            conv = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
        elif rows >= 0 and columns >= 0:
            conv = nn.Conv2d(inputs, outputs, (1 + rows, 1 + columns))
        else:
            raise ValueError(
                f"no convolution leads from the student's {height}x{width} map to the teacher's "
                f"{wanted[0]}x{wanted[1]}: it can halve, double, or take away rows and columns; choose closer taps"
            )
        super().__init__()
        self.conv = conv
        if norm:
            self.bn = nn.BatchNorm2d(outputs)
        if relu:
            self.relu = nn.ReLU()
