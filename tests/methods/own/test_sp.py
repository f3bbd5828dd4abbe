"""SP: its case, and what the contract suite does not test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.methods.sp import similarities, sp_loss

from ..harness import Case, Golden, Outcome
from ..objective import WEIGHTS, Objective, maps


def reproduce(golden: Golden) -> Outcome:
    """SP: the loss of each pair of layers, and their sum."""
    stages = sp_loss(golden.stages("feat_student"), golden.stages("feat_teacher"))
    return {"out.loss_per_stage": stages, "out.loss": stages.sum()}


CASE = Case(
    "sp",
    golden=reproduce,
    variants=({}, {"student_taps": ("stages",), "teacher_taps": ("stages",)}),
    alternatives={
        "student_taps": ({}, {"student_taps": ("stage1",)}),
        "teacher_taps": ({}, {"teacher_taps": ("stage1",)}),
    },
    invariances=("sample_order", "logit_shift", "rotation", "scale", "channel_order", "mirror"),
    functions=(lambda s, t: sp_loss([s], [t]), lambda s, t: similarities(s)),
)


def test_objective() -> None:
    """Of all stages, whose losses add up."""

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        names = ("stage1", "stage2", "stage3")
        loss = sp_loss([s.taps[name] for name in names], [t.taps[name] for name in names])
        assert loss.shape == (3,)
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * loss.sum()

    Objective(CASE, {"student_taps": ("stages",), "teacher_taps": ("stages",), **WEIGHTS}).check(expected)


def test_similarities_are_scaled_by_row() -> None:
    features = torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 2.0]])
    expected = torch.tensor([[9 / 15, 12 / 15, 0], [12 / 20, 16 / 20, 0], [0, 0, 1]])
    torch.testing.assert_close(similarities(features), expected)
    assert not similarities(torch.zeros(2, 3)).any()


def test_a_single_sample_says_nothing() -> None:
    s, t = maps((1, 3), (1, 5))
    assert sp_loss([s], [t]).item() == 0
