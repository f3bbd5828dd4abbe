"""LSKD: its case, and what the contract suite does not test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.config import resolve
from vrm.contract import Method, Outputs, Progress
from vrm.divergences import cross_entropy
from vrm.methods import lskd
from vrm.methods.dkd import dkd_loss
from vrm.methods.kd import kd_loss

from ..harness import Case, Golden, Outcome
from ..objective import Objective, maps


def reproduce(golden: Golden) -> Outcome:
    """KD or DKD of standardised logits, with the released deviation and with the paper's."""
    settings = golden.hyperparameters
    student, teacher, target = golden["logits_student"], golden["logits_teacher"], golden["target"]
    names = {"kd": ("temperature",), "dkd": ("temperature", "alpha", "beta")}[settings["variant"]]
    options = {name: settings[name] for name in names}
    ramp = torch.tensor(1.0, dtype=torch.float64)
    if "warmup" in settings:
        options["warmup_epochs"] = int(settings["warmup"])
        epoch = torch.tensor(settings["epoch"], dtype=torch.float64)
        ramp = Progress(epoch, epoch, 0, 0).ramp(options["warmup_epochs"])
    at = Progress(*2 * (torch.tensor(settings.get("epoch", 1), dtype=torch.float64),), 0, 0)

    def total(std: str) -> Tensor:
        method = lskd.LSKD(settings["variant"], options, settings["kd_weight"], std)
        s, t = (lskd.standardise(x, std=std) for x in (student, teacher))
        return method.base.row_loss(s, t, target, at).mean()

    loss, paper = total("sample") / ramp, total("population") / ramp
    task = settings["ce_weight"] * cross_entropy(student, target)
    weighted = settings["kd_weight"] * ramp * loss
    (of_paper,) = torch.autograd.grad(paper, student, retain_graph=True)
    return {
        "out.loss": loss,
        "out.loss_ce_weighted": task,
        "out.loss_kd_weighted": weighted,
        "out.loss_total": task + weighted,
        "alt.loss_population_std": paper,
        "alt.grad.in.logits_student/population_std": of_paper,
    }


TARGET = torch.tensor([0, 2, 1])
CASE = Case(
    "lskd",
    golden=reproduce,
    variants=({}, {"base": "dkd", "base_options": {"warmup_epochs": 4}, "std": "population"}),
    alternatives={
        "base": ({"base": "kd"}, {"base": "dkd"}),
        "base_options": ({"base_options": {}}, {"base_options": {"temperature": 3.0}}),
        "std": ({"std": "sample"}, {"std": "population"}),
        "eps": ({"eps": 1e-7}, {"eps": 0.5}),
    },
    legal=({"eps": 1e-12}, {"base": "dkd", "base_options": {"beta": 2.0}}),
    illegal=(
        {"eps": 0.0},
        {"std": "none"},
        {"base": "rkd"},
        {"base_options": {"beta": 8.0}},
        {"base_options": {"kd_weight": 0.0, "temperature": 3.0}},
    ),
    invariances=("sample_order", "logit_shift"),
    functions=(
        lambda s, t: lskd.lskd_loss(s.flatten(1), t.flatten(1)),
        lambda s, t: lskd.lskd_loss(s.flatten(1), t.flatten(1), temperature=3.0, std="population"),
    ),
)


def z(x: Tensor, divisor: int) -> Tensor:
    """Standardised rows, written as the formula."""
    centred = x - x.mean(1, keepdim=True)
    return centred / ((centred**2).sum(1, keepdim=True) / divisor).sqrt()


@pytest.mark.parametrize(("std", "divisor"), [("sample", 3), ("population", 4)])
def test_lskd_objective_on_kd(std: str, divisor: int) -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        task = 0.3 * F.cross_entropy(s.logits, target)
        return task + 5.0 * kd_loss(z(s.logits, divisor), z(t.logits, divisor), temperature=3.0)

    options = {"base_options": {"temperature": 3.0, "ce_weight": 0.3}, "weight": 5.0, "std": std, "eps": 1e-15}
    Objective(CASE, options, rtol=1e-9).check(expected)


def test_lskd_objective_on_dkd() -> None:
    """The base's ramp, here half in the second of four epochs, and its cross entropy stay."""

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        rows = dkd_loss(z(s.logits, 3), z(t.logits, 3), target, alpha=1.0, beta=3.0, temperature=2.0)
        return F.cross_entropy(s.logits, target) + 2 / 4 * 7.0 * rows

    options = {"base": "dkd", "base_options": {"beta": 3.0, "warmup_epochs": 4}, "weight": 7.0, "eps": 1e-15}
    Objective(CASE, options, rtol=1e-9).check(expected)


@pytest.mark.parametrize(("std", "divisor"), [("sample", 4), ("population", 5)])
def test_lskd_loss_is_kd_of_standardised_logits(std: str, divisor: int) -> None:
    (s, t) = maps((3, 5), (3, 5))
    expected = kd_loss(z(s, divisor), z(t, divisor), temperature=3.0)
    assert lskd.lskd_loss(s, t, temperature=3.0, std=std, eps=1e-15).item() == pytest.approx(expected.item(), rel=1e-9)


def test_lskd_does_not_see_scale() -> None:
    """Standardised logits are the same for a network that is twice as sure."""
    (s, t) = maps((3, 5), (3, 5))
    once, twice = (lskd.lskd_loss(k * s, t, eps=1e-15).item() for k in (1, 2))
    assert once == pytest.approx(twice, rel=1e-12)


def test_lskd_of_constant_rows() -> None:
    """They become 0, the uniform prediction; no NaN on either side."""
    s = torch.full((3, 5), 2.5, dtype=torch.float32, requires_grad=True)
    (t,) = maps((3, 5), dtype=torch.float32)
    assert not lskd.standardise(s).any()
    for teacher in (t, torch.zeros(3, 5)):
        loss = lskd.lskd_loss(s, teacher)
        (grad,) = torch.autograd.grad(loss, s)
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()
    assert lskd.lskd_loss(torch.zeros(3, 5), torch.ones(3, 5)).item() == 0


def test_lskd_needs_three_classes() -> None:
    """Two standardised logits are +-0.71 whatever the prediction, and no gradient is left."""
    (s, t) = (x.requires_grad_() for x in maps((3, 2), (3, 2)))
    assert torch.allclose(lskd.standardise(s).abs(), torch.tensor(0.5**0.5, dtype=torch.float64))
    (grad,) = torch.autograd.grad(lskd.lskd_loss(s, t), s)
    assert grad.abs().max() < 1e-6
    assert lskd.LSKD().needs.min_classes == 3


def test_lskd_takes_its_published_settings_by_base_and_pair() -> None:
    def options(*words: str) -> dict[str, object]:
        return dict(resolve("distill", "cifar100", ["method=lskd", "data.root=x", *words]).run.method)

    assert options("pair=resnet56/resnet20") | {"name": ""} == {
        "name": "",
        "base": "kd",
        "base_options": {"temperature": 2.0},
        "weight": 9.0,
        "std": "sample",
        "eps": 1e-7,
    }
    assert options("pair=vgg13/vgg8")["base_options"] == {"temperature": 3.0}
    of_dkd = options("pair=resnet56/resnet20", "method.base=dkd")
    assert (of_dkd["weight"], of_dkd["base_options"]) == (18.0, {"temperature": 3.0, "beta": 2.0})
    own = options("pair=resnet56/resnet20", "method.base=dkd", "method.base_options.beta=5")
    assert own["base_options"] == {"temperature": 3.0, "beta": 5}
