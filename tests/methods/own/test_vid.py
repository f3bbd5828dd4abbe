"""VID: its case, and what the contract suite does not test."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.methods import vid
from vrm.projectors import to_smaller

from ..harness import STAGE_1, Case, Golden, Outcome
from ..objective import WEIGHTS, Objective
from ..worlds import PAIRS


def reproduce(golden: Golden) -> Outcome:
    """VID: regressors with their variances, sum over stages."""
    settings = golden.hyperparameters
    losses = []
    for i, (s, t) in enumerate(zip(golden.stages("feat_student"), golden.stages("feat_teacher"), strict=True)):
        s, t = to_smaller(s, t)
        regressor = vid.VariationalRegressor(
            s.shape[1], t.shape[1], variance=settings["init_pred_var"], eps=settings["eps"], learn_variance=True
        )
        names = {f"conv{k}.weight": f"mean.{2 * k}.weight" for k in range(3)} | {"log_scale": "log_scale"}
        golden.load(regressor, {f"stage.{i}.{theirs}": ours for theirs, ours in names.items()})
        mean, variance = regressor(s)
        losses.append(vid.vid_loss(mean, t, variance))
    stages = torch.stack(losses)
    log_scale = vid.initial_log_scale(settings["init_pred_var"], eps=settings["eps"])
    return {
        "out.loss": stages.sum(),
        "out.loss_per_stage": stages,
        "out.log_scale_at_init": torch.tensor([log_scale], dtype=torch.float64),
    }


CASE = Case(
    "vid",
    golden=reproduce,
    legal=({"eps": 1e-9, "initial_variance": 1.1e-9},),
    illegal=({"eps": 0.0}, {"initial_variance": 1e-5}, {"initial_variance": 1e-6}),
    alternatives={
        "student_taps": (STAGE_1, STAGE_1 | {"student_taps": ("stage2",)}),
        "teacher_taps": (STAGE_1, STAGE_1 | {"teacher_taps": ("stage2",)}),
    },
    invariances=("sample_order", "logit_shift"),
    functions=(lambda s, t: vid.vid_loss(s, t, torch.linspace(1, 2, 4)),),
)


def test_vid_objective() -> None:
    """Maps of the student twice as large are averaged before the regressors; variances begin at 3."""

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        losses = []
        for k, regressor in enumerate(method.get_submodule("regressors").children(), start=1):
            mean = regressor.mean(F.avg_pool2d(s.taps[f"stage{k}"], 2))
            losses.append((((mean - t.taps[f"stage{k}"]) ** 2 / 3 + math.log(3)) / 2).mean())
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * torch.stack(losses).sum()

    Objective(CASE, {"initial_variance": 3.0, "eps": 0.1, **WEIGHTS}, PAIRS["student_larger"], rtol=1e-6).check(
        expected
    )


def test_vid_variance_begins_where_it_is_told() -> None:
    for variance in (0.5, 5.0, 200.0):
        a = vid.initial_log_scale(variance, eps=0.1)
        assert math.log1p(math.exp(-abs(a))) + max(a, 0) + 0.1 == pytest.approx(variance, rel=1e-12)
    regressor = vid.VariationalRegressor(3, 4, variance=2.0, eps=0.1, learn_variance=False)
    mean, variance = regressor(torch.randn(2, 3, 5, 5))
    assert mean.shape == (2, 4, 5, 5)
    assert variance.tolist() == pytest.approx([2.0] * 4)
    assert not regressor.log_scale.requires_grad
