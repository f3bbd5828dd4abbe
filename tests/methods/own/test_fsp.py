"""FSP: its case, and what the contract suite does not test."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs, Phase
from vrm.methods import fsp

from ..harness import Case, Golden, Outcome
from ..objective import Objective, maps, smaller
from ..worlds import PAIRS, Pair, build


def reproduce(golden: Golden) -> Outcome:
    """FSP: matrices of neighbouring maps, sum over pairs."""
    flows = {
        who: [fsp.flow(bottom, top) for bottom, top in pairwise(golden.stages(f"feat_{who}"))]
        for who in ("student", "teacher")
    }
    pairs = torch.stack([fsp.fsp_loss(s, t) for s, t in zip(flows["student"], flows["teacher"], strict=True)])
    matrices = {f"out.fsp_{who}.{i}": matrix for who, each in flows.items() for i, matrix in enumerate(each)}
    return matrices | {"out.loss": pairs.sum(), "out.loss_per_pair": pairs}


STEM_1 = {"student_taps": ("stem", "stage1"), "teacher_taps": ("stem", "stage1")}


CASE = Case(
    "fsp",
    golden=reproduce,
    legal=({"pretrain_epochs": 1},),
    illegal=({"pretrain_epochs": 0},),
    same_channels=True,
    alternatives={
        "student_taps": (STEM_1, STEM_1 | {"student_taps": ("stem", "stage1:pre")}),
        "teacher_taps": (STEM_1, STEM_1 | {"teacher_taps": ("stem", "stage1:pre")}),
    },
    invariances=("sample_order", "logit_shift"),
    refuses={"teacher_of_tokens": "no tap 'stem'"},
    functions=(lambda s, t: fsp.fsp_loss(fsp.flow(s, smaller(s)), fsp.flow(smaller(t), t)),),
)


def test_fsp_objective() -> None:
    """From the stem to the last stage, each map with the next."""

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        names = ["stem", "stage1", "stage2", "stage3"]
        flows = [[fsp.flow(x.taps[a], x.taps[b]) for a, b in pairwise(names)] for x in (s, t)]
        return torch.stack([(a - b).pow(2).mean() for a, b in zip(*flows, strict=True)]).sum()

    pair = PAIRS["teacher_larger"].of_equal_channels()
    Objective(CASE, {}, pair, "pretrain").check(expected)
    Objective(CASE, {}, pair).check(lambda method, s, t, target: F.cross_entropy(s.logits, target))


def test_fsp_flow_entry_by_entry() -> None:
    """Rectangular maps: each side is averaged to the smaller."""
    bottom, top = maps((2, 3, 6, 2), (2, 4, 3, 4))
    small_bottom, small_top = F.adaptive_avg_pool2d(bottom, (3, 2)), F.adaptive_avg_pool2d(top, (3, 2))
    expected = torch.einsum("bqhw,bphw->bpq", small_bottom, small_top) / 6
    assert torch.allclose(fsp.flow(bottom, top), expected, rtol=1e-12)


def test_fsp_needs_two_maps_of_equal_channels() -> None:
    case = CASE
    alone = {"student_taps": ("stem",), "teacher_taps": ("stem",)}
    with pytest.raises(ValueError, match="needs two at least"):
        build(case, alone, Pair().of_equal_channels())
    with pytest.raises(ValueError, match="stem of student has 3 and stem of teacher has 4"):
        build(case, {}, Pair())


def test_fsp_phases() -> None:
    method = build(CASE, {}, Pair().of_equal_channels())
    assert method.phases == (
        Phase("pretrain", 30, terms=("fsp",), schedule="constant"),
        Phase("main", terms=("ce",)),
    )
