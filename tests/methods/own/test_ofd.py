"""OFD: its case, and what the contract suite does not test."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm import models
from vrm.contract import Batch, DataInfo, Method, Outputs, Phase, Views
from vrm.engine.distiller import run_teacher
from vrm.methods import ofd
from vrm.projectors import resize

from ..harness import STAGE_1_PRE, Case, Golden, Outcome, batch_norms
from ..objective import WEIGHTS, Objective
from ..worlds import PAIRS, Pair, build, progress


def reproduce(golden: Golden) -> Outcome:
    """OFD: connectors, margins, partial distance of each stage, weighted sum."""
    students, teachers = golden.stages("feat_student"), golden.stages("feat_teacher")
    outcome: Outcome = {}
    losses = []
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        connect = ofd.connector(s.shape[1], t.shape[1], kernel_size=golden.hyperparameters["connector_kernel_size"])
        names = {"conv.weight": "0.weight", "bn.weight": "1.weight", "bn.bias": "1.bias"}
        golden.load(connect, {f"connector.{i}.{theirs}": ours for theirs, ours in names.items()})
        s = connect(s)
        margins = ofd.margin(golden[f"teacher_bn_weight.{i}"], golden[f"teacher_bn_bias.{i}"])
        outcome |= {f"out.connected_student.{i}": s, f"out.margin.{i}": margins}
        outcome |= batch_norms(f"after.connector.{i}.", connect, {"1": "bn"})
        losses.append(ofd.ofd_loss(s, resize(t, (s.shape[2], s.shape[3])), margins))
    stages = torch.stack(losses)
    weights = 2.0 ** torch.arange(1 - len(students), 1, dtype=torch.float64)
    return outcome | {
        "out.loss": (weights * stages).sum(),
        "out.loss_per_stage_unweighted": stages,
        "out.stage_weight": weights,
    }


CASE = Case(
    "ofd",
    golden=reproduce,
    legal=({"kernel_size": 5},),
    illegal=({"kernel_size": 0}, {"kernel_size": -1}, {"kernel_size": 2}),
    elsewhere={"teacher_batch_statistics": "own/test_ofd.py::test_ofd_can_be_taught_as_released"},
    alternatives={
        "kernel_size": ({}, {"kernel_size": 3}),
        "student_taps": (STAGE_1_PRE, STAGE_1_PRE | {"student_taps": ("stage2:pre",)}),
        "teacher_taps": (STAGE_1_PRE, STAGE_1_PRE | {"teacher_taps": ("stage2:pre",)}),
    },
    invariances=("sample_order", "logit_shift"),
    refuses={
        "teacher_of_tokens": "teacher has none",
        "student_ends_linear": "no pre-activation taps",
        "teacher_ends_linear": "teacher has none",
    },
    functions=(lambda s, t: ofd.ofd_loss(s, t, torch.tensor([-0.5, -0.1, -2.0, -1.0])),),
)


def test_ofd_objective() -> None:
    """Maps of the teacher twice as large are averaged; the margins are those of its batch norms."""
    pair = PAIRS["teacher_larger"]

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        losses = []
        for k, connector in enumerate(method.get_submodule("connectors").children(), start=1):
            name = f"stage{k}:pre"
            norm = pair.probes()[1].norms[name]
            margins = ofd.margin(norm.weight, norm.bias).double()
            losses.append(ofd.ofd_loss(connector(s.taps[name]), F.avg_pool2d(t.taps[name], 2), margins))
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * (losses[0] / 4 + losses[1] / 2 + losses[2])

    Objective(CASE, WEIGHTS, pair).check(expected)


def test_ofd_margin_is_the_mean_of_the_negative_part() -> None:
    """Against numerical integration; where hardly anything is negative, and for a constant channel, as documented."""
    weight = torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0, 0.0]).double()
    bias = torch.tensor([0.3, -1.0, 1.0, 4.0, -0.7, 0.7]).double()
    actual = ofd.margin(weight, bias)
    for i in range(3):
        x = torch.linspace(-30, 0, 300001, dtype=torch.float64)
        density = torch.exp(-(((x - bias[i]) / weight[i]) ** 2) / 2)
        assert actual[i].item() == pytest.approx((x * density).sum().item() / density.sum().item(), rel=1e-3)
    assert actual[3:].tolist() == [-3.0, pytest.approx(-0.7), 0.0]
    assert ofd.margin(torch.full((1,), 2.0), torch.full((1,), 7.0)).item() == -6.0
    assert ofd.margin(weight.float(), bias.float()).dtype == torch.float32
    rare, rarer = ofd.margin(torch.ones(2), torch.tensor([3.05, 3.15])).tolist()  # on both sides of one in a thousand
    assert rare == pytest.approx(-0.28, abs=0.02)
    assert rarer == -3.0
    assert not ofd.margin(weight.clone().requires_grad_(), bias.clone().requires_grad_()).requires_grad


def test_ofd_regresses_where_it_matters() -> None:
    """Both sides of a positive target; only from above to a negative one, or to the margin below it."""
    t = torch.tensor([1.0, 1.0, -0.5, -0.5, -9.0, -9.0, 0.0]).reshape(1, 1, 1, 7).double()
    s = torch.tensor([2.0, 0.0, 1.0, -0.7, 1.0, -3.0, -1.0]).reshape(1, 1, 1, 7).double()
    loss = ofd.ofd_loss(s, t, torch.tensor([-2.0]).double())
    assert loss.item() == 1.0 + 1.0 + 1.5**2 + 0 + 3.0**2 + 0 + 0


def test_ofd_connector_is_initialised_as_released() -> None:
    torch.manual_seed(0)
    conv, norm = ofd.connector(300, 200, kernel_size=3)
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is None
    assert conv.padding == (1, 1)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 200)), rel=0.01)
    assert isinstance(norm, nn.BatchNorm2d)
    assert ofd.connector(3, 2)[0].kernel_size == (1, 1)
    assert ofd.connector(3, 2, kernel_size=5)[0].padding == (2, 2)


def test_ofd_can_be_taught_as_released() -> None:
    """By a teacher whose batch norms normalise by each batch: the loss is that of a teacher in train mode."""
    torch.manual_seed(0)
    student, teacher = (models.create("resnet8", num_classes=10) for _ in range(2))
    probes = [models.probe(network, name="resnet8", input_size=(8, 8)) for network in (student, teacher)]
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    taps, preprocess = probes[0].resolve(("stages:pre",)), models.Preprocess((0.5,) * 3, (0.2,) * 3)
    trained = models.TappedNetwork(copy.deepcopy(teacher), taps, preprocess).train()
    frozen = models.FrozenTeacher(models.TappedNetwork(teacher, taps, preprocess))
    learner = Views(models.TappedNetwork(student, taps, preprocess)(images))

    losses = []
    for by_batch in (True, False):
        torch.manual_seed(0)
        method = ofd.OFD(teacher_batch_statistics=by_batch)
        method.build(*probes, DataInfo(4, 10, 4, torch.arange(4)))
        for taught in (run_teacher(frozen, (images,), method.needs), Views(trained(images))):
            terms = method(learner, taught, Batch(torch.arange(4), torch.arange(4)), progress(Phase()))
            losses.append(terms["ofd"].value.item())
    as_released, in_train_mode, in_eval_mode, _ = losses
    assert as_released == in_train_mode
    assert abs(in_eval_mode - as_released) > 0.1 * as_released


def test_ofd_needs_batch_norms() -> None:
    with pytest.raises(ValueError, match="knows none for stage1 of teacher"):
        build(CASE, {"teacher_taps": ("stages",)}, Pair())
