"""AB: its case, and what the contract suite does not test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm.contract import Method, Outputs, Phase
from vrm.methods import ab

from ..harness import STAGE_1_PRE, Case, Golden, Outcome, batch_norms
from ..objective import Objective
from ..worlds import Pair, build


def reproduce(golden: Golden) -> Outcome:
    """AB: connectors as released, loss of each stage, weighted sum."""
    students, teachers = golden.stages("feat_student"), golden.stages("feat_teacher")
    outcome: Outcome = {}
    losses = []
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if golden.hyperparameters["connectors"] is not None:
            connect = ab.connector(tuple(s.shape[1:]), tuple(t.shape[1:]))
            names = [name for name, _ in connect.named_parameters()]
            golden.load(connect, {f"connector.{i}.{name}": name for name in names})
            s = connect(s)
            outcome |= batch_norms(f"after.connector.{i}.", connect)
        outcome[f"out.connected_student.{i}"] = s
        losses.append(ab.ab_loss(s, t, margin=golden.hyperparameters["margin"]) * 2.0 ** (i + 1 - len(students)))
    stages = torch.stack(losses)
    return outcome | {"out.loss": stages.sum(), "out.loss_per_stage": stages}


CASE = Case(
    "ab",
    golden=reproduce,
    legal=({"margin": 0.0}, {"pretrain_epochs": 1}),
    illegal=({"margin": -0.1}, {"pretrain_epochs": 0}),
    alternatives={
        "student_taps": (STAGE_1_PRE, STAGE_1_PRE | {"student_taps": ("stage2:pre",)}),
        "teacher_taps": (STAGE_1_PRE, STAGE_1_PRE | {"teacher_taps": ("stage2:pre",)}),
    },
    invariances=("sample_order", "logit_shift"),
    refuses={
        "teacher_of_tokens": "no pre-activation taps",
        "student_ends_linear": "no pre-activation taps",
        "teacher_ends_linear": "no pre-activation taps",
    },
    functions=(ab.ab_loss,),
)


def test_ab_objective() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        losses = []
        for k, connector in enumerate(method.get_submodule("connectors").children(), start=1):
            name = f"stage{k}:pre"
            losses.append(ab.ab_loss(connector(s.taps[name]), t.taps[name], margin=2.0))
        return losses[0] / 4 + losses[1] / 2 + losses[2]

    Objective(CASE, {"margin": 2.0}, phase="pretrain").check(expected)
    Objective(CASE, {}).check(lambda method, s, t, target: F.cross_entropy(s.logits, target))


def test_ab_on_each_side_of_the_boundary() -> None:
    """Both margins, both sides of each, and a teacher at exactly zero, which is off."""
    s = torch.tensor([-3.0, -1.5, 0.5, 1.5, 3.0]).reshape(1, 1, 1, 5).double()
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    assert ab.ab_loss(s, zero, margin=2.0).item() == pytest.approx(0.003 * (0.5**2 + 2.5**2 + 3.5**2 + 5.0**2))
    assert ab.ab_loss(s, one, margin=2.0).item() == pytest.approx(0.003 * (5.0**2 + 3.5**2 + 1.5**2 + 0.5**2))
    assert ab.ab_loss(s, one).item() == pytest.approx(0.003 * (4.0**2 + 2.5**2 + 0.5**2))
    twice = torch.cat([s, s]), torch.cat([one, one])
    assert ab.ab_loss(*twice, margin=2.0).item() == pytest.approx(ab.ab_loss(s, one, margin=2.0).item())


def test_ab_connects_only_what_differs() -> None:
    assert isinstance(ab.connector((3, 4, 4), (3, 4, 4)), nn.Identity)
    for teacher in ((4, 4, 4), (3, 2, 2), (3, 4, 2)):
        parts = [type(part) for part in ab.connector((3, 4, 4), teacher).children()]
        assert parts == [nn.Conv2d, nn.BatchNorm2d]


def test_ab_phases() -> None:
    method = build(CASE, {}, Pair().of_equal_channels())
    assert method.phases == (
        Phase("pretrain", 30, terms=("ab",), schedule="constant"),
        Phase("main", terms=("ce",), trained=("student",)),
    )
