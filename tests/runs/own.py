"""Runs on networks of one's own: small modules on a few digits, and a teacher that needs no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vrm import config, data
from vrm.data import DataSet
from vrm.runs.assembly import Assembly, assemble
from vrm.runs.checks.rehearsal import Rehearsal, rehearse
from vrm.runs.checks.start import check_start
from vrm.runs.checks.table import CheckReport
from vrm.runs.plan import Plan

from .small import QUIET

DIGITS = data.load("digits", labels_per_class=3)
WHOLE = data.load("digits")


class Net(nn.Module):
    """Convolution, optional batch norm and dropout, linear head: images (B, 3, H, W) to logits (B, C)."""

    def __init__(self, num_classes: int = 10, *, norm: bool = True, dropout: float = 0.0, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.dropout(self.norm(self.conv(images)).relu().mean((2, 3))))


class Pixels(nn.Module):
    """Logits linear in the pixels, fitted to the digits by least squares: a teacher of some 90 %."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.flat = nn.Flatten()
        self.fc = nn.Linear(3 * 64, num_classes)
        train = WHOLE.train
        mean, std = (torch.tensor(value)[:, None, None] for value in (WHOLE.mean, WHOLE.std))
        pixels = ((train.images / 255 - mean) / std).flatten(1).double()
        ones = torch.ones(len(pixels), 1, dtype=torch.float64)
        wanted = 8 * nn.functional.one_hot(train.targets, num_classes).double() - 4
        solution = torch.linalg.lstsq(torch.cat([pixels, ones], 1), wanted, driver="gelsd").solution
        with torch.no_grad():
            self.fc.weight.copy_(solution[:-1].T)
            self.fc.bias.copy_(solution[-1])

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.flat(images))


def settings(run: Path, student: nn.Module, teacher: nn.Module | None, method: str = "kd", **more: Any) -> config.Run:
    """Settings as :func:`vrm.distill` makes them."""
    content = {
        "recipe": "python",
        "run": str(run),
        "epochs": 2,
        "batch_size": 8,
        "threads": 1,
        "student": {"name": type(student).__qualname__},
        "teacher": None if teacher is None else {"name": type(teacher).__qualname__},
        "data": {"name": "digits"},
        "method": {"name": method, **config.method_settings(method, {})},
    }
    return config.validate(config.merge(content, more))


def own(
    run: Path,
    student: nn.Module,
    teacher: nn.Module | None = None,
    method: str | None = None,
    dataset: DataSet = DIGITS,
    **more: Any,
) -> Assembly:
    """A run of ``method`` (``kd``, or ``ce`` without a teacher) on modules."""
    method = method or ("ce" if teacher is None else "kd")
    run_settings = settings(run, student, teacher, method, **more)
    return assemble(run_settings, dataset=dataset, student=student, teacher=teacher)


def plan_of(assembly: Assembly) -> Plan:
    """Its course."""
    return Plan.of(assembly.run, assembly.method.phases, len(assembly.data.train))


def checked(assembly: Assembly, **more: Any) -> CheckReport:
    """The checks before it trains."""
    return check_start(assembly, plan_of(assembly), assembly.run.run, console=QUIET, quiet=True, **more)


def rehearsal(assembly: Assembly) -> Rehearsal:
    """One forward and backward of each of its phases."""
    return rehearse(assembly, plan_of(assembly))
