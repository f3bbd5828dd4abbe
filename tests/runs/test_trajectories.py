"""The first fifty steps of a run of each kind are those that were kept: what changes them was meant to.

``trajectories.json`` holds losses of chosen steps and norms after the last, and what made them. Networks, images and
teacher are functions of integers and all is in float64, so that a trajectory is a property of the method, the step and
the schedules, not of a processor: with other instruction sets (SSE against AVX-512) and with weights shaken by 1e-12
fifty steps differ by 3e-10 at most, and by 5e-8 where a memory starts from float32 draws. (In float32 rectifiers turn
on and off by rounding, and after fifty steps losses differ by a tenth.) A momentum of 0.89 for 0.9 makes 0.1.
``scripts/renew_trajectories.py`` writes the file anew after a change of numbers that was meant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vrm import models, randomness
from vrm.runs import api as runs
from vrm.runs.assembly import Assembly, assemble

from .small import OPTIONS, final_state, metrics, small, train

FILE = Path(__file__).with_name("trajectories.json")
KINDS: Mapping[str, tuple[str, ...]] = {
    "logits": ("method=kd",),
    "two views": ("method=kd", "views=2"),
    "projector": ("method=reviewkd",),
    "memory": ("method=crd", *OPTIONS["crd"]),
    "phases": ("method=ab", *OPTIONS["ab"]),
    "relations": ("method=vrm",),
    "two momenta": ("method=dot",),
    "adamw": ("method=kd", "optimizer=adamw", "optimizer.lr=0.002"),
    "parts": ("method=kd", "accumulate=2"),
}
SHARED = (
    "threads=1",
    "data.labels_per_class=10",
    "epochs=8",
    "steps=50",
    "batch_size=16",
    "optimizer.lr=0.02",
    "log_every=1",
)
STEPS = (1, 2, 5, 10, 20, 35, 50)
ALLOWED = 1e-6
"""Relative difference of a loss or a norm."""


def draw(module: nn.Module, *, last: float = 1.0) -> None:
    """Weights by counting: what torch draws differs in its last bits between processors. ``last``: of ``fc``."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 or bool((parameter != parameter[:1]).any()):  # constants stay
                drawn = randomness.normal(0, name, torch.arange(parameter.numel())).view(parameter.shape)
                scale = last if name.startswith("fc.") else math.sqrt(2)
                parameter.copy_(scale * drawn / math.sqrt(parameter[0].numel() if parameter.ndim > 1 else 100))


def make_teacher(folder: Path) -> Path:
    """A network that is sure of itself, and wrong."""
    network = models.create("resnet8", num_classes=10)
    draw(network, last=2.0)
    models.save_weights(network, folder / "teacher.safetensors")
    return folder / "teacher.safetensors"


def in_double_precision(*arguments: Any, **options: Any) -> Assembly:
    """What a run trains, with weights that are drawn by counting."""
    assembly = assemble(*arguments, **options)
    assembly.distiller.double()
    draw(assembly.student.network)
    draw(assembly.method)
    if assembly.teacher is not None:
        assembly.teacher.double()
    return assembly


def trajectory(teacher: Path, run: Path, kind: str, *more: str) -> dict[str, Any]:
    """Losses by step and name, and norms at the end, of a run of this kind."""
    words = {word.partition("=")[0]: word for word in (*SHARED, *KINDS[kind], *more)}
    given = ["teacher=resnet8", f"teacher.weights={teacher}", "teacher.allow_weak=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "assemble", in_double_precision)
        train(small(run, *given, *words.values()))
    losses: dict[str, dict[str, float]] = {}
    for line in metrics(run):
        if line["step"] in STEPS and line["split"] == "train" and line["name"].startswith("loss"):
            losses.setdefault(str(line["step"]), {})[line["name"]] = line["value"]
    parts: dict[str, float] = {}
    for name, value in final_state(run).items():
        part, _, rest = name.partition(".")
        counted = rest.endswith((".step", "running_mean", "running_var", "num_batches_tracked"))
        if part in ("student", "method", "optimizer", "ema") and not counted:
            parts[part] = parts.get(part, 0.0) + float(value.double().square().sum())
    return {"losses": losses, "norms": {part: math.sqrt(total) for part, total in parts.items()}}


def differences(kept: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What lies farther off than other processors and versions of torch explain."""
    one, other = ({**_flat(side["losses"]), **side["norms"]} for side in (kept, found))
    return [
        f"{name}: {one.get(name)} was kept, {other.get(name)} found"
        for name in {**one, **other}
        if not abs(one.get(name, math.nan) - other.get(name, math.nan)) <= ALLOWED * max(abs(one.get(name, 0.0)), 0.01)
    ]


def _flat(losses: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{name} of step {step}": value for step, values in losses.items() for name, value in values.items()}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_are_those_that_were_kept(teacher: Path, tmp_path: Path, kept: dict[str, Any], kind: str) -> None:
    found = differences(kept["kinds"][kind], trajectory(teacher, tmp_path / "run", kind))
    assert not found, f"{found}; made with {kept['made with']}. If it was meant: scripts/renew_trajectories.py"


@pytest.mark.parametrize("option", ["compile=true", "channels_last=true"])
def test_other_ways_to_compute_the_same_are_no_other_trajectory(
    teacher: Path, tmp_path: Path, kept: dict[str, Any], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend="aot_eager", **options))
    assert not differences(kept["kinds"]["relations"], trajectory(teacher, tmp_path / "run", "relations", option))


def test_no_other_kinds_are_kept(kept: dict[str, Any]) -> None:
    assert [*kept["kinds"]] == [*KINDS]


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("logits", "optimizer.momentum=0.89"),
        ("logits", "method.temperature=4.08"),
        ("relations", "optimizer.weight_decay=0.00051"),
        ("two momenta", "optimizer.lr=0.0201"),
    ],
)
def test_a_small_mistake_is_seen(teacher: Path, tmp_path: Path, kept: dict[str, Any], kind: str, mistake: str) -> None:
    assert len(differences(kept["kinds"][kind], trajectory(teacher, tmp_path / "run", kind, mistake))) > 3
