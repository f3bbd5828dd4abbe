"""ICKD: its case, and what the contract suite does not test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vrm.contract import Method, Outputs
from vrm.methods import ickd

from ..harness import Case, Golden, Outcome, batch_norms
from ..objective import WEIGHTS, Objective, maps
from ..worlds import PAIRS, build


def reproduce(golden: Golden) -> Outcome:
    """ICKD: the adapter, its running statistics, and the loss."""
    s, t = golden["feat_student"], golden["feat_teacher"]
    kernel_size = golden.tensors["param.conv.weight"].shape[-1]
    adapter = ickd.adapter(s.shape[1], t.shape[1], kernel_size=kernel_size)
    golden.load(adapter, {"conv.weight": "0.weight", "bn.weight": "1.weight", "bn.bias": "1.bias"})
    return {"out.loss": ickd.ickd_loss(adapter(s), t)} | batch_norms("after.", adapter, {"1": "bn"})


CASE = Case(
    "ickd",
    golden=reproduce,
    variants=(
        {},
        {"kernel_size": 3, "division": "batch", "kd_weight": 0.5, "temperature": 1.0},
        {"normalisation": "none", "division": "channels_squared"},
        {"student_taps": ("stages",), "teacher_taps": ("stages",)},
    ),
    alternatives={
        "kernel_size": ({}, {"kernel_size": 3}),
        "normalisation": ({}, {"normalisation": "none"}),
        "division": ({}, {"division": "batch"}),
        "temperature": ({"kd_weight": 1.0}, {"kd_weight": 1.0, "temperature": 2.0}),
        "student_taps": ({}, {"student_taps": ("stage1",)}),
        "teacher_taps": ({}, {"teacher_taps": ("stage1",)}),
    },
    legal=({"kernel_size": 5}, {"temperature": 0.5}),
    illegal=(
        {"kernel_size": 2},
        {"kernel_size": 0},
        {"kernel_size": -1},
        {"temperature": 0.0},
        {"normalisation": "columns"},
        {"division": "pixels"},
    ),
    invariances=("sample_order", "logit_shift"),
    functions=(ickd.ickd_loss, lambda s, t: ickd.ickd_loss(s, t, normalisation="none")),
)


def by_hand(s: Tensor, t: Tensor, *, rows: bool) -> np.ndarray:
    """The sum over pairs of channels for each sample, by loops."""
    sums = []
    for ours, theirs in zip(s.detach().numpy(), t.numpy(), strict=True):
        tables = []
        for x in (ours, theirs):
            table = np.array([[(a * b).sum() for b in x] for a in x])
            tables.append(table / np.linalg.norm(table, axis=1, keepdims=True) if rows else table)
        sums.append(((tables[0] - tables[1]) ** 2).sum())
    return np.array(sums)


@pytest.mark.parametrize("division", ["channels", "channels_squared", "batch"])
@pytest.mark.parametrize("rows", [True, False])
def test_ickd_objective(rows: bool, division: str) -> None:
    """Through the adapter in train mode, with the softened predictions; 7 channels, 6 samples."""

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        adapted = method.get_submodule("adapters.0")(s.taps["stage3"])
        divisor = {"channels": 7, "channels_squared": 7 * 7, "batch": 7 * 6}[division]
        correlations = float(by_hand(adapted, t.taps["stage3"], rows=rows).mean()) / divisor
        p, q = ((x.logits / 2).softmax(1) for x in (s, t))
        divergence = 4 * (q * (q / p).log()).sum(1).mean()
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * correlations + 3 * divergence

    how = {"normalisation": "rows" if rows else "none", "division": division}
    Objective(CASE, {**WEIGHTS, **how, "kd_weight": 3.0, "temperature": 2.0}).check(expected)


def test_ickd_adds_up_over_pairs_of_taps() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        pairs = [
            ickd.ickd_loss(method.get_submodule(f"adapters.{i}")(s.taps[name]), t.taps[name])
            for i, name in enumerate(("stage1", "stage2", "stage3"))
        ]
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * torch.stack(pairs).sum()

    Objective(CASE, {"student_taps": ("stages",), "teacher_taps": ("stages",), **WEIGHTS}).check(expected)


@pytest.mark.parametrize("shape", [(2, 3, 2, 5), (2, 5, 2, 2), (1, 4, 1, 1), (3, 4, 2, 2)])
@pytest.mark.parametrize("rows", [True, False])
def test_ickd_of_more_and_of_fewer_pixels_than_channels(shape: tuple[int, ...], rows: bool) -> None:
    """Value and gradient, against the correlations written out."""
    s, t = maps(shape, shape)
    s.requires_grad_()
    tables = [x.flatten(2) @ x.flatten(2).mT for x in (s, t)]
    ours, theirs = (F.normalize(x, dim=2) for x in tables) if rows else tables
    expected = (ours - theirs).square().sum() / (shape[0] * shape[1])
    assert float(by_hand(s, t, rows=rows).mean()) / shape[1] == pytest.approx(expected.item())
    actual = ickd.ickd_loss(s, t, normalisation="rows" if rows else "none")
    for x, y in ((actual, expected), *zip(*(torch.autograd.grad(z, s) for z in (actual, expected)), strict=True)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_ickd_normalises_rows_after_the_product() -> None:
    """The cosines between channels would be another loss: here they are all 1, as the teacher's correlations are."""
    student, teacher = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]]]), torch.ones(1, 2, 1, 2)
    row = torch.tensor([9 / 15, 12 / 15])  # also 12 / 20, 16 / 20
    expected = 2 * (row - 0.5**0.5).square().sum() / 2
    torch.testing.assert_close(ickd.ickd_loss(student, teacher), expected)


