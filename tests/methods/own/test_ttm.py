"""TTM: its case, and what the contract suite does not test."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.divergences import cross_entropy
from vrm.methods import ttm

from ..harness import Case, Golden, Outcome
from ..objective import Objective, maps


def reproduce(golden: Golden) -> Outcome:
    """TTM: the loss, and the total with its weights."""
    settings = golden.hyperparameters
    loss = ttm.ttm_loss(golden["logits_student"], golden["logits_teacher"], gamma=settings["gamma"])
    task = settings["ce_weight"] * cross_entropy(golden["logits_student"], golden["target"])
    distillation = settings["kd_weight"] * loss
    return {
        "out.loss": loss,
        "out.loss_ce_weighted": task,
        "out.loss_kd_weighted": distillation,
        "out.loss_total": task + distillation,
    }


CASE = Case(
    "ttm",
    golden=reproduce,
    variants=({}, {"gamma": 2.0}),
    legal=({"gamma": 1.0}, {"gamma": 1e-3}, {"gamma": 5.0}),
    illegal=({"gamma": 0.0}, {"gamma": -0.1}, {"gamma": math.inf}, {"gamma": math.nan}),
    invariances=("sample_order", "logit_shift"),
    functions=(
        lambda s, t: ttm.ttm_rows(s.flatten(1), t.flatten(1)),
        lambda s, t: ttm.ttm_loss(s.flatten(1), t.flatten(1)),
    ),
)


def by_hand(s_BC: Tensor, t_BC: Tensor, *, gamma: float) -> Tensor:
    """With powers of probabilities, as the paper writes it."""
    q = t_BC.softmax(1) ** gamma
    q = q / q.sum(1, keepdim=True)
    return (q * (q / s_BC.softmax(1)).log()).sum(1)


def test_ttm_objective() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * by_hand(s.logits, t.logits, gamma=0.3).mean()

    Objective(CASE, {"gamma": 0.3, "ce_weight": 0.5, "kd_weight": 7.0}).check(expected)


def test_ttm_transforms_by_default_as_for_the_published_pair() -> None:
    s, t = maps((3, 5), (3, 5))
    assert ttm.ttm_loss(s, t).item() == pytest.approx(by_hand(s, t, gamma=0.1).mean().item(), rel=1e-12)
    assert (ttm.TTM().gamma, ttm.TTM().kd_weight) == (0.1, 10.0)
    assert ttm.TTM.published["cifar100"]["vgg13/vgg8"] == {"gamma": 0.1, "kd_weight": 45.0}


def test_ttm_without_a_transform_is_kd_at_temperature_1() -> None:
    s, t = maps((3, 5), (3, 5))
    expected = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
    torch.testing.assert_close(ttm.ttm_loss(s, t, gamma=1.0), expected)


def test_ttm_is_zero_for_the_transformed_teacher_alone() -> None:
    (t,) = maps((3, 5))
    assert ttm.ttm_loss(0.3 * t, t, gamma=0.3).item() == pytest.approx(0, abs=1e-15)
    assert ttm.ttm_loss(t, t, gamma=0.3).item() > 0.01


def test_ttm_keeps_shares_that_float32_cannot_hold() -> None:
    """The second class has the share e^-200, which is 0 in float32; its power 0.01 has 12 % of the transformed one."""
    s, t = torch.zeros(1, 2), torch.tensor([[200.0, 0.0]])
    q = math.exp(-2) / (1 + math.exp(-2))
    expected = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
    assert ttm.ttm_loss(s, t, gamma=0.01).item() == pytest.approx(expected, rel=1e-6)


def test_ttm_says_that_gamma_acts_on_nothing() -> None:
    assert ttm.TTM().unused_options() == {}
    assert ttm.TTM(kd_weight=0.0).unused_options().keys() == {"gamma"}
