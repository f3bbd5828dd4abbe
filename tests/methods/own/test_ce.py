"""Cross entropy: its case, and what the contract suite does not test."""

from __future__ import annotations

import math

import pytest
import torch

from vrm import methods
from vrm.contract import NO_TEACHER, Batch, Outputs, Progress, Views

from ..harness import Case

CASE = Case("ce", invariances=("sample_order", "logit_shift"))


def test_it_needs_no_teacher() -> None:
    method = methods.load("ce")()
    assert not method.needs.teacher
    logits, target = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), torch.tensor([1, 0])
    at = Progress(torch.tensor(1), torch.tensor(0), 1, 1)
    losses = method(Views(Outputs(logits)), NO_TEACHER, Batch(torch.arange(2), target), at)
    assert list(losses) == ["ce"]
    assert float(losses.total()) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