def test_ickd_does_not_see_the_scale_of_a_map() -> None:
    s, t = maps((2, 3, 4, 4), (2, 3, 4, 4))
    torch.testing.assert_close(ickd.ickd_loss(1e-4 * s, 1e4 * t), ickd.ickd_loss(s, t), rtol=1e-12, atol=0)
    torch.testing.assert_close(ickd.ickd_loss(1e4 * s, 1e-4 * t), ickd.ickd_loss(s, t), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("channels", "pixels"), [(8, 2), (2, 8)])
def test_ickd_multiplies_in_the_cheaper_order(channels: int, pixels: int) -> None:
    """Two products of a matrix with a square one of the smaller side; each multiplication and addition counts."""
    (x,) = maps((3, channels, pixels))
    with FlopCounterMode(display=False) as counter:
        ickd.row_products(x, x)
    assert counter.get_total_flops() == 3 * 2 * (2 * 8 * 2 * 2)


def test_ickd_compares_maps_of_different_sizes() -> None:
    """Twice as many pixels with the same content have the same rows."""
    s, t = maps((2, 3, 4, 4), (2, 3, 5, 2))
    twice = torch.cat([t, t], dim=2)
    torch.testing.assert_close(ickd.ickd_loss(s, twice), ickd.ickd_loss(s, t))
    (wide,) = maps((2, 5, 4, 4))
    for a, b, counts in ((s, wide, "3 and 5"), (wide, s, "5 and 3")):
        with pytest.raises(ValueError, match=f"equally many channels, got {counts}"):
            ickd.ickd_loss(a, b)


def test_ickd_of_dead_channels() -> None:
    """Each dead channel of the teacher adds 1, and one of both networks nothing; gradients stay finite."""
    s, t = maps((1, 4, 3, 3), (1, 4, 3, 3))
    t[:, 2:] = 0
    s[:, 3] = 0
    s.requires_grad_()
    loss = ickd.ickd_loss(s, t)
    alive = ickd.row_products(s.flatten(2), t.flatten(2))[0, :2] / torch.stack(
        [ickd.row_products(x.flatten(2), x.flatten(2))[0, :2].sqrt() for x in (s, t)]
    ).prod(0)
    assert loss.item() == pytest.approx((2 * (1 - alive).sum().item() + 1 + 0) / 4)
    (gradient,) = torch.autograd.grad(loss, s)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_ickd_adapter(kernel_size: int) -> None:
    """A convolution without bias that keeps the size, and a batch norm of the batch itself, also at equal widths."""
    adapter = ickd.adapter(4, 4, kernel_size=kernel_size)
    conv, norm = adapter
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert conv.bias is None
    (x,) = maps((5, 4, 6, 3), dtype=torch.float32)
    y = adapter(3 * x + 1)
    assert y.shape == x.shape
    assert y.mean((0, 2, 3)).abs().max().item() < 1e-5
    built = build(CASE, {"kernel_size": kernel_size}, PAIRS["alike"].of_equal_channels())
    assert [tuple(p.shape) for p in built.parameters()] == [(5, 5, kernel_size, kernel_size), (5,), (5,)]


def test_ickd_says_what_has_no_effect() -> None:
    assert ickd.ICKD().unused_options().keys() == {"temperature"}
    assert ickd.ICKD(kd_weight=1.0).unused_options() == {}
