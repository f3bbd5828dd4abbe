"""What the tests of single methods share: random maps, a method's whole objective, and what every function promises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vrm.contract import Method, Outputs

from .harness import Case
from .worlds import PAIRS, Pair, build, draw, loss_of, progress

WEIGHTS = {"ce_weight": 0.5, "feature_weight": 7.0}


def maps(*sizes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random signed tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def smaller(x: Tensor) -> Tensor:
    """A part of a map."""
    return x[..., :4, :3]


def check_lifted(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Either side may be a half type; the result is that of float32."""
    for dtype in (torch.float16, torch.bfloat16):
        s, t = maps((3, 4, 5, 5), (3, 4, 5, 5), dtype=dtype)
        expected = function(s.float(), t.float())
        for x, y in ((s, t), (s.float(), t), (s, t.float())):
            actual = function(x, y)
            assert actual.dtype == torch.float32
            assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-9)


def check_teacher_is_constant(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """No gradient reaches it; one reaches the student."""
    s, t = (x.requires_grad_() for x in maps((3, 4, 5, 5), (3, 4, 5, 5)))
    function(s, t).sum().backward()
    assert t.grad is None
    assert s.grad is not None
    assert s.grad.any()


@dataclass(frozen=True)
class Objective:
    """A method with options that are not the defaults, in the second epoch."""

    case: Case
    settings: Mapping[str, Any]
    pair: Pair = PAIRS["alike"]
    phase: str = "main"
    rtol: float = 1e-12

    def check(self, expected: Callable[[Method, Outputs, Outputs, Tensor], Tensor]) -> None:
        """``expected`` makes the total of the method, both networks' outputs, and the targets."""
        method = build(self.case, self.settings, self.pair)
        inputs = draw(method, self.pair)
        student, teacher = inputs.views()
        (phase,) = (phase for phase in method.phases if phase.name == self.phase)
        total = loss_of(method, inputs, phase, progress(phase, epoch=2))
        wanted = expected(copy.deepcopy(method), student.real, teacher.real, inputs.batch.target)
        assert total.item() == pytest.approx(wanted.item(), rel=self.rtol)


def in_stages(function: Callable[..., Tensor], s: Outputs, t: Outputs, suffix: str = "", **options: Any) -> Tensor:
    """The function of each of three stages."""
    names = [f"stage{k}{suffix}" for k in (1, 2, 3)]
    return torch.stack([function(s.taps[name], t.taps[name], **options) for name in names])
