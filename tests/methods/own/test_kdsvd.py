"""KDSVD: its case, and what the contract suite does not test."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import DataInfo, Method, Outputs, Probe
from vrm.methods.kdsvd import KDSVD, Layout, as_matrix, kdsvd_loss, relation, singular_vectors, stage_vectors

from ..harness import Case, Golden, Outcome
from ..objective import WEIGHTS, Objective, maps
from ..worlds import PAIRS


def reproduce(golden: Golden) -> Outcome:
    """KDSVD: everything with the signs of the file's singular vectors, and ``own.loss`` with those of our own.

    ``own.flipped`` (B, pairs, vectors): whether our teacher's vectors have another relative sign between neighbouring
    stages than the file's; each such flip moves the loss by its ``sign_flip_delta``.
    """
    settings, students, teachers = golden.hyperparameters, golden.stages("feat_student"), golden.stages("feat_teacher")
    layout, outcome, stages, signs = settings["layout"], {}, [], []
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        aligned, vectors, scale = stage_vectors(
            as_matrix(s, layout),
            as_matrix(t, layout),
            num_vectors=settings["k"],
            num_extra=settings["student_extra_vectors"],
        )
        theirs = golden.tensors[f"out.teacher_right_singular_vectors.{i}"].to(vectors)
        signs.append((vectors * theirs).sum(1).sign())
        turn = signs[-1][:, None]
        stages.append((aligned * turn * scale[:, None], vectors * turn * scale[:, None]))
        outcome[f"out.teacher_right_singular_vectors.{i}"] = vectors * turn
        outcome[f"out.teacher_singular_values_normalised.{i}"] = scale

    def pair(before: tuple, here: tuple, sign: float = 1.0) -> torch.Tensor:
        s, t = (relation(here[i], sign * before[i], denominator=settings["rbf_denominator"]) for i in range(2))
        return (s - t).square().sum((1, 2)) / len(s)  # (B, vectors)

    losses = torch.stack([pair(*neighbours) for neighbours in pairwise(stages)], dim=1)
    flipped = torch.stack([pair(*neighbours, sign=-1.0) for neighbours in pairwise(stages)], dim=1)
    return {
        **outcome,
        "out.loss": losses.sum(),
        "out.sign_flip_delta": flipped - losses,
        "own.loss": kdsvd_loss(students, teachers, num_vectors=settings["k"], layout=layout).sum(),
        "own.flipped": torch.stack([a * b < 0 for a, b in pairwise(signs)], dim=1),
    }


def check_kdsvd(golden: Golden, outcome: Outcome) -> None:
    """All of the file with its signs; with our own, the loss but for the flips that our signs are."""
    golden.check(outcome)
    expected = golden.tensors["out.loss"] + golden.tensors["out.sign_flip_delta"][outcome["own.flipped"]].sum()
    tolerance = golden.spec["tolerance"]
    torch.testing.assert_close(outcome["own.loss"].detach(), expected, rtol=tolerance["rtol"], atol=tolerance["atol"])


STAGES_1_2 = {"student_taps": ("stage1", "stage2"), "teacher_taps": ("stage1", "stage2")}


CASE = Case(
    "kdsvd",
    golden=reproduce,
    check=check_kdsvd,
    same_channels=True,
    variants=({}, {"num_vectors": 2}),
    alternatives={
        "layout": ({}, {"layout": "width_space"}),
        "student_taps": (STAGES_1_2, STAGES_1_2 | {"student_taps": ("stage1", "stage2:pre")}),
        "teacher_taps": (STAGES_1_2, STAGES_1_2 | {"teacher_taps": ("stage1", "stage2:pre")}),
    },
    refuses={"teacher_of_tokens": "needs two at least"},
    legal=({"num_vectors": 1},),
    illegal=({"num_vectors": 0}, {"layout": "height_space"}),
    invariances=("sample_order", "logit_shift", "scale", "sample_scale", "channel_order", "mirror"),
    functions=(lambda s, t: kdsvd_loss([s, s.flip(2)], [t, t.flip(3)]),),
)


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
    assert torch.equal(vectors, vh[:, :3].mT)
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


def diagonal(*values: float, rows: int = 0) -> Tensor:
    """One matrix (1, rows, columns) with these singular values, whose singular vectors are the unit vectors."""
    x = torch.zeros(1, max(rows, len(values)), len(values), dtype=torch.float64)
    x[0, : len(values)] = torch.tensor(values, dtype=torch.float64).diag()
    return x


@pytest.mark.parametrize(("extra", "place", "found"), [({}, 3, 1), ({}, 4, 0), ({"num_extra": 4}, 4, 1)])
def test_the_student_is_searched_a_little_further(extra: dict[str, int], place: int, found: int) -> None:
    """Three vectors more than are kept, unless told."""
    values = [1.0] * 6
    values[place] = 9.0
    aligned, vectors, scale = stage_vectors(diagonal(6, 5, 4, 3, 2, 1), diagonal(*values), **extra)
    assert vectors[0, :, 0].tolist() == F.one_hot(torch.tensor(place), 6).tolist()
    assert float((aligned * vectors).sum()) == found
    assert scale.tolist() == [[1.0]]


def test_scale_is_that_of_the_kept_values() -> None:
    _, _, scale = stage_vectors(diagonal(3, 2, 1), diagonal(4, 3, 2), num_vectors=2)
    torch.testing.assert_close(scale, torch.tensor([[0.8, 0.6]], dtype=torch.float64))


def test_relation_by_hand() -> None:
    front, back = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0], [3.0], [5.0]]])
    squares = torch.tensor([[1.0, 4.0, 16.0], [4.0, 1.0, 9.0]])
    torch.testing.assert_close(relation(front, back)[0, :, :, 0], (-squares / 8).exp())
    torch.testing.assert_close(relation(front, back, denominator=2.0)[0, :, :, 0], (-squares / 2).exp())


@pytest.mark.parametrize("layout", ["channel_space", "width_space"])
def test_loss_by_hand(layout: Layout) -> None:
    """Two vectors, three stages."""
    students, teachers = (maps((3, 4, 4, 4), (3, 5, 3, 3), (3, 6, 3, 3), seed=seed) for seed in (1, 2))
    sides = []
    for s, t in zip(students, teachers, strict=True):
        *vectors, scale = stage_vectors(as_matrix(s, layout), as_matrix(t, layout), num_vectors=2)
        sides.append([x * scale[:, None] for x in vectors])
    expected = [
        sum(((relation(now[0], old[0])[i] - relation(now[1], old[1])[i]) ** 2).sum() for i in range(3)) / 3
        for old, now in pairwise(sides)
    ]
    actual = kdsvd_loss(students, teachers, num_vectors=2, layout=layout)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-12, atol=0)


def test_objective() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        stages = [[x.taps[f"stage{k}"] for k in (1, 2, 3)] for x in (s, t)]
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * kdsvd_loss(*stages, num_vectors=2).sum()

    pair = PAIRS["alike"].of_equal_channels()
    Objective(CASE, {"num_vectors": 2, **WEIGHTS}, pair, rtol=1e-9).check(expected)


@pytest.mark.parametrize(("steps", "turns"), [(16, False), (32, False), (64, True)])
def test_turns_between_nearly_equal_values(steps: int, turns: bool) -> None:
    """Left out where the squares of singular values differ by less than rounding: here, 64 units in the last place."""
    eps = torch.finfo(torch.float64).eps
    for x in (diagonal(1, 1 - steps * eps, rows=64), diagonal(1, 1 - steps * eps, rows=64) * 2**10):
        x.requires_grad_()
        vectors, _ = singular_vectors(x, count=1)
        (gradient,) = torch.autograd.grad(vectors[0, 1, 0], x)
        assert bool(gradient.any()) == turns


@pytest.mark.parametrize(("steps", "turns"), [(32, False), (64, False), (128, True)])
def test_turns_out_of_the_rows_of_a_vanishing_value(steps: int, turns: bool) -> None:
    """Left out where a singular value is nothing but rounding: here, 64 units of the greatest."""
    x = torch.zeros(1, 2, 64, dtype=torch.float64)
    x[0, 0, 0], x[0, 1, 1] = 1, steps * torch.finfo(torch.float64).eps
    x.requires_grad_()
    vectors, _ = singular_vectors(x, count=2)
    (gradient,) = torch.autograd.grad(vectors[0, 5, 1], x)
    assert bool(gradient.any()) == turns


def test_all_vectors_may_be_kept() -> None:
    probe = Probe("network", (8, 8), 2, {"stage1": (3, 8, 8), "stage2": (5, 4, 4)})
    method = KDSVD(num_vectors=3)
    method.build(probe, probe, DataInfo(2, 2, 2, torch.arange(2)))
    assert method.matched == (("stage1", "stage1"), ("stage2", "stage2"))
    assert not method.needs.capturable
    probe = Probe("network", (4, 4), 2, {"stage1": (5, 4, 4), "stage2": (5, 2, 2)})
    with pytest.raises(ValueError, match="stage2 of network has 4 singular vectors"):  # of 4 pixels
        KDSVD(num_vectors=5).build(probe, probe, DataInfo(2, 2, 2, torch.arange(2)))
