"""FitNets: its case, and what the contract suite does not test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm.contract import Method, Outputs, Phase, Progress
from vrm.methods import fitnet
from vrm.projectors import ConvRegressor

from ..harness import Case, Golden, Outcome, batch_norms
from ..objective import WEIGHTS, Objective
from ..worlds import PAIRS, Pair, build, draw


def reproduce(golden: Golden) -> Outcome:
    """FitNets: the regressor chosen by size, and the squared error."""
    s, t = golden["feat_student"], golden["feat_teacher"]
    regressor = ConvRegressor(tuple(s.shape[1:]), tuple(t.shape[1:]), relu=True)
    golden.load(regressor, {name: name for name, _ in regressor.named_parameters()})
    regressed = regressor(s)
    outcome = {"out.regressed": regressed, "out.loss": fitnet.fitnet_loss(regressed, t)}
    return outcome | batch_norms("after.", regressor)


CASE = Case(
    "fitnet",
    golden=reproduce,
    legal=({"hint_epochs": 1}, {"temperature": 0.5}),
    illegal=({"hint_epochs": 0}, {"temperature": 0.0}, {"temperature": -1.0}),
    variants=({}, {"two_stage": True}),
    alternatives={
        "student_tap": ({"teacher_tap": "stage2"}, {"student_tap": "stage1", "teacher_tap": "stage2"}),
        "teacher_tap": ({}, {"teacher_tap": "stage3"}),
    },
    invariances=("sample_order", "logit_shift"),
    functions=(fitnet.fitnet_loss,),
)


def test_fitnet_objective() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        hint = ((method.get_submodule("regressor")(s.taps["stage2"]) - t.taps["stage2"]) ** 2).mean()
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * hint

    Objective(CASE, WEIGHTS).check(expected)


def test_fitnet_two_stages_anneal_the_distillation() -> None:
    """Half the hint first, without batch norm; then distillation whose weight falls from 4 to 1 in ten epochs."""
    method = build(CASE, {"two_stage": True}, Pair())
    inputs = draw(method, Pair())
    student, teacher = inputs.views()

    def terms(phase: str, epoch: int = 1, num_epochs: int = 10) -> dict[str, tuple[float, float]]:
        at_epoch = Progress(torch.tensor(epoch), torch.tensor(0), num_epochs, 100, phase)
        losses = method(student, teacher, inputs.batch, at_epoch)
        return {name: (term.value.item(), float(term.weight)) for name, term in losses.items()}

    s, t = student.real.taps["stage2"], teacher.real.taps["stage2"]
    regressor = method.get_submodule("regressor")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in regressor.modules())
    assert terms("hint") == {"hint": (pytest.approx((0.5 * (regressor(s) - t) ** 2).mean().item()), 100.0)}
    p, q = ((x.real.logits / 3).softmax(1) for x in (student, teacher))
    divergence = (q * (q / p).log()).sum(1).mean().item()
    for epoch, weight in ((1, 4.0), (4, 3.0), (10, 1.0)):
        assert terms("main", epoch)["kd"] == (pytest.approx(divergence), pytest.approx(weight))
    assert terms("main", 1, 1)["kd"][1] == 4.0
    assert terms("main", 2, 2)["kd"][1] == 1.0
    assert list(terms("main")) == ["ce", "kd"]


def test_fitnet_hint_is_the_matching_stage() -> None:
    method = build(CASE, {"student_tap": "stage1"}, PAIRS["fewer_student_stages"])
    assert method.matched == (("stage1", "stage2"),)
    assert method.needs.teacher_taps == ("stage2",)
    with pytest.raises(
        ValueError, match="no stage of teacher matches 'stem' of student; set teacher_tap, or student_tap"
    ):
        build(CASE, {"student_tap": "stem"}, Pair())
    assert fitnet.FitNet().needs.teacher_taps == ("stages",)
    assert fitnet.FitNet(teacher_tap="stem").needs.teacher_taps == ("stem",)
    named = build(CASE, {"student_tap": "stem", "teacher_tap": "stage1"}, Pair())
    assert named.matched == (("stem", "stage1"),)
    for settings in ({"student_tap": "stage9"}, {"teacher_tap": "stage9"}):
        with pytest.raises(ValueError, match="has no tap 'stage9'"):
            build(CASE, settings, Pair())


def test_fitnet_phases() -> None:
    assert build(CASE, {}, Pair()).phases == (Phase(),)
    hint = Phase("hint", 7, terms=("hint",), schedule="constant")
    assert build(CASE, {"two_stage": True, "hint_epochs": 7}, Pair()).phases == (hint, Phase(terms=("ce", "kd")))


def test_fitnet_regressor_ends_in_a_relu() -> None:
    for settings in ({}, {"two_stage": True}):
        parts = list(build(CASE, settings, Pair()).get_submodule("regressor").children())
        assert isinstance(parts[-1], nn.ReLU)
        assert any(isinstance(part, nn.BatchNorm2d) for part in parts) == (not settings)
