"""PKT: its case, and what the contract suite does not test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.methods.pkt import pkt_loss, similarity_distribution

from ..harness import Case, Golden, Outcome
from ..objective import WEIGHTS, Objective, maps


def reproduce(golden: Golden) -> Outcome:
    """PKT: the loss."""
    return {"out.loss": pkt_loss(golden["feat_student"], golden["feat_teacher"], eps=golden.hyperparameters["eps"])}


CASE = Case(
    "pkt",
    golden=reproduce,
    invariances=("sample_order", "logit_shift", "rotation", "channel_order"),
    functions=(pkt_loss,),
)


def test_objective() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * pkt_loss(s.taps["pooled"], t.taps["pooled"])

    Objective(CASE, WEIGHTS).check(expected)


def test_eps_of_norms_and_logarithms() -> None:
    s, t = maps((4, 3), (4, 5))
    sides = []
    for x in (s, t):
        direction = x / (x.norm(dim=1)[:, None] + 0.25)
        similarity = (direction @ direction.T + 1) / 2
        distribution = similarity / similarity.sum(1)[:, None]
        sides.append((distribution, distribution + 0.25))
    (_, ours), (theirs, shifted) = sides
    expected = (theirs * (shifted / ours).log()).mean()
    torch.testing.assert_close(pkt_loss(s, t, eps=0.25), expected, rtol=1e-12, atol=0)


def test_eps_by_default() -> None:
    s, t = maps((4, 3), (4, 5))
    assert torch.equal(similarity_distribution(s), similarity_distribution(s, eps=1e-7))
    assert torch.equal(pkt_loss(s, t), pkt_loss(s, t, eps=1e-7))


def test_a_single_sample_says_nothing() -> None:
    s, t = maps((1, 3), (1, 5))
    assert pkt_loss(s, t).item() == 0
