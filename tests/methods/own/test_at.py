"""AT: its case, and what the contract suite does not test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.methods import at

from ..harness import STAGE_1, Case, Golden, Outcome
from ..objective import WEIGHTS, Objective, in_stages, maps, smaller


def reproduce(golden: Golden) -> Outcome:
    """AT: sum over stages."""
    pairs = zip(golden.stages("feat_student"), golden.stages("feat_teacher"), strict=True)
    stages = torch.stack([at.at_loss(s, t, power=golden.hyperparameters["p"]) for s, t in pairs])
    return {"out.loss": stages.sum(), "out.loss_per_stage": stages}


CASE = Case(
    "at",
    golden=reproduce,
    legal=({"power": 1},),
    illegal=({"power": 0},),
    alternatives={
        "student_taps": (STAGE_1, STAGE_1 | {"student_taps": ("stage2",)}),
        "teacher_taps": (STAGE_1, STAGE_1 | {"teacher_taps": ("stage2",)}),
    },
    invariances=("sample_order", "logit_shift", "scale", "sample_scale", "channel_order", "mirror"),
    functions=(
        at.at_loss,
        lambda s, t: at.at_loss(s, smaller(t)),
        lambda s, t: at.at_loss(smaller(s), t),
        lambda s, t: at.attention(s),
    ),
)


def test_at_objective() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * in_stages(at.at_loss, s, t, power=3).sum()

    Objective(CASE, {"power": 3, **WEIGHTS}).check(expected)


@pytest.mark.parametrize("power", [1, 3, 4])
def test_at_with_other_powers(power: int) -> None:
    s, t = maps((2, 3, 6, 4), (2, 5, 3, 4))
    attentions = []
    for x in (F.adaptive_avg_pool2d(s, (3, 4)), t):
        a = (x**power).mean(1).flatten(1)
        attentions.append(a / a.norm(dim=1, keepdim=True))
    expected = ((attentions[0] - attentions[1]) ** 2).mean()
    assert at.at_loss(s, t, power=power).item() == pytest.approx(expected.item(), rel=1e-12)


def test_at_attention_of_edges() -> None:
    """An empty map stays empty; squares of a half type do not overflow."""
    assert not at.attention(torch.zeros(1, 2, 3, 3)).any()
    assert at.attention(torch.full((1, 2, 2, 2), 6e4, dtype=torch.float16)).tolist() == [[0.5] * 4]
