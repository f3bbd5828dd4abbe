"""NKD: its case, and what the contract suite does not test."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.methods import nkd

from ..harness import Case, Golden, Outcome
from ..objective import Objective, maps


def reproduce(golden: Golden) -> Outcome:
    """NKD: the loss of hard or soft labels, and its first term alone."""
    target = golden["target"] if "in.target" in golden.tensors else golden["target_prob"]
    logits = golden["logits_student"], golden["logits_teacher"], target
    return {
        "out.loss": nkd.nkd_loss(*logits, **{name: golden.hyperparameters[name] for name in ("gamma", "temperature")}),
        "out.loss_target": nkd.target_rows(*logits).mean(),
    }


TARGET = torch.tensor([0, 2, 1])
CASE = Case(
    "nkd",
    golden=reproduce,
    variants=({}, {"temperature": 3.0}, {"keep_target": True, "temperature": 2.0}),
    legal=({"temperature": 0.5}, {"gamma": 0.0}),
    illegal=({"temperature": 0.0}, {"temperature": -1.0}, {"temperature": math.inf}),
    invariances=("sample_order", "logit_shift"),
    functions=(
        lambda s, t: nkd.target_rows(s.flatten(1), t.flatten(1), TARGET),
        lambda s, t: nkd.nontarget_rows(s.flatten(1), t.flatten(1), TARGET),
        lambda s, t: nkd.nkd_loss(s.flatten(1), t.flatten(1), TARGET),
    ),
)


def by_hand(
    s_BC: Tensor, t_BC: Tensor, target_B: Tensor, *, gamma: float, temperature: float, keep_target: bool
) -> Tensor:
    """Sample by sample, with probabilities of the classes that count."""
    losses = []
    for s, t, target in zip(s_BC, t_BC, target_B.tolist(), strict=True):
        others = [c for c in range(len(s)) if keep_target or c != target]
        ph, qh = ((x[others] / temperature).softmax(0) for x in (s, t))
        loss = -t.softmax(0)[target] * s.softmax(0)[target].log()
        losses.append(loss - gamma * temperature**2 * (qh * ph.log()).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("keep_target", [False, True])
def test_nkd_objective(keep_target: bool) -> None:
    options = {"gamma": 2.5, "temperature": 3.0, "keep_target": keep_target}

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(s.logits, target) + by_hand(s.logits, t.logits, target, **options).mean()

    Objective(CASE, {"ce_weight": 0.5, **options}).check(expected)


@pytest.mark.parametrize("keep_target", [False, True])
def test_nkd_function_by_hand(keep_target: bool) -> None:
    """Also the default temperature and weight."""
    s, t = maps((3, 5), (3, 5))
    options = {"gamma": 2.5, "temperature": 3.0, "keep_target": keep_target}
    expected = by_hand(s, t, TARGET, **options).mean()
    assert nkd.nkd_loss(s, t, TARGET, **options).item() == pytest.approx(expected.item(), rel=1e-12)
    expected = by_hand(s, t, TARGET, gamma=1.5, temperature=1.0, keep_target=False).mean()
    assert nkd.nkd_loss(s, t, TARGET).item() == pytest.approx(expected.item(), rel=1e-12)


def test_nkd_of_two_classes_has_no_other_classes_to_learn_from() -> None:
    """Value and gradient are exactly 0, for logits of any size."""
    for scale in (1.0, 1e4):
        s, t = maps((3, 2), (3, 2), dtype=torch.float32)
        s = (scale * s).requires_grad_()
        loss = nkd.nontarget_rows(s, scale * t, torch.tensor([0, 1, 1]), temperature=3.0)
        assert loss.tolist() == [0, 0, 0]
        (grad,) = torch.autograd.grad(loss.sum(), s)
        assert not grad.any()


@pytest.mark.parametrize("shift", [0.0, -1e4])
def test_nkd_keeps_the_digits_of_the_other_classes_beside_a_certain_target(shift: float) -> None:
    """Their shares are below the resolution of the target's, and no constant such as -1000 would hide it."""
    s, t = (x + shift for x in maps((3, 5), (3, 5), dtype=torch.float32))
    s, t = (x.scatter_add(1, TARGET[:, None], torch.full((3, 1), 3e4)) for x in (s, t))
    expected = by_hand(s.double(), t.double(), TARGET, gamma=1.0, temperature=1.0, keep_target=False)
    torch.testing.assert_close(nkd.nontarget_rows(s, t, TARGET), expected.float(), rtol=1e-6, atol=0)


def test_nkd_of_soft_labels_takes_the_largest_share() -> None:
    s, t = maps((3, 4), (3, 4))
    soft = torch.tensor([[0.6, 0.4, 0, 0], [0, 0.3, 0.7, 0], [0.1, 0.5, 0.2, 0.2]])
    assert nkd.nkd_loss(s, t, soft).item() == nkd.nkd_loss(s, t, TARGET).item()


def test_nkd_says_which_options_act_on_nothing() -> None:
    assert nkd.NKD().unused_options() == {}
    assert nkd.NKD(gamma=0.0).unused_options().keys() == {"temperature", "keep_target"}
