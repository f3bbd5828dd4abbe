"""DIST: its case, and what the contract suite does not test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.methods.dist import DIST, correlation, dist_loss, softened

from ..harness import Case, Golden, Outcome
from ..objective import Objective, maps


def reproduce(golden: Golden) -> Outcome:
    """DIST: both correlations and their weighted sum; dense predictions have no temperature."""
    settings = golden.hyperparameters
    logits = golden["logits_student"], golden["logits_teacher"]
    inter, intra = dist_loss(*logits, temperature=settings.get("tau", 1.0))
    return {
        "out.loss_inter": inter,
        "out.loss_intra": intra,
        "out.loss": settings["beta"] * inter + settings["gamma"] * intra,
    }


CASE = Case(
    "dist",
    golden=reproduce,
    variants=({}, {"gamma": 0.0}, {"temperature": 2.0, "temperature_squared": False}),
    legal=({"temperature": 0.5}, {"beta": 0.0, "gamma": 0.0}),
    illegal=({"temperature": 0.0}, {"temperature": -1.0}, {"temperature": float("inf")}),
    invariances=("sample_order", "logit_shift"),
    functions=(lambda s, t: torch.stack(dist_loss(s, t)), lambda s, t: correlation(s, t, dim=1)),
)


def pearson(rows: np.ndarray, others: np.ndarray) -> float:
    """The mean of numpy's correlation coefficients of pairs of rows."""
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(rows, others, strict=True)]))


@pytest.mark.parametrize("squared", [True, False])
def test_dist_objective(squared: bool) -> None:
    """Against numpy, whose coefficients have no ``eps``."""

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        p, q = ((x.logits / 2).softmax(1).detach().numpy() for x in (s, t))
        relations = 3 * (1 - pearson(p, q)) + 5 * (1 - pearson(p.T, q.T))
        return 0.5 * F.cross_entropy(s.logits, target) + (4 if squared else 1) * relations

    options = {"temperature": 2.0, "beta": 3.0, "gamma": 5.0, "ce_weight": 0.5, "temperature_squared": squared}
    Objective(CASE, options, rtol=1e-6).check(expected)


def test_dist_is_blind_to_the_scale_of_vectors() -> None:
    a, b = maps((4, 6), (4, 6))
    row = torch.arange(1.0, 5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(correlation(row * a, b, dim=1), correlation(a, b, dim=1), rtol=1e-7, atol=0)
    torch.testing.assert_close(correlation(a, -b, dim=1), -correlation(a, b, dim=1), rtol=1e-12, atol=0)


def test_dist_damps_the_correlation_of_what_barely_varies() -> None:
    """``eps`` is added to the product of the norms: with norms of 1e-4 it is as large as they are."""
    x = torch.tensor([[1e-4, -1e-4]], dtype=torch.float64) / 2**0.5
    assert correlation(x, x, dim=1).item() == pytest.approx(1e-8 / 2e-8)
    assert correlation(x, 0 * x, dim=1).item() == 0


def test_dist_of_dense_predictions_takes_positions_as_samples() -> None:
    s, t = maps((2, 3, 4, 5), (2, 3, 4, 5))
    rows = [torch.stack([x[b, :, i, j] for b in range(2) for i in range(4) for j in range(5)]) for x in (s, t)]
    assert torch.equal(softened(s, temperature=3.0), (rows[0] / 3).softmax(1))
    for dense, flat in zip(dist_loss(s, t), dist_loss(*rows), strict=True):
        torch.testing.assert_close(dense, flat, rtol=1e-13, atol=0)


def test_dist_of_a_single_sample_has_no_relation_between_samples() -> None:
    s, t = maps((1, 5), (1, 5))
    inter, intra = dist_loss(s.requires_grad_(), t, temperature=2.0)
    assert intra.item() == 4
    (gradient,) = torch.autograd.grad(intra, s, retain_graph=True)
    assert not gradient.any()
    assert torch.autograd.grad(inter, s)[0].any()


def test_dist_of_two_samples_knows_only_signs() -> None:
    s, t = maps((2, 5), (2, 5))
    p, q = (softened(x, temperature=4.0) for x in (s, t))
    signs = ((p[1] - p[0]) * (q[1] - q[0])).sign()
    assert dist_loss(s, t)[1].item() == pytest.approx(16 * (1 - signs.mean().item()), rel=1e-4)


def test_dist_of_constant_predictions() -> None:
    """Equal classes have no order, and equal samples no differences: both losses are 1, the latter without a pull."""
    s, t = maps((1, 5), (4, 5))
    same, flat = s.repeat(4, 1).requires_grad_(), torch.zeros(4, 5, dtype=torch.float64)
    inter, intra = dist_loss(same, t, temperature=1.0)
    assert intra.item() == pytest.approx(1, abs=1e-9)
    assert torch.isfinite(torch.autograd.grad(inter + intra, same)[0]).all()
    assert [loss.item() for loss in dist_loss(flat, t, temperature=1.0)] == [1, 1]


def test_dist_of_an_equal_student_is_zero() -> None:
    s, _ = maps((6, 5), (6, 5))
    assert [loss.item() for loss in dist_loss(s, s)] == pytest.approx([0, 0], abs=1e-4)


def test_dist_says_what_has_no_effect() -> None:
    assert DIST().unused_options() == {}
    assert DIST(beta=0.0).unused_options() == {}
    assert DIST(temperature=1.0).unused_options().keys() == {"temperature_squared"}
    assert DIST(beta=0.0, gamma=0.0).unused_options().keys() == {"temperature", "temperature_squared"}
