"""KDSVD: signs, gradients of singular vectors, and pairs that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vrm.contract import DataInfo, Probe
from vrm.methods.kdsvd import KDSVD, Layout, as_matrix, kdsvd_loss, singular_vectors, stage_vectors


def matrices(rows: int, columns: int) -> Tensor:
    return torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (4, 4)])
def test_gradient_is_that_of_the_decomposition(shape: tuple[int, int]) -> None:
    """The same as torch's own, of a function without signs; in value the decomposition itself."""
    x = matrices(*shape).requires_grad_()
    weight = torch.arange(shape[1], dtype=torch.float64)
    vectors, values = singular_vectors(x, count=3)
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(values, s)
    torch.testing.assert_close(vectors.abs(), vh[:, :3].mT.abs())
    ours, theirs = (((weight @ v).square()).sum() for v in (vectors, vh[:, :3].mT))
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


@pytest.mark.parametrize("x", [torch.zeros(1, 5, 4), torch.eye(5)[None, :, :4], torch.ones(1, 5, 4)])
def test_gradient_is_finite_where_singular_values_coincide(x: Tensor) -> None:
    x = x.clone().requires_grad_()
    vectors, _ = singular_vectors(x, count=4)
    (gradient,) = torch.autograd.grad(vectors.pow(3).sum(), x)
    assert torch.isfinite(gradient).all()


def test_what_is_not_finite_reaches_the_loss() -> None:
    x = matrices(5, 4)
    x[0, 0, 0] = float("nan")
    assert singular_vectors(x, count=2)[0][0].isnan().any()


def test_teacher_has_a_sign_and_the_student_follows() -> None:
    student, teacher = matrices(7, 4), matrices(7, 4) + 0.3
    aligned, vectors, scale = stage_vectors(student, teacher, num_vectors=2)
    assert (vectors.sum(1) >= 0).all()
    assert ((aligned * vectors).sum(1) > 0).all()
    torch.testing.assert_close(scale.square().sum(1), torch.ones(2, dtype=torch.float64))
    for signs in (-1, torch.tensor([1.0, -1.0]).double()[:, None, None]):
        turned = stage_vectors(signs * student, signs * teacher, num_vectors=2)
        torch.testing.assert_close(turned[0], aligned)
        torch.testing.assert_close(turned[1], vectors)


def test_layouts() -> None:
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert as_matrix(maps, "channel_space").shape == (1, 12, 2)
    assert as_matrix(maps, "channel_space")[0, 5].tolist() == [5, 17]
    assert as_matrix(maps, "width_space").shape == (1, 6, 4)
    assert as_matrix(maps, "width_space")[0, 3].tolist() == [12, 13, 14, 15]


def test_one_value_a_pair_of_neighbours() -> None:
    maps = [torch.randn(2, c, 4, 4, generator=torch.Generator().manual_seed(c)) for c in (3, 4, 5)]
    loss = kdsvd_loss(maps, [m + 1 for m in maps])
    assert loss.shape == (2,)
    torch.testing.assert_close(loss[1:], kdsvd_loss(maps[1:], [m + 1 for m in maps[1:]]))
    torch.testing.assert_close(kdsvd_loss(maps, maps), torch.zeros(2))


@pytest.mark.parametrize(
    ("layout", "shape", "num_vectors", "message"),
    [
        ("channel_space", (4, 8, 8), 1, "equal channels, but stage1 of student has 3"),
        ("width_space", (3, 8, 6), 1, "equal columns"),
        ("channel_space", (3, 8, 8), 4, "3 singular vectors"),
    ],
)
def test_pairs_that_do_not_fit(layout: Layout, shape: tuple[int, int, int], num_vectors: int, message: str) -> None:
    student, teacher = (
        Probe(name, (8, 8), 2, {"stage1": of, "stage2": (5, 4, 4)})
        for name, of in (("student", (3, 8, 8)), ("teacher", shape))
    )
    method = KDSVD(num_vectors, layout)
    with pytest.raises(ValueError, match=message):
        method.build(student, teacher, DataInfo(2, 2, 2, torch.arange(2)))
