"""AT where the reference vectors do not reach: other settings, half types, edges, the whole objective."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.methods import at

from ..objective import WEIGHTS, Objective, check_lifted, check_teacher_is_constant, in_stages, maps, smaller

FUNCTIONS = (
    at.at_loss,
    lambda s, t: at.at_loss(s, smaller(t)),
    lambda s, t: at.at_loss(smaller(s), t),
    lambda s, t: at.attention(s),
)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    check_lifted(function)
    check_teacher_is_constant(function)


def test_at_objective() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * in_stages(at.at_loss, s, t, power=3).sum()

    Objective("at", {"power": 3, **WEIGHTS}).check(expected)


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
