"""The methods under test: one entry a method, in alphabetical order."""

from __future__ import annotations

from vrm.divergences import cross_entropy
from vrm.methods.kd import kd_loss

from .harness import Case, Golden, Outcome


def kd(golden: Golden) -> Outcome:
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


CASES = (
    Case("ce", invariances=("sample_order", "logit_shift")),
    Case("kd", golden=kd, invariances=("sample_order", "logit_shift")),
)
