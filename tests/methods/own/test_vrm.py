"""VRM: its case, and what the contract suite does not test."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vrm import models
from vrm.contract import DataInfo, Probe
from vrm.divergences import cross_entropy
from vrm.methods.vrm import VRM, vrm_feature_loss, vrm_loss
from vrm.relations import class_distributions, joint_entropy, predictions, prune_edges

from ..harness import Case, Golden, Outcome
from ..worlds import build, draw, pair_of, progress


def reproduce(golden: Golden) -> Outcome:
    """Everything that a file of ``vrm``, ``vrm_features`` or ``vrm_redundant`` may ask for."""
    spec, tensors = golden.spec, golden.tensors
    settings = {key: value for key, value in spec["hyperparameters"].items() if key not in ("alpha", "beta")}
    redundant = spec["method"] == "vrm_redundant"
    networks = [f"{network}_{view}" for network in ("student", "teacher") for view in ("real", "virtual")]
    logits = [tensors[f"in.logits_{name}"] for name in networks if f"in.logits_{name}" in tensors]
    if spec["method"] == "vrm_features":
        features = [tensors[f"in.features_{name}"] for name in networks]
        student_logits = (logits[0], logits[1]) if logits else None
        isv, icv = vrm_feature_loss(*features, student_logits, **settings)
    else:
        isv, icv = vrm_loss(*logits, prune_redundant=not redundant, **settings)
    outputs = {"out.loss_isv": isv, "out.loss_icv": icv}

    if "in.target" in tensors:
        task = cross_entropy(logits[0], tensors["in.target"]) + cross_entropy(logits[1], tensors["in.target"])
        weights = spec["hyperparameters"]
        outputs["out.loss_total"] = task + weights["alpha"] * isv + weights["beta"] * icv

    if logits and not redundant:
        real, virtual = (predictions(z, temperature=settings["temperature"]) for z in logits[:2])
        for graph, p, q in (("isv", real, virtual), ("icv", class_distributions(real), class_distributions(virtual))):
            kind = settings.get("joint_entropy", "mixture")
            outputs[f"out.joint_entropy_{graph}"] = joint_entropy(p, q, kind=kind)
            mask = prune_edges(p, q, keep=settings["keep"], kind=kind)
            if isinstance(mask, Tensor):
                outputs[f"out.mask_{graph}"] = mask
    return outputs


CASE = Case(
    "vrm",
    golden=reproduce,
    golden_keys=("vrm_features", "vrm_redundant"),
    variants=(
        {},
        {"keep": 1.0},
        {"keep": 0.5, "joint_entropy": "collision"},
        {"prune_redundant": False},
        {"vertices": "features"},
        {"matching": "huber", "delta": 0.1},
        {"num_virtual_views": 2, "virtual_cross_entropy": False},
        {"gather": True},
    ),
    same_channels=True,  # for the variant on features
    elsewhere={"gather": "test_contract.py::test_two_processes_equal_one"},
    alternatives={
        "keep": ({}, {"keep": 0.5}),
        "joint_entropy": ({"keep": 0.5}, {"keep": 0.5, "joint_entropy": "cross"}),
        "matching": ({"delta": 0.1}, {"delta": 0.1, "matching": "huber"}),
        "delta": ({"matching": "huber"}, {"matching": "huber", "delta": 0.1}),
        "vertices": ({}, {"vertices": "features"}),
    },
    illegal=(
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"alpha": -1.0},
        {"beta": math.nan},
        {"keep": 0.0},
        {"keep": 1.1},
        {"eps": 0.0},
        {"eps": 1e-160},
        {"delta": 0.0},
        {"num_virtual_views": 0},
        {"num_virtual_views": 1.5},
        {"joint_entropy": "none"},
        {"vertices": "none"},
        {"matching": "none"},
    ),
    legal=({"alpha": 0.0, "beta": 0.0}, {"keep": 1e-6}),
    invariances=("sample_order",),
)


@pytest.mark.parametrize(
    ("samples", "batch", "left"), [(30, 10, None), (32, 10, None), (33, 10, 3), (30, 9, 9), (3, 10, 3), (4, 10, None)]
)
def test_shares_that_differ_in_size_cannot_be_gathered(
    monkeypatch: pytest.MonkeyPatch, samples: int, batch: int, left: int | None
) -> None:
    """Else the processes would wait for rows that never come."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    probe = models.probe(models.create("resnet8", num_classes=10), name="resnet8", input_size=(8, 8))
    data = DataInfo(samples, 10, batch, torch.zeros(samples, dtype=torch.int64))
    VRM(gather=False).build(probe, probe, data)
    if left is None:
        VRM(gather=True).build(probe, probe, data)
    else:
        with pytest.raises(ValueError, match=f"{samples} samples in batches of {batch} give one of {left}; choose"):
            VRM(gather=True).build(probe, probe, data)


