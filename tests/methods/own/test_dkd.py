"""DKD: its case, and what the contract suite does not test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs, Progress
from vrm.divergences import cross_entropy
from vrm.methods import dkd

from ..harness import Case, Golden, Outcome
from ..objective import Objective, maps


def reproduce(golden: Golden) -> Outcome:
    """DKD: both divergences, their weighted sum, and the total under the ramp."""
    settings = golden.hyperparameters
    logits = golden["logits_student"], golden["logits_teacher"], golden["target"]
    temperature = settings["temperature"]
    loss = dkd.dkd_loss(*logits, alpha=settings["alpha"], beta=settings["beta"], temperature=temperature)
    epoch = torch.tensor(settings["epoch"], dtype=torch.float64)
    ramp = Progress(epoch, epoch, 0, 0).ramp(settings["warmup_epochs"])
    task = settings["ce_weight"] * cross_entropy(golden["logits_student"], golden["target"])
    return {
        "out.loss": loss,
        "out.tckd": dkd.tckd_loss(*logits, temperature=temperature),
        "out.nckd": dkd.nckd_loss(*logits, temperature=temperature),
        "out.loss_ce_weighted": task,
        "out.loss_kd_weighted": ramp * loss,
        "out.loss_total": task + ramp * loss,
    }


TARGET = torch.tensor([0, 2, 1])
CASE = Case(
    "dkd",
    golden=reproduce,
    legal=({"warmup_epochs": 1}, {"temperature": 0.5}),
    illegal=({"warmup_epochs": 0}, {"temperature": 0.0}, {"temperature": -1.0}),
    invariances=("sample_order", "logit_shift"),
    functions=(
        lambda s, t: dkd.dkd_loss(s.flatten(1), t.flatten(1), TARGET),
        lambda s, t: dkd.tckd_loss(s.flatten(1), t.flatten(1), TARGET),
        lambda s, t: dkd.nckd_loss(s.flatten(1), t.flatten(1), TARGET),
    ),
)


def test_dkd_objective() -> None:
    """Under a ramp of four epochs."""
    options = {"alpha": 0.75, "beta": 3.0, "temperature": 2.0}

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(s.logits, target) + 2 / 4 * dkd.dkd_loss(s.logits, t.logits, target, **options)

    Objective(CASE, {"ce_weight": 0.5, "warmup_epochs": 4, **options}).check(expected)


def test_dkd_weighs_its_terms() -> None:
    s, t = maps((3, 5), (3, 5))
    tckd, nckd = (loss(s, t, TARGET, temperature=2.0).item() for loss in (dkd.tckd_loss, dkd.nckd_loss))
    actual = dkd.dkd_loss(s, t, TARGET, alpha=0.5, beta=3.0, temperature=2.0)
    assert actual.item() == pytest.approx(0.5 * tckd + 3.0 * nckd, rel=1e-12)


def test_dkd_drops_the_target() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert dkd.drop_target(x, torch.tensor([0, 3, 1])).tolist() == [[1, 2, 3], [4, 5, 6], [8, 10, 11]]


def test_dkd_of_two_classes_has_no_other_classes_to_compare() -> None:
    s, t = maps((3, 2), (3, 2))
    assert dkd.nckd_loss(s, t, torch.tensor([0, 1, 1])).item() == 0
