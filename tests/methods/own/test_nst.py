"""NST: its case, and what the contract suite does not test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import Method, Outputs
from vrm.methods import nst

from ..harness import STAGE_1, Case, Golden, Outcome
from ..objective import WEIGHTS, Objective, in_stages, maps, smaller


def reproduce(golden: Golden) -> Outcome:
    """NST: sum over stages."""
    pairs = zip(golden.stages("feat_student"), golden.stages("feat_teacher"), strict=True)
    kernel = {name: golden.hyperparameters[name] for name in ("degree", "offset")}
    stages = torch.stack([nst.nst_loss(s, t, **kernel) for s, t in pairs])
    return {"out.loss": stages.sum(), "out.loss_per_stage": stages}


CASE = Case(
    "nst",
    golden=reproduce,
    legal=({"degree": 1},),
    illegal=({"degree": 0},),
    alternatives={
        "student_taps": (STAGE_1, STAGE_1 | {"student_taps": ("stage2",)}),
        "teacher_taps": (STAGE_1, STAGE_1 | {"teacher_taps": ("stage2",)}),
    },
    invariances=("sample_order", "logit_shift", "scale", "sample_scale", "channel_order", "mirror"),
    functions=(nst.nst_loss, lambda s, t: nst.nst_loss(s, smaller(t)), lambda s, t: nst.nst_loss(smaller(s), t)),
)


def test_nst_objective() -> None:
    options = {"degree": 3, "offset": 0.5}

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * in_stages(nst.nst_loss, s, t, **options).sum()

    Objective(CASE, {**options, **WEIGHTS}).check(expected)


def test_nst_kernel_entry_by_entry() -> None:
    s, t = maps((2, 3, 4, 2), (2, 4, 2, 3))
    s_pooled, t_pooled = (F.adaptive_avg_pool2d(x, (2, 2)).flatten(2) for x in (s, t))
    u, v = (x / x.norm(dim=2, keepdim=True) for x in (s_pooled, t_pooled))

    def mean(a: Tensor, b: Tensor) -> float:
        values = [
            (torch.dot(a[n, i], b[n, j]).item() + 0.5) ** 3
            for n in range(2)
            for i in range(a.shape[1])
            for j in range(b.shape[1])
        ]
        return sum(values) / len(values)

    expected = mean(u, u) + mean(v, v) - 2 * mean(u, v)
    assert nst.nst_loss(s, t, degree=3, offset=0.5).item() == pytest.approx(expected, rel=1e-11)
