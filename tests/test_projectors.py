"""Resizing and regressors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vrm.projectors import ConvRegressor, as_map, map_shape, resize, to_smaller

sides = st.integers(1, 9)


def test_tokens_become_maps_without_their_prefix() -> None:
    """Two prefix tokens before a 3 x 3 grid, row by row."""
    tokens = torch.arange(2 * 11 * 5.0).reshape(2, 11, 5)
    grid = as_map(tokens)
    assert grid.shape == (2, 5, 3, 3)
    assert torch.equal(grid[1, :, 2, 0], tokens[1, 2 + 6])
    assert map_shape((11, 5)) == (5, 3, 3)


def test_vectors_and_maps() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(as_map(x), x)
    assert as_map(torch.randn(2, 3)).shape == (2, 3, 1, 1)
    assert map_shape((3, 4, 5)) == (3, 4, 5)
    assert map_shape((3,)) == (3, 1, 1)
    with pytest.raises(ValueError, match="must be a map"):
        map_shape((1, 2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_lifted(dtype: torch.dtype) -> None:
    assert as_map(torch.ones(1, 2, 2, 2, dtype=dtype)).dtype == torch.float32


@given(sides, sides, sides, sides)
def test_the_smaller_of_each_side(a: int, b: int, c: int, d: int) -> None:
    s, t = to_smaller(torch.randn(2, 3, a, b), torch.randn(2, 4, c, d))
    assert s.shape == (2, 3, min(a, c), min(b, d))
    assert t.shape == (2, 4, min(a, c), min(b, d))


def test_resize_averages_and_keeps_the_mean() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize(x, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resize(x, (4, 4)) is x


@given(sides, sides, sides, sides)
def test_resize_is_adaptive_average_pooling(a: int, b: int, c: int, d: int) -> None:
    x = torch.randn(2, 3, a, b, dtype=torch.float64)
    assert torch.allclose(resize(x, (c, d)), F.adaptive_avg_pool2d(x, (c, d)), rtol=1e-12, atol=1e-14)


@given(sides, sides, sides, sides)
def test_regressors_lead_to_the_teachers_size_or_say_so(a: int, b: int, c: int, d: int) -> None:
    possible = (a >= c and b >= d) or (2 * a, 2 * b) == (c, d) or (a == 2 * c and (b + 1) // 2 == d)
    if not possible:
        with pytest.raises(ValueError, match=f"from the student's {a}x{b} map to the teacher's {c}x{d}"):
            ConvRegressor((3, a, b), (4, c, d), relu=True)
        return
    regressor = ConvRegressor((3, a, b), (4, c, d), relu=True).eval()
    assert regressor(torch.randn(2, 3, a, b)).shape == (2, 4, c, d)


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel", "stride", "padding"),
    [
        ((8, 8), (4, 4), nn.Conv2d, (3, 3), 2, 1),
        ((4, 4), (8, 8), nn.ConvTranspose2d, (4, 4), 2, 1),
        ((3, 5), (6, 10), nn.ConvTranspose2d, (4, 4), 2, 1),
        ((8, 8), (8, 8), nn.Conv2d, (1, 1), 1, 0),
        ((8, 7), (6, 4), nn.Conv2d, (3, 4), 1, 0),
        ((8, 7), (4, 4), nn.Conv2d, (3, 3), 2, 1),
        ((2, 2), (1, 1), nn.Conv2d, (3, 3), 2, 1),
        ((8, 8), (4, 3), nn.Conv2d, (5, 6), 1, 0),
    ],
)
def test_choice_of_convolution(
    student: tuple[int, int],
    teacher: tuple[int, int],
    kind: type[nn.Module],
    kernel: tuple[int, int],
    stride: int,
    padding: int,
) -> None:
    conv = ConvRegressor((3, *student), (5, *teacher), relu=False).conv
    assert isinstance(conv, kind)
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (3, 5, kernel)
    assert (conv.stride, conv.padding) == ((stride, stride), (padding, padding))
    assert conv.bias is not None
    assert conv(torch.randn(1, 3, *student)).shape == (1, 5, *teacher)


def test_resize_stays_on_its_device() -> None:
    assert resize(torch.empty(1, 2, 4, 6, device="meta"), (3, 5)).is_meta


def test_parts_of_the_regressor() -> None:
    parts = [type(m) for m in ConvRegressor((3, 4, 4), (4, 4, 4), relu=True)]
    assert parts == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(m) for m in ConvRegressor((3, 4, 4), (4, 4, 4), norm=False, relu=False)] == [nn.Conv2d]
