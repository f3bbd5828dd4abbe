"""ReviewKD: its case, and what the contract suite does not test."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs, Progress
from vrm.methods import reviewkd
from vrm.projectors import as_map

from ..harness import Case, Golden, Outcome, batch_norms
from ..objective import Objective, maps
from ..worlds import PAIRS, Pair, build, draw, loss_of


def reproduce(golden: Golden) -> Outcome:
    """ReviewKD: fused maps from all maps and the pooled vectors, loss of each, sum under the ramp."""
    settings = golden.hyperparameters
    students, teachers = (
        [as_map(x) for x in (*golden.stages(f"feat_{who}"), golden[f"pooled_{who}"])] for who in ("student", "teacher")
    )
    shapes = ([tuple(x.shape[1:]) for x in maps] for maps in (students, teachers))
    review = reviewkd.Review(*shapes, mid_channels=settings["mid_channels"])
    ours = [name for name, _ in review.named_parameters()]
    golden.load(review, {name.replace("fusions", "abf").replace("attention", "att"): name for name in ours})
    fused = review(students)
    stages = torch.stack([reviewkd.hcl_loss(s, t) for s, t in zip(fused, teachers, strict=True)])
    epoch = torch.tensor(settings["epoch"], dtype=torch.float64)
    ramp = Progress(epoch, epoch, 0, 0).ramp(settings["warmup_epochs"])
    outcome = {f"out.fused_student.{i}": x for i, x in enumerate(fused)}
    return (
        outcome
        | batch_norms("after.", review, {"fusions": "abf"})
        | {
            "out.loss": stages.sum(),
            "out.loss_per_stage": stages,
            "out.loss_kd_weighted": settings["reviewkd_weight"] * ramp * stages.sum(),
        }
    )


CASE = Case(
    "reviewkd",
    golden=reproduce,
    legal=({"warmup_epochs": 1}, {"max_mid_channels": 1}),
    illegal=({"warmup_epochs": 0}, {"max_mid_channels": 0}),
    alternatives={
        "max_mid_channels": ({}, {"max_mid_channels": 2}),
        "student_taps": ({}, {"student_taps": ("stages:pre",)}),
        "teacher_taps": ({}, {"teacher_taps": ("stages",)}),
    },
    invariances=("sample_order", "logit_shift"),
    refuses={"teacher_of_tokens": "no pre-activation taps", "teacher_ends_linear": "no pre-activation taps"},
    functions=(reviewkd.hcl_loss,),
)


def test_reviewkd_objective() -> None:
    """Under a ramp of four epochs, with the pooled vectors as 1 x 1 maps."""

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        stages = [f"stage{k}" for k in (1, 2, 3)]
        fused = method.get_submodule("review")([*(s.taps[k] for k in stages), s.taps["pooled"][:, :, None, None]])
        targets = [*(t.taps[f"{k}:pre"] for k in stages), t.taps["pooled"][:, :, None, None]]
        losses = [reviewkd.hcl_loss(a, b) for a, b in zip(fused, targets, strict=True)]
        return 0.5 * F.cross_entropy(s.logits, target) + 3 * 2 / 4 * torch.stack(losses).sum()

    Objective(CASE, {"ce_weight": 0.5, "review_weight": 3.0, "warmup_epochs": 4}).check(expected)


def test_reviewkd_levels_below_the_height() -> None:
    """On height 4: the whole map, then 2 x 2 at half the weight, and 1 x 1 at a quarter."""
    s, t = maps((2, 3, 4, 6), (2, 3, 4, 6))
    expected = (s - t).pow(2).mean()
    for level, weight in ((2, 0.5), (1, 0.25)):
        pooled = F.adaptive_avg_pool2d(s - t, (level, level))
        expected = expected + weight * pooled.pow(2).mean()
    assert reviewkd.hcl_loss(s, t).item() == pytest.approx(expected.item() / 1.75, rel=1e-12)
    s, t = maps((2, 3, 1, 1), (2, 3, 1, 1))
    assert reviewkd.hcl_loss(s, t).item() == pytest.approx((s - t).pow(2).mean().item(), rel=1e-12)


def test_reviewkd_mid_channels_and_sizes() -> None:
    method = build(CASE, {}, PAIRS["rectangular"])
    assert method.matched == (*((f"stage{k}", f"stage{k}:pre") for k in (1, 2, 3)), ("pooled", "pooled"))
    fusions = list(method.get_submodule("review.fusions").children())
    assert [fusion.conv_in.out_channels for fusion in fusions] == [7] * 4
    assert [fusion.size for fusion in fusions] == [(8, 6), (4, 3), (2, 2), (1, 1)]
    assert [fusion.attention is None for fusion in fusions] == [False, False, False, True]
    narrow = build(CASE, {"max_mid_channels": 3}, Pair())
    assert next(narrow.get_submodule("review.fusions").children()).conv_in.out_channels == 3


def test_reviewkd_convolutions_are_initialised_as_released() -> None:
    """Kaiming uniform with a = 1: a bound of sqrt(3 / inputs)."""
    torch.manual_seed(0)
    fusion = reviewkd.Fusion((50, 4, 4), 40, (60, 4, 4), deepest=True)
    for conv, inputs in ((fusion.conv_in, 50), (fusion.conv_out, 40 * 9)):
        assert conv.bias is None
        assert conv.weight.abs().max().item() == pytest.approx(math.sqrt(3 / inputs), rel=0.02)


def test_reviewkd_of_one_sample_is_undefined() -> None:
    """The pooled vector is a 1 x 1 map, of which batch norm has one value a channel."""
    method = build(CASE, {}, Pair())
    assert method.needs.min_batch == 2
    inputs = draw(method, Pair(), size=1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        loss_of(method, inputs, method.phases[0])
