"""VRM with every edge in memory has the closed form's values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vrm import methods
from vrm.bench import naive_vrm
from vrm.config import ConfigError
from vrm.contract import Batch, Outputs, Progress, Views

from .small import measured, rows


def outputs(seed: int, views: int) -> Views:
    generator = torch.Generator().manual_seed(seed)
    made = [
        Outputs((2 * torch.randn(9, 7, generator=generator, dtype=torch.float64)).requires_grad_())
        for _ in range(1 + views)
    ]
    return Views(made[0], tuple(made[1:]))


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": 1.0}, {"keep": 0.5, "temperature": 2.0}, {"num_virtual_views": 2}, {"virtual_cross_entropy": False}],
)
def test_the_naive_form_has_the_closed_forms_values_and_gradients(options: dict[str, Any]) -> None:
    closed = methods.load("vrm")(**options)
    student, teacher = (outputs(seed, closed.needs.virtual_views) for seed in (0, 1))
    one = torch.ones((), dtype=torch.int64)
    context = Batch(torch.arange(9), torch.arange(9) % 7), Progress(one, one, 1, 1)
    found = []
    for form in (closed, naive_vrm.NaiveVRM(closed)):
        losses = form(student, teacher, *context)
        leaves = [view.logits for view in student.each()]
        found.append((losses, torch.autograd.grad(losses.total(), leaves)))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert list(ours) == list(theirs)
    for name in ours:
        assert (ours[name].weight, ours[name].role) == (theirs[name].weight, theirs[name].role)
        assert ours[name].value.item() == pytest.approx(theirs[name].value.item(), rel=1e-9)
    for mine, its in zip(our_gradients, their_gradients, strict=True):
        assert torch.allclose(mine, its, rtol=1e-8, atol=1e-12)
    assert naive_vrm.measure_disagreement(closed, student, teacher, *context) < 1e-9


@pytest.mark.parametrize(
    "options",
    [{"vertices": "features"}, {"matching": "huber"}, {"joint_entropy": "collision"}, {"prune_redundant": False}],
)
def test_the_naive_form_refuses_what_it_is_not_written_for(options: dict[str, Any]) -> None:
    closed = methods.load("vrm")(**options)
    with pytest.raises(ConfigError, match=f"vrm.{next(iter(options))}="):
        naive_vrm.NaiveVRM(closed)


def test_forms_that_disagree_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    methods.load("vrm")
    original = naive_vrm.graph_loss
    monkeypatch.setattr(naive_vrm, "graph_loss", lambda *a, **k: original(*a, **k) * (1 + 1e-5))
    found = measured("methods=[vrm]", "against=naive")
    assert [each["name"] for each in found["failed"]] == ["vrm naive"]
    assert "disagree by 1e-05" in found["failed"][0]["reason"]
    assert "vrm" in rows(found)


def test_both_forms_take_turns() -> None:
    methods.load("vrm")
    found = rows(measured("methods=[vrm]", "against=naive", "vrm.keep=0.5"))
    assert found["vrm naive"]["disagreement_of_forms"] < 1e-9
    assert found["vrm"]["disagreement_of_forms"] is None
    assert found["vrm naive"]["over_unchanged"] > 0
    assert found["vrm naive"]["options"]["keep"] == 0.5
