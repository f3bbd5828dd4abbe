"""RKD: its case, and what the contract suite does not test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.methods.rkd import relative_distances, rkd_angle_loss, rkd_distance_loss

from ..harness import Case, Golden, Outcome
from ..objective import Objective


def reproduce(golden: Golden) -> Outcome:
    """RKD: both losses, and their weighted sum."""
    student, teacher, settings = golden["feat_student"], golden["feat_teacher"], golden.hyperparameters
    distance = rkd_distance_loss(student, teacher, squared=settings["squared"], eps=settings["eps"])
    angle = rkd_angle_loss(student, teacher)
    return {
        "out.loss_distance": distance,
        "out.loss_angle": angle,
        "out.loss": settings["distance_weight"] * distance + settings["angle_weight"] * angle,
    }


CASE = Case(
    "rkd",
    golden=reproduce,
    variants=({}, {"squared": True}),
    invariances=("sample_order", "logit_shift", "rotation", "scale", "translation"),
    functions=(rkd_distance_loss, rkd_angle_loss, lambda s, t: relative_distances(s).square()),
)


FEATURES = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_a_pair_says_nothing_and_a_single_is_refused() -> None:
    other = FEATURES.flip(0)[:, :2]
    assert float(rkd_distance_loss(FEATURES[:2], other[:2])) == 0
    assert float(rkd_angle_loss(FEATURES[:2], other[:2])) == pytest.approx(0, abs=1e-12)
    for loss in (rkd_distance_loss, rkd_angle_loss):
        with pytest.raises(ValueError, match="batch of one"):
            loss(FEATURES[:1], other[:1])


def test_nearly_equal_rows_keep_their_distance() -> None:
    """Where a Gram matrix of single floats is left with noise."""
    features = torch.tensor([[100.0, 0.0], [100.0, 1e-3], [0.0, 0.0]])
    distances = relative_distances(features)
    assert float(distances[0, 1] / distances[0, 2]) == pytest.approx(1e-5, rel=1e-4)


@pytest.mark.parametrize("squared", [False, True])
def test_objective(squared: bool) -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        pooled = s.taps["pooled"], t.taps["pooled"]
        distance, angle = rkd_distance_loss(*pooled, squared=squared), rkd_angle_loss(*pooled)
        return 0.5 * F.cross_entropy(s.logits, target) + 3 * distance + 7 * angle

    options = {"ce_weight": 0.5, "distance_weight": 3.0, "angle_weight": 7.0, "squared": squared}
    Objective(CASE, options).check(expected)


@pytest.mark.parametrize("squared", [False, True])
def test_distances_by_hand(squared: bool) -> None:
    """Means leave out the diagonal; the Huber loss takes it in, and is linear beyond 1."""
    losses = []
    for points in ([0.0, 1.0, 10.0], [0.0, 5.0, 7.0]):
        apart = [abs(a - b) ** (2 if squared else 1) for a in points for b in points]
        losses.append([6 * d / sum(apart) for d in apart])
    differences = [abs(a - b) for a, b in zip(*losses, strict=True)]
    assert squared == (max(differences) > 1)
    expected = sum(d * d / 2 if d < 1 else d - 0.5 for d in differences) / 9
    student, teacher = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.0], [5.0], [7.0]])
    assert float(rkd_distance_loss(student, teacher, squared=squared)) == pytest.approx(expected)


@pytest.mark.parametrize("squared", [False, True])
def test_equal_rows_are_eps_apart(squared: bool) -> None:
    """In the square, on both sides; 1e-12 unless told."""
    student, teacher = (
        torch.tensor(rows, dtype=torch.float64) for rows in ([[0.0], [0.0], [3.0]], [[0.0], [2.0], [2.0]])
    )
    for given, eps in (({}, 1e-12), ({"eps": 0.25}, 0.25)):
        apart = relative_distances(student, squared=squared, **given)
        expected = eps / 9 if squared else eps**0.5 / 3
        assert float(apart[0, 1] / apart[0, 2]) == pytest.approx(expected, rel=1e-9)
        sides = [relative_distances(x, squared=squared, **given) for x in (student, teacher)]
        loss = rkd_distance_loss(student, teacher, squared=squared, **given)
        torch.testing.assert_close(loss, F.smooth_l1_loss(*sides), rtol=1e-14, atol=0)
