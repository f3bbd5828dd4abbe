"""Checks of the student: how images reach it, where that is not as the data are, and what it returns."""

from __future__ import annotations

import torch

from vrm.engine.process_state import undisturbed
from vrm.models.modes import evaluation_mode
from vrm.runs.assembly import Assembly
from vrm.runs.checks.table import Check
from vrm.runs.checks.teacher import check_kind
from vrm.runs.inputs import DATA, describe_input


def check_student(assembly: Assembly) -> tuple[Check, ...]:
    """Return a row for an input that is not that of the data, and one for outputs that are no logits."""
    loaded, tapped, store = assembly.student, assembly.distiller.student, assembly.data.test
    rows = []
    if loaded.card.channels == 1 or set(loaded.origins.values()) != {DATA}:
        rows.append(Check("student input", "ok", describe_input(loaded, assembly.data)))
    images = store.batch(torch.arange(min(8, len(store)), device=store.targets.device))
    with undisturbed(tapped), evaluation_mode(tapped), torch.no_grad():
        logits = tapped.forward(images).logits.float()
    output = check_kind("student", logits, tapped.probabilities)
    return (*rows, output) if output.result != "ok" or tapped.probabilities else tuple(rows)
