"""CC where the reference vectors do not reach."""

from __future__ import annotations

import pytest
import torch

from vrm.methods.cc import cc_loss


def test_neighbours_are_multiplied() -> None:
    student, teacher = torch.tensor([[1.0, -2.0], [3.0, 0.5], [0.0, 1.0]]), torch.zeros(3, 2)
    assert float(cc_loss(student, teacher)) == pytest.approx(((1 * 3 + 2 * 0.5) + (0 + 0.5 * 1)) / 2)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of one"):
        cc_loss(torch.ones(1, 2), torch.zeros(1, 2))
