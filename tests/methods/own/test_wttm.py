"""WTTM: its case, and what the contract suite does not test."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.divergences import cross_entropy
from vrm.methods import wttm

from ..harness import Case, Golden, Outcome
from ..objective import Objective, maps


def reproduce(golden: Golden) -> Outcome:
    """WTTM: the loss, and the total with its weights."""
    settings = golden.hyperparameters
    loss = wttm.wttm_loss(golden["logits_student"], golden["logits_teacher"], gamma=settings["gamma"])
    task = settings["ce_weight"] * cross_entropy(golden["logits_student"], golden["target"])
    distillation = settings["kd_weight"] * loss
    return {
        "out.loss": loss,
        "out.loss_ce_weighted": task,
        "out.loss_kd_weighted": distillation,
        "out.loss_total": task + distillation,
    }


CASE = Case(
    "wttm",
    golden=reproduce,
    variants=({}, {"gamma": 2.0}),
    legal=({"gamma": 1.0}, {"gamma": 1e-3}, {"gamma": 5.0}),
    illegal=({"gamma": 0.0}, {"gamma": -0.1}, {"gamma": math.inf}, {"gamma": math.nan}),
    invariances=("sample_order", "logit_shift"),
    functions=(
        lambda s, t: wttm.wttm_rows(s.flatten(1), t.flatten(1)),
        lambda s, t: wttm.wttm_loss(s.flatten(1), t.flatten(1)),
    ),
)


def by_hand(s_BC: Tensor, t_BC: Tensor, *, gamma: float) -> Tensor:
    """With powers of probabilities, as the paper writes it."""
    power = t_BC.softmax(1) ** gamma
    q = power / power.sum(1, keepdim=True)
    return power.sum(1) * (q * (q / s_BC.softmax(1)).log()).sum(1)


def test_wttm_objective() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * by_hand(s.logits, t.logits, gamma=0.3).mean()

    Objective(CASE, {"gamma": 0.3, "ce_weight": 0.5, "kd_weight": 7.0}).check(expected)


def test_wttm_is_by_default_that_of_the_published_pair() -> None:
    s, t = maps((3, 5), (3, 5))
    assert wttm.wttm_loss(s, t).item() == pytest.approx(by_hand(s, t, gamma=0.2).mean().item(), rel=1e-12)
    assert (wttm.WTTM().gamma, wttm.WTTM().kd_weight) == (0.2, 4.0)


def test_wttm_without_a_transform_is_kd_at_temperature_1() -> None:
    s, t = maps((3, 5), (3, 5))
    expected = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
    torch.testing.assert_close(wttm.wttm_loss(s, t, gamma=1.0), expected)


def test_wttm_weight_is_between_that_of_a_certain_and_that_of_a_flat_prediction() -> None:
    """1 and C^(1 - gamma), also where the flat logits are large and the shares vanish in float32."""
    logits = torch.tensor([[1e4, 0, 0, 0], [1e4, 1e4, 1e4, 1e4], [0, 0, 0, 0]])
    assert wttm.power_sum(logits, gamma=0.25).tolist() == pytest.approx([1, 4**0.75, 4**0.75], rel=1e-6)
    assert wttm.power_sum(logits, gamma=3.0).tolist() == pytest.approx([1, 4**-2, 4**-2], rel=1e-6)
    small = torch.tensor([[200.0, 0.0]])
    assert wttm.power_sum(small, gamma=0.01).item() == pytest.approx(1 + math.exp(-2), rel=1e-6)


def test_wttm_says_that_gamma_acts_on_nothing() -> None:
    assert wttm.WTTM().unused_options() == {}
    assert wttm.WTTM(kd_weight=0.0).unused_options().keys() == {"gamma"}
