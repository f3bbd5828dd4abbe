"""SDD: its case, and what the contract suite does not test."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm import methods, models
from vrm.config import resolve
from vrm.contract import DataInfo, Method, Outputs, Progress, RowLoss
from vrm.divergences import cross_entropy
from vrm.methods import sdd
from vrm.methods.dkd import dkd_loss

from ..harness import Case, Golden, Outcome
from ..objective import Objective, maps


def reproduce(golden: Golden) -> Outcome:
    """A base's loss of given region logits, or of those that classifiers make of maps."""
    settings = golden.hyperparameters
    variant, target = settings["variant"], golden["target"]
    outcome: Outcome = {}
    if variant.endswith("_features"):
        scales = tuple(int(scale) for scale in settings["M"].strip("[]").split(","))
        classifiers = {}
        for role in ("student", "teacher"):
            weight = golden.tensors[f"param.fc_{role}.weight"]
            classifiers[role] = nn.Linear(weight.shape[1], weight.shape[0])
            golden.load(classifiers[role], {f"fc_{role}.weight": "weight", f"fc_{role}.bias": "bias"})
        s_BNC, t_BNC = (
            sdd.region_logits(golden[f"feat_{role}"], classifiers[role], scales=scales) for role in classifiers
        )
        logits = classifiers["student"](golden["feat_student"].mean((2, 3)))
        outcome |= {
            "out.region_logits_student": s_BNC.transpose(1, 2),
            "out.region_logits_teacher": t_BNC.transpose(1, 2),
            "out.logits_student": logits,
        }
    else:
        s_BNC, t_BNC = (golden[f"region_logits_{role}"].transpose(1, 2) for role in ("student", "teacher"))
        logits = s_BNC[:, 0]
    t_BNC = t_BNC.detach()
    weights = sdd.region_weights(t_BNC, target)
    epoch = torch.tensor(settings.get("epoch", 1), dtype=torch.float64)
    at = Progress(epoch, epoch, 0, 0)
    base = methods.load(variant.partition("_")[0])
    known = {name: settings[name] for name in ("temperature", "alpha", "beta", "gamma") if name in settings}

    def loss(**more: Any) -> Tensor:
        method = base(**known, **more)
        assert isinstance(method, RowLoss)
        labels = target.repeat_interleave(s_BNC.shape[1])
        rows = method.row_loss(s_BNC.flatten(0, 1), t_BNC.flatten(0, 1), labels, at)
        return sdd.sdd_loss(rows.view_as(weights), weights)

    if variant.startswith("nkd"):
        raw, strict = loss(keep_target=True), loss()
        (of_strict,) = torch.autograd.grad(strict, golden["region_logits_student"], retain_graph=True)
        outcome["alt.loss_strict_nontarget"] = strict
        outcome["alt.grad.in.region_logits_student/strict_nontarget"] = of_strict
    elif variant.startswith("dkd"):
        raw = loss(warmup_epochs=1)
    else:
        raw = loss(kd_weight=1.0)
    weight = at.ramp(int(settings["warmup"])) if "warmup" in settings else settings["kd_weight"]
    task = settings["ce_weight"] * cross_entropy(logits, target)
    return outcome | {
        "alt.region_weights": weights,
        "out.loss": raw,
        "out.loss_ce_weighted": task,
        "out.loss_kd_weighted": weight * raw,
        "out.loss_total": task + weight * raw,
    }


CASE = Case(
    "sdd",
    golden=reproduce,
    variants=({}, {"base": "dkd", "base_options": {"warmup_epochs": 4}, "scales": (1, 2, 4)}),
    alternatives={
        "base": ({"base": "kd"}, {"base": "dkd"}),
        "base_options": ({"base_options": {}}, {"base_options": {"temperature": 3.0}}),
        "scales": ({"scales": (1, 2)}, {"scales": (1, 4)}),
    },
    legal=({"scales": (1, 2, 4)}, {"complementary_weight": 0.0}),
    illegal=(
        {"scales": (1,)},
        {"scales": (2, 4)},
        {"scales": (1, 3)},
        {"complementary_weight": -1.0},
        {"base": "rkd"},
        {"base_options": {"beta": 8.0}},
    ),
    refuses={"teacher_of_tokens": "teacher does not end in one linear layer on the mean of a map"},
    invariances=("sample_order",),
)


def test_regions_are_those_of_the_map() -> None:
    """Of a map of 4x4, region by region: all of it, its quarters, its pixels; each through weight and bias."""
    (x,) = maps((2, 3, 4, 4))
    classifier = nn.Linear(3, 5).double()
    found = sdd.region_logits(x, classifier, scales=(1, 2, 4))
    quarters = [x[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i, j in product((0, 2), (0, 2))]
    pixels = [x[:, :, i, j] for i, j in product(range(4), range(4))]
    expected = torch.stack([classifier(region) for region in (x.mean((2, 3)), *quarters, *pixels)], 1)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 2), (1, 2), (3, 5), (7, 7), (8, 4)])
