"""Classification: scores held against their definitions, and what is refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import vrm
from vrm import tasks
from vrm.models import Card

TASK = tasks.load("classification")


@dataclass(frozen=True)
class Data:
    classes: tuple[str, ...]
    name: str = "pets"
    num_classes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_classes", len(self.classes))


def card(*classes: str) -> Card:
    return Card("resnet8", {}, "classification", len(classes), classes, (8, 8), (0.5,) * 3, (0.5,) * 3)


def test_the_rest_of_the_package_knows_no_score_by_name() -> None:
    sources = Path(vrm.__file__).parent.rglob("*.py")
    named = {path.name for path in sources if re.search(r"top-?[15]\b", path.read_text(encoding="utf-8"))}
    assert named == {"classification.py"}


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'clasification'; did you mean 'classification'\?"):
        tasks.load("clasification")


@pytest.mark.parametrize(
    ("num_classes", "keys"), [(2, ["top1", "loss"]), (5, ["top1", "loss"]), (6, ["top1", "top5", "loss"])]
)
def test_scores_are_those_of_their_definitions(num_classes: int, keys: list[str]) -> None:
    draw = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(40, num_classes, generator=draw)
    target = torch.randint(num_classes, (40,), generator=draw)
    sums = sum(TASK.batch_sums(logits[part], target[part], num_classes) for part in torch.arange(40).split(16))
    assert isinstance(sums, torch.Tensor)
    assert sums.dtype == torch.float64
    scores = TASK.scores(sums, 40, num_classes)
    assert [metric.key for metric in TASK.metrics(num_classes)] == [*scores] == keys
    assert TASK.metrics(num_classes)[0] is TASK.primary
    rank = (logits > logits.gather(1, target[:, None])).sum(1)
    assert scores["top1"] == 100 * (int((rank < 1).sum()) / 40) == float(TASK.training_score(logits, target))
    assert scores.get("top5") in (None, 100 * (int((rank < 5).sum()) / 40))
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-6)


def test_logits_with_nan_hit_nothing() -> None:
    logits = torch.zeros(2, 10)
    logits[:, 3] = torch.tensor([1.0, math.nan])
    right, among_five, loss = TASK.batch_sums(logits, torch.tensor([3, 3]), 10).tolist()
    assert (right, among_five) == (1, 1)
    assert math.isnan(loss)


def test_another_number_of_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="gives 11 logits, but the data have 10 classes"):
        TASK.batch_sums(torch.zeros(2, 11), torch.zeros(2, dtype=torch.int64), 10)


def test_better_chance_and_standard_error() -> None:
    assert TASK.is_better({"top1": 0.0, "loss": 9.0}, {})
    assert TASK.is_better({"top1": 50.1, "loss": 9.0}, {"top1": 50.0, "loss": 0.1, "epoch": 3})
    assert not TASK.is_better({"top1": 50.0, "loss": 0.1}, {"top1": 50.0, "loss": 9.0}), "the first of equals stays"
    assert TASK.chance(4) == 25
    assert TASK.standard_error(20.0, 400) == pytest.approx(2.0)


def test_scores_in_words() -> None:
    scores = {"epoch": 3, "loss": 0.51234, "top1": 72.625, "top5": 91.0, "ema_top1": 1.0}
    assert TASK.describe(scores) == "top-1 72.62 %, top-5 91.00 %, cross entropy 0.5123 nats"
    assert TASK.describe({"loss": 1.0, "top1": 50.0}) == "top-1 50.00 %, cross entropy 1.0000 nats"
    assert TASK.primary.describe(12.3) == "top-1 12.30 %"


def test_classes_of_a_network_and_of_the_data() -> None:
    pets = Data(("cat", "dog", "fish"))
    TASK.check_classes(card("a", "b", "c"), pets, role="teacher")
    with pytest.raises(ValueError, match="teacher resnet8 has 2 classes, but pets has 3; give a teacher trained for"):
        TASK.check_classes(card("cat", "dog"), pets, role="teacher")
    for same in (card("cat", "dog", "fish"), card("a", "b", "c")):
        TASK.check_order(same, pets, role="teacher")
    with pytest.raises(ValueError, match="another order: its class 1 is 'fish', that of the data 'dog'"):
        TASK.check_order(card("cat", "fish", "dog"), pets, role="model")
