"""Cross entropies and divergences of logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vrm.divergences import cross_entropy, hide_classes, lift, soft_kl, soften


def test_only_half_types_are_lifted() -> None:
    assert [lift(torch.ones(1, dtype=dtype)).dtype for dtype in (torch.float16, torch.bfloat16)] == [torch.float32] * 2
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(1, dtype=dtype)
        assert lift(x) is x


def test_by_hand() -> None:
    """Two classes, of which the teacher is sure by 3 : 1 at temperature 2, and the student undecided."""
    student, teacher = torch.tensor([[5.0, 5.0], [0.0, 2 * math.log(3)]]), torch.tensor([[0.0, 2 * math.log(3)]] * 2)
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert soft_kl(student, teacher, temperature=2.0).tolist() == pytest.approx([expected, 0], abs=1e-6)
    assert float(cross_entropy(student, torch.tensor([1, 0]))) == pytest.approx((math.log(2) + math.log(10)) / 2)


def test_a_hidden_class_has_the_probability_zero_and_a_finite_logarithm() -> None:
    """Beside logits of any size, and if no class is left."""
    logits, hidden = torch.tensor([[1e4, -1e4, -1e4], [1.0, 2.0, 3.0]]), torch.tensor([[0], [2]])
    log_p = hide_classes(logits, hidden).log_softmax(1)
    assert log_p.exp().tolist() == [[0, 0.5, 0.5], pytest.approx([1 / (1 + math.e), math.e / (1 + math.e), 0])]
    assert torch.isfinite(log_p).all()
    assert torch.isfinite(hide_classes(logits[:, :1], torch.tensor([[0], [0]])).log_softmax(1)).all()


def test_softened_logits() -> None:
    x = torch.tensor([[1.0, 3.0]])
    assert soften(x, 1.0) is x
    assert soften(x, 2.0).tolist() == [[0.5, 1.5]]
    assert soften(x.half(), 1.0).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_give_single_values(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.tensor([0, 4, 2])
    assert torch.equal(soft_kl(a, b, temperature=3.0), soft_kl(a.float(), b.float(), temperature=3.0))
    assert torch.equal(cross_entropy(a, target), F.cross_entropy(a.float(), target))


@given(st.integers(0, 2**32), st.integers(2, 6), st.floats(0.1, 20), st.floats(0, 1e4))
def test_divergence_is_finite_and_not_negative(seed: int, num_classes: int, temperature: float, size: float) -> None:
    """And does not see a shift of a sample's logits."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (size * torch.randn(2, 3, num_classes, generator=generator, dtype=torch.float64)).requires_grad_()
    found = soft_kl(a, b, temperature=temperature)
    assert torch.isfinite(found).all()
    assert (found > -1e-9).all()
    assert torch.isfinite(torch.autograd.grad(found.sum(), a)[0]).all()
    shifted = soft_kl(a + torch.tensor([[3.0], [-2.0], [0.5]]), b - 7, temperature=temperature)
    torch.testing.assert_close(shifted, found, rtol=1e-6, atol=1e-6)
