"""Projections between the features of two networks: conversion to maps, resizing, and learnable regressors.

Shapes: B batch, C channels, H height, W width, L tokens, D width of tokens. Taps are maps (B, C, H, W); or tokens
(B, L, D) of a square grid, which class and register tokens may precede; or vectors (B, D). ``shape`` is a tap's shape
without the batch axis, as measured.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vrm.divergences import lift

Size = tuple[int, int]


def map_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the shape (C, H, W) that :func:`as_map` gives a tap.

    Raise ``ValueError`` for anything but maps, tokens and vectors.
    """
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
    """Return a tap as a map (B, C, H, W), with half types lifted to float32.

    Tokens (B, L, D) lose those that precede the largest square grid (class and register tokens). Vectors (B, D) become
    1 x 1 maps.
    """
    channels, height, width = map_shape(tuple(x.shape[1:]))
    if x.ndim == 3:
        x = x[:, x.shape[1] - height * width :].transpose(1, 2)
    return lift(x).reshape(-1, channels, height, width)


def _averages(outputs: int, inputs: int, like: Tensor) -> Tensor:
    """Return the matrix (outputs, inputs) of adaptive average pooling along one side, one window a row."""
    window, place = torch.arange(outputs, device=like.device)[:, None], torch.arange(inputs, device=like.device)
    inside = (place >= window * inputs // outputs) & (place < -(-(window + 1) * inputs // outputs))
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)


def resize(x_BCHW: Tensor, size: Size) -> Tensor:
    """Average-pool adaptively to ``size`` (H, W).

    Matrix products are used because the gradient of ``adaptive_avg_pool2d`` has no deterministic form on CUDA.
    """
    if x_BCHW.shape[2:] == size:
        return x_BCHW
    height, width = (_averages(*sides, x_BCHW) for sides in zip(size, x_BCHW.shape[2:], strict=True))
    return height @ x_BCHW @ width.mT


def to_smaller(student_BCHW: Tensor, teacher_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool both maps to the smaller height and the smaller width of the two.

    The released codes of AT, NST, VID and FSP compare heights and pool to squares, which is the same for square maps.
    """
    height, width = (min(a, b) for a, b in zip(student_BCHW.shape[2:], teacher_BCHW.shape[2:], strict=True))
    return resize(student_BCHW, (height, width)), resize(teacher_BCHW, (height, width))


class ConvRegressor(nn.Sequential):
    """A regressor from a student's map to the channels and the size of a teacher's: convolution, batch norm, ReLU.

    The convolution has a bias and is chosen by size, as released with FitNets and AB (RepDistiller): 3x3 of stride 2 to
    halve, transposed 4x4 of stride 2 to double, otherwise an unpadded kernel just large enough to reach the teacher's
    size (1x1 if the sizes are equal).

    Args:
        student: shape (C, H, W) of the student's map.
        teacher: shape (C, H, W) of the teacher's map. Raise ``ValueError`` if no such convolution reaches it.
        norm: add a batch norm after the convolution.
        relu: end with a ReLU.
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
                f"{wanted[0]}x{wanted[1]}: it can halve, double, or remove rows and columns; choose taps closer in size"
            )
        super().__init__()
        self.conv = conv
        if norm:
            self.bn = nn.BatchNorm2d(outputs)
        if relu:
            self.relu = nn.ReLU()