def terms(**options: Any) -> dict[str, Tensor]:
    """Values, and weights under ``NAME*``, of the same made-up batch under each option."""
    method = build(CASE, options, pair_of(CASE))
    inputs = draw(method, pair_of(CASE))
    losses = method(*inputs.views(), inputs.batch, progress(method.phases[0]))
    values = {name: term.value.detach() for name, term in losses.items()}
    return values | {f"{name}*": torch.as_tensor(term.weight) for name, term in losses.items()}


@pytest.mark.parametrize(
    ("before", "options", "changed"),
    [
        ({}, {"temperature": 2.0}, {"isv", "icv"}),
        ({}, {"alpha": 5.0}, {"isv*"}),
        ({}, {"beta": 0.0}, {"icv*"}),
        ({}, {"keep": 0.5}, {"isv", "icv"}),
        *(({"keep": 0.5}, {"joint_entropy": kind}, {"isv", "icv"}) for kind in ("cross", "independent")),
        ({}, {"joint_entropy": "collision", "keep": 0.5}, {"isv", "icv"}),
        ({"keep": 1.0}, {"joint_entropy": "cross"}, set()),
        ({}, {"prune_redundant": False}, {"isv", "icv"}),
        ({}, {"virtual_cross_entropy": False}, {"ce_virtual", "ce_virtual*"}),
        ({}, {"vertices": "features"}, {"isv", "icv"}),
        ({"vertices": "features", "keep": 1.0}, {"keep": 0.5}, {"isv"}),
        ({"vertices": "features", "keep": 1.0}, {"temperature": 1.0}, set()),
        ({}, {"matching": "huber", "delta": 0.1}, {"isv", "icv"}),
        ({"matching": "huber", "delta": 0.1}, {"delta": 0.2}, {"isv", "icv"}),
        ({}, {"delta": 0.1}, set()),
        ({}, {"eps": 0.2}, {"isv", "icv"}),
    ],
)
def test_each_option_changes_what_it_says(before: dict[str, Any], options: dict[str, Any], changed: set[str]) -> None:
    """And nothing else: delta matters to Huber alone, joint entropy to pruning, features have no temperature."""
    old, new = terms(**before), terms(**before | options)
    assert [name for name in old if not name.endswith("*")] == ["ce_real", "ce_virtual", "isv", "icv"]
    assert new.keys() <= old.keys()
    assert {name for name in old if name not in new or not torch.equal(old[name], new[name])} == changed


def test_several_virtual_views_are_averaged() -> None:
    method = build(CASE, {"num_virtual_views": 2}, pair_of(CASE))
    inputs = draw(method, pair_of(CASE))
    student, teacher = inputs.views()
    found = method(student, teacher, inputs.batch, progress(method.phases[0]))
    each = [
        (*vrm_loss(student.real.logits, s.logits, teacher.real.logits, t.logits), cross_entropy(s.logits, target))
        for target in [inputs.batch.target]
        for s, t in zip(student.virtual, teacher.virtual, strict=True)
    ]
    for name, values in zip(("isv", "icv", "ce_virtual"), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(found[name].value, sum(values) / 2)


def test_without_relations_samples_are_not_coupled() -> None:
    assert not VRM(alpha=0.0, beta=0.0).needs.couples_samples


def test_features_of_different_length_cannot_be_compared() -> None:
    def probe(name: str, length: int) -> Probe:
        return Probe(name, (32, 32), 10, {"stage1": (4, 8, 8), "pooled": (length,), "logits": (10,)})

    data = DataInfo(8, 10, 4, torch.zeros(8, dtype=torch.long))
    VRM().build(probe("small", 64), probe("large", 256), data)
    VRM(vertices="features").build(probe("small", 64), probe("other", 64), data)
    with pytest.raises(ValueError, match="small has 64 and large 256"):
        VRM(vertices="features").build(probe("small", 64), probe("large", 256), data)
    with pytest.raises(ValueError, match="need the same shape"):
        vrm_feature_loss(*torch.ones(2, 4, 3), *torch.ones(2, 4, 5), keep=1.0)
    with pytest.raises(ValueError, match="pass student_logits"):
        vrm_feature_loss(*torch.ones(4, 4, 3))