def test_regions_of_odd_maps_are_pooled_from_four_by_four(size: tuple[int, int]) -> None:
    (x,) = maps((2, 3, *size))
    classifier = nn.Linear(3, 5).double()
    found = sdd.region_logits(x, classifier, scales=(1, 2, 4))
    finest = F.adaptive_avg_pool2d(x, 4)
    assert torch.allclose(found[:, 5:], classifier(finest.flatten(2).transpose(1, 2)), rtol=1e-9)
    assert torch.allclose(found[:, 0], classifier(finest.mean((2, 3))), rtol=1e-9)


def test_regions_that_contradict_the_global_one_weigh_more() -> None:
    """Right in both, wrong in both (also by another class), right in one."""
    right, wrong, other = ([5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0])
    teacher = torch.tensor([[right, right, wrong], [wrong, other, right]])
    target = torch.tensor([0, 0])
    assert sdd.region_weights(teacher, target, complementary_weight=3.0).tolist() == [[1, 1, 3], [1, 1, 3]]


def test_sdd_objective() -> None:
    """Of DKD under a ramp, region by region."""
    halves = (slice(0, 2), slice(2, 4))
    regions = [(slice(0, 4), slice(0, 4)), *product(halves, halves)]

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        assert isinstance(method, sdd.SDD)
        of_student, of_teacher = (linear.double() for linear in method._classifiers)
        finest_s, finest_t = (F.adaptive_avg_pool2d(x.taps["map"], 4) for x in (s, t))
        total = torch.zeros((), dtype=torch.float64)
        for row in range(len(target)):
            label, rights = target[row : row + 1], []
            for i, j in regions:
                region_s = of_student(finest_s[row : row + 1, :, i, j].mean((2, 3)))
                region_t = of_teacher(finest_t[row : row + 1, :, i, j].mean((2, 3)))
                rights.append(bool(region_t.argmax() == label))
                weight = 1.0 if rights[-1] == rights[0] else 4.0
                total = total + weight * dkd_loss(region_s, region_t, label, alpha=1.0, beta=3.0, temperature=2.0)
        return 0.5 * F.cross_entropy(s.logits, target) + 2 / 4 * total / (len(regions) * len(target))

    options = {"beta": 3.0, "temperature": 2.0, "warmup_epochs": 4, "ce_weight": 0.5}
    Objective(CASE, {"base": "dkd", "base_options": options, "complementary_weight": 4.0}).check(expected)


class TwoLayers(nn.Module):
    """A convolution, and two linear layers after the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.hidden(self.conv(x).relu().mean((2, 3))))
        return logits


def probe(network: nn.Module, size: int = 32) -> Any:
    """What is measured of it."""
    return models.probe(network, name=type(network).__name__, input_size=(size, size))


def test_sdd_works_where_a_linear_layer_classifies_the_mean_of_a_map() -> None:
    data = DataInfo(10, 5, 4, torch.arange(10) % 5)
    student = models.create("mobilenetv2", num_classes=5)
    teacher = models.create("wrn_16_1", num_classes=5)
    method = sdd.SDD()
    method.build(probe(student), probe(teacher), data)
    assert not list(method.parameters())
    assert method.matched == (("map", "map"),)
    with pytest.raises(ValueError, match="TwoLayers does not end in one linear layer on the mean of a map"):
        method.build(probe(student), probe(TwoLayers()), data)
    with pytest.raises(ValueError, match="last map of MobileNetV2 is a single pixel without regions"):
        method.build(probe(student, 16), probe(teacher), data)


def test_the_classifier_of_the_student_learns_from_all_regions() -> None:
    classifier = nn.Linear(3, 4)
    (x,) = maps((3, 3, 4, 4), dtype=torch.float32)
    sdd.region_logits(x, classifier)[:, 1:].square().sum().backward()
    assert classifier.weight.grad is not None
    assert classifier.weight.grad.any()


def test_sdd_takes_its_published_settings_by_base_and_pair() -> None:
    def options(*words: str) -> dict[str, Any]:
        return dict(resolve("distill", "cifar100", ["method=sdd", "data.root=x", *words]).run.method)

    assert options("pair=vgg13/mobilenetv2")["scales"] == (1, 2, 4)
    of_dkd = options("pair=resnet56/resnet20", "method.base=dkd")
    assert (of_dkd["scales"], of_dkd["base_options"]) == ((1, 2), {"beta": 2.0})
