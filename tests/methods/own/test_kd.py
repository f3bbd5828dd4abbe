"""KD: its case, and what the contract suite does not test."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.divergences import cross_entropy
from vrm.methods.kd import kd_loss

from ..harness import Case, Golden, Outcome
from ..objective import Objective


def reproduce(golden: Golden) -> Outcome:
    """KD: the loss, and the total with its weights."""
    settings = golden.hyperparameters
    loss = kd_loss(golden["logits_student"], golden["logits_teacher"], temperature=settings["temperature"])
    task = cross_entropy(golden["logits_student"], golden["target"])
    task, distillation = settings["ce_weight"] * task, settings["kd_weight"] * loss
    return {
        "out.loss": loss,
        "out.loss_ce_weighted": task,
        "out.loss_kd_weighted": distillation,
        "out.loss_total": task + distillation,
    }


CASE = Case(
    "kd",
    golden=reproduce,
    legal=({"temperature": 0.5},),
    illegal=({"temperature": 0.0}, {"temperature": -1.0}),
    invariances=("sample_order", "logit_shift"),
    functions=(lambda s, t: kd_loss(s.flatten(1), t.flatten(1)),),
)


def test_objective() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * kd_loss(s.logits, t.logits, temperature=2.5)

    Objective(CASE, {"ce_weight": 0.5, "kd_weight": 7.0, "temperature": 2.5}).check(expected)
