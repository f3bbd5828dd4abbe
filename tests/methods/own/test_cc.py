"""CC: its case, and what the contract suite does not test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.methods.cc import CC, cc_loss

from ..harness import Case, Golden, Outcome
from ..objective import WEIGHTS, Objective, check_lifted


def reproduce(golden: Golden) -> Outcome:
    """CC: both embeddings, and the loss."""
    embedded = {}
    for network in ("student", "teacher"):
        features = golden[f"feat_{network}"].flatten(1)
        linear = torch.nn.Linear(features.shape[1], golden.hyperparameters["embed_dim"])
        golden.load(linear, {f"embed_{network}.{name}": name for name in ("weight", "bias")})
        embedded[network] = linear(features)
    return {
        "out.embedded_student": embedded["student"],
        "out.embedded_teacher": embedded["teacher"],
        "out.loss": cc_loss(embedded["student"], embedded["teacher"]),
    }


CASE = Case(
    "cc", golden=reproduce, legal=({"embed_dim": 1},), illegal=({"embed_dim": 0},), invariances=("logit_shift",)
)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of one"):
        cc_loss(torch.ones(1, 2), torch.zeros(1, 2))


def test_half_types_are_lifted() -> None:
    check_lifted(lambda s, t: cc_loss(s.flatten(1), t.flatten(1)))


def test_objective() -> None:
    """Of embeddings with bias, each network's own."""

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        assert isinstance(method, CC)
        a, b = method.embed_student, method.embed_teacher
        assert a.weight.shape == (8, 7)
        assert b.weight.shape == (8, 9)
        ours, theirs = s.taps["pooled"] @ a.weight.T + a.bias, t.taps["pooled"] @ b.weight.T + b.bias
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * cc_loss(ours, theirs)

    Objective(CASE, {"embed_dim": 8, **WEIGHTS}).check(expected)
