"""What a run's numbers may depend on beside its settings, and what it is trained on and with."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from vrm import models
from vrm.engine.devices import device_name
from vrm.engine.distribution import ALONE, World
from vrm.models.card import FORMAT
from vrm.runs.assembly import Assembly
from vrm.runs.plan import Plan

LAST_BITS = ("threads", "torch", "device", "processes")
"""What may change the last bits of a result from one machine to another."""


def describe_environment(device: torch.device, world: World = ALONE) -> dict[str, Any]:
    """Return device, threads, processes and versions."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": world.size,
        "processors": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "numpy", "pillow", "vrm")},
    }


def content_hashes(assembly: Assembly) -> dict[str, str | None]:
    """Return hashes of the data and of the teacher's weights, which a run's settings only name."""
    data, teacher = assembly.data, assembly.teacher
    return {
        "training data": data.train.hash,
        "test data": data.test.hash,
        "teacher": None if teacher is None else models.weights_hash(teacher.teacher.network),
    }


@dataclass(frozen=True)
class Facts:
    """What a start knows of the run once it is put together."""

    plan: Plan
    hashes: Mapping[str, str | None]
    environment: Mapping[str, Any]


def collect_facts(assembly: Assembly, world: World = ALONE) -> Facts:
    """Return what deciding a resumption needs, and ``environment.json`` keeps, of a run that was put together."""
    plan = Plan.of(assembly.run, assembly.method.phases, len(assembly.data.train))
    kind = {"format": FORMAT, "task": assembly.task.name}
    return Facts(plan, content_hashes(assembly), kind | describe_environment(assembly.device, world))
