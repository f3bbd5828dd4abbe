"""Small measurements on the digits, and two methods to measure."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import nn

from vrm.bench.comparison import measure_step
from vrm.bench.subjects import Settings
from vrm.config import checked, parse_words
from vrm.config.words import split_words
from vrm.contract import DataInfo, Losses, Method, Needs, Phase, Probe, Term, Views
from vrm.divergences import cross_entropy

QUIET = Console(quiet=True)
TINY = ("pair=resnet8/resnet8", "data.labels_per_class=2", "batch_size=8", "threads=1")
FEW = {"rounds": 1, "steps": 1, "warmup": 0, "memory": False}


def settings(*words: str) -> Settings:
    """Settings from words, as the command line makes them."""
    return checked(Settings, parse_words(words))


def measured(*words: str, **more: Any) -> dict[str, Any]:
    """The result of a small measurement."""
    own, rest = split_words(words, Settings.model_fields)
    chosen = checked(Settings, {**FEW, **parse_words(own), **more})
    given = {word.partition("=")[0] for word in rest}
    kept = [word for word in TINY if word.partition("=")[0] not in given]
    return measure_step("digits", [*kept, *rest], chosen, console=QUIET)


def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a result by name."""
    return {row["name"]: row for row in found["rows"]}


class Example(Method):
    """Learns from a teacher in two phases; refuses wide teachers or breaks in a step if asked to."""

    title, venue, year, family = "Example", "-", 2026, "logit"

    def __init__(self, refuse: bool = False, breaks: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.refuse, self.breaks, self.scale = refuse, breaks, scale
        self.weight = nn.Parameter(torch.ones(()))

    @property
    def phases(self) -> tuple[Phase, ...]:
        return Phase("alone", epochs=1, trained=("method",)), Phase("main")

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        if self.refuse:
            raise ValueError("this pair is too wide for it")

    def forward(self, student: Views, teacher: Views, batch: Any, progress: Any) -> Losses:
        if self.breaks:
            raise RuntimeError("shapes do not fit\nand more of that")
        far = (self.weight * student.real.logits - teacher.real.logits).square().mean()
        return Losses(ce=Term(cross_entropy(student.real.logits, batch.target), role="task"), far=Term(far, self.scale))


class Alone(Method):
    """Cross entropy under another name."""

    title, venue, year, family = "Alone", "-", 2026, "logit"

    @property
    def needs(self) -> Needs:
        return Needs(teacher=False)

    def forward(self, student: Views, teacher: Views, batch: Any, progress: Any) -> Losses:
        return Losses(ce=Term(cross_entropy(student.real.logits, batch.target), role="task"))
