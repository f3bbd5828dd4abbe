"""RKD where the reference vectors do not reach."""

from __future__ import annotations

import pytest
import torch

from vrm.methods.rkd import angles, relative_distances, rkd_angle_loss, rkd_distance_loss

FEATURES = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_distances_have_mean_one_and_a_zero_diagonal() -> None:
    distances = relative_distances(FEATURES)
    assert (distances.diagonal() == 0).all()
    assert float(distances.sum()) == pytest.approx(20)
    torch.testing.assert_close(
        distances[0, 1] / distances[2, 3], torch.dist(*FEATURES[:2]) / torch.dist(*FEATURES[2:4])
    )


def test_angles_are_cosines_at_the_vertex() -> None:
    corner = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    cosines = angles(corner)
    assert float(cosines[0, 1, 2]) == pytest.approx(0)
    assert float(cosines[0, 1, 3]) == pytest.approx(0.5**0.5)
    assert float(cosines[1, 1, 2]) == 0


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
