"""CRLD: its case, and what the contract suite does not test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.divergences import cross_entropy
from vrm.methods.crld import CRLD, confident, crld_loss

from ..harness import Case, Golden, Outcome
from ..objective import maps
from ..worlds import assemble, build, draw, pair_of, progress


def reproduce(golden: Golden) -> Outcome:
    """CRLD: both terms with their weights and either kind of masks, both cross entropies, the total, and the masks."""
    settings = golden.hyperparameters
    student, teacher = (
        (golden[f"logits_{network}_weak"], golden[f"logits_{network}_strong"]) for network in ("student", "teacher")
    )
    options = {
        "temperature": settings["temperature"],
        "tau_weak": settings["tau_w"],
        "tau_strong": settings["tau_s"],
    }
    weights = settings["wv_weight"], settings["cv_weight"]
    wv, cv = (weight * loss for weight, loss in zip(weights, crld_loss(student, teacher, **options), strict=True))
    alternative = crld_loss(student, teacher, **options, masks="teacher_view")
    wv_view, cv_view = (weight * loss for weight, loss in zip(weights, alternative, strict=True))
    task = settings["ce_weight"] * sum(cross_entropy(view, golden["target"]) for view in student)
    return {
        "out.loss_wv_weighted": wv,
        "out.loss_cv_weighted": cv,
        "out.loss": wv + cv,
        "out.loss_ce_weighted": task,
        "out.loss_total": task + wv + cv,
        "alt.loss_wv_weighted_mask_per_teacher_view": wv_view,
        "alt.loss_cv_weighted_mask_per_teacher_view": cv_view,
        "alt.mask_weak": confident(teacher[0], threshold=settings["tau_w"]),
        "alt.mask_strong": confident(teacher[1], threshold=settings["tau_s"]),
    }


PARTLY = {"tau_weak": 0.6, "tau_strong": 0.5}
"""Thresholds that some of the made-up samples reach."""

CASE = Case(
    "crld",
    golden=reproduce,
    variants=({}, PARTLY, {**PARTLY, "masks": "teacher_view"}, {"tau_weak": 1.0, "tau_strong": 1.0}),
    alternatives={
        "tau_weak": ({}, {"tau_weak": 0.6}),
        "tau_strong": ({}, {"tau_strong": 0.5}),
        "masks": (PARTLY, {**PARTLY, "masks": "teacher_view"}),
        "within_weight": (PARTLY, {**PARTLY, "within_weight": 1.0}),
        "cross_weight": (PARTLY, {**PARTLY, "cross_weight": 1.0}),
    },
    legal=({"tau_weak": 0.0}, {"tau_strong": 1.0}, {"temperature": 0.5}),
    illegal=(
        {"temperature": 0.0},
        {"tau_weak": -0.1},
        {"tau_weak": 1.1},
        {"tau_strong": -0.1},
        {"tau_strong": 90.0},
        {"masks": "sample"},
    ),
    invariances=("sample_order", "logit_shift"),
    functions=(
        lambda s, t: torch.stack(crld_loss(halves(s), halves(t), tau_weak=0.0, tau_strong=0.0)),
        lambda s, t: torch.stack(crld_loss(halves(s), halves(t), tau_weak=0.0, masks="teacher_view")),
    ),
)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """A map as the logits of two views."""
    left, right = x.flatten(1).split(50, dim=1)
    return left, right


def kl(s: Tensor, t: Tensor) -> float:
    """Of one row of logits, at temperature 2, with its square."""
    p, q = (s / 2).softmax(0), (t / 2).softmax(0)
    return float(4 * (q * (q / p).log()).sum())


@pytest.mark.parametrize("masks", ["term", "teacher_view"])
def test_crld_objective(masks: str) -> None:
    """Sample by sample, with one confident in neither view of the teacher, in one and in both."""
    options = {"temperature": 2.0, "masks": masks, "ce_weight": 0.5, "within_weight": 3.0, "cross_weight": 5.0}
    method = build(CASE, {**options, "tau_weak": 0.6, "tau_strong": 0.7}, pair_of(CASE))
    inputs = draw(method, pair_of(CASE), size=4)
    for view, peaks in ((0, (0.0, 9.0, 0.0, 9.0)), (1, (0.0, 0.0, 9.0, 9.0))):
        logits = inputs.teacher[view, "logits"]
        logits[:] = logits / 10
        logits[:, 2] += torch.tensor(peaks)
    student, teacher = assemble(inputs.student), assemble(inputs.teacher)
    losses = method(student, teacher, inputs.batch, progress(method.phases[0]))
    assert list(losses) == ["ce_real", "ce_virtual", "within", "cross"]

    within = cross = 0.0
    s, t = ([view.logits.detach() for view in views.each()] for views in (student, teacher))
    for b, confidence in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        k = [[kl(s[i][b], t[j][b]) for j in range(2)] for i in range(2)]
        if masks == "term":
            within += confidence[0] * (k[0][0] + k[1][1])
            cross += confidence[1] * (k[1][0] + k[0][1])
        else:
            within += confidence[0] * k[0][0] + confidence[1] * k[1][1]
            cross += confidence[0] * k[1][0] + confidence[1] * k[0][1]
    target = inputs.batch.target
    task = F.cross_entropy(s[0], target) + F.cross_entropy(s[1], target)
    expected = 0.5 * float(task) + 3 * within / 4 + 5 * cross / 4
    assert losses.total().item() == pytest.approx(expected, rel=1e-12)
    assert losses["within"].value.item() == pytest.approx(within / 4, rel=1e-12)


def test_crld_thresholds_are_inclusive_and_of_unsoftened_predictions() -> None:
    """Two classes of equal logits have confidence one half exactly, whatever the temperature."""
    logits = torch.tensor([[3.0, 3.0], [3.0, 3.1], [3.1, 3.0], [0.0, -50.0]])
    assert confident(logits, threshold=0.5).tolist() == [1, 1, 1, 1]
    assert confident(logits, threshold=0.5 + 1e-3).tolist() == [0, 1, 1, 1]
    assert confident(logits, threshold=1.0).tolist() == [0, 0, 0, 1]
    weak, strong = maps((4, 3), (4, 3))
    sure = (torch.eye(4)[:, :3] * 3 + 1).double()  # 0.91 at temperature 1, 0.51 at temperature 4; the last row 1/3
    (within, _), (masked, _) = (
        crld_loss((weak, strong), (sure, strong), temperature=4.0, tau_weak=tau) for tau in (0.9, 0.95)
    )
    assert within.item() > 0
    assert masked.item() == 0


def test_crld_confidence_of_half_precision_is_not_rounded() -> None:
    """The probability is 0.8991. In bfloat16 it would be the same as 0.9."""
    assert confident(torch.tensor([[2.1875, 0.0]], dtype=torch.bfloat16), threshold=0.9).tolist() == [0]


def test_crld_divides_by_all_samples() -> None:
    (weak, strong), teacher = maps((4, 3), (4, 3)), maps((4, 3), (4, 3), seed=1)
    teacher[0][1:] /= 100
    teacher[0][0] *= 100
    alone = crld_loss((weak[:1], strong[:1]), (teacher[0][:1], teacher[1][:1]))[0]
    assert alone.item() > 0
    torch.testing.assert_close(crld_loss((weak, strong), (teacher[0], teacher[1]))[0], alone / 4)


@pytest.mark.parametrize("masks", ["term", "teacher_view"])
def test_crld_of_no_confident_sample_is_exactly_zero(masks: str) -> None:
    student, teacher = maps((5, 7), (5, 7)), maps((5, 7), (5, 7), seed=1)
    for x in student:
        x.requires_grad_()
    losses = crld_loss((student[0], student[1]), (teacher[0], teacher[1]), tau_weak=1, tau_strong=1, masks=masks)
    for loss in losses:
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, student, retain_graph=True):
            assert not gradient.any()


def test_crld_says_what_has_no_effect() -> None:
    assert CRLD().unused_options() == {}
    assert CRLD(within_weight=0.0).unused_options().keys() == {"tau_weak"}
    assert CRLD(cross_weight=0.0).unused_options().keys() == {"tau_strong"}
    assert CRLD(cross_weight=0.0, masks="teacher_view").unused_options() == {}
    nothing = CRLD(within_weight=0.0, cross_weight=0.0).unused_options()
    assert nothing.keys() == {"temperature", "tau_weak", "tau_strong", "masks"}
