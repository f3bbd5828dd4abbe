"""Evaluation: every image once, over any number of processes, and the network's modes as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.runs.own import DIGITS, Net
from vrm import tasks
from vrm.data import ImageStore
from vrm.engine.distribution import World
from vrm.engine.evaluation import Stopped, evaluate
from vrm.models import Preprocess, TappedNetwork

TASK = tasks.load(DIGITS.task)


def tapped(network: Net) -> TappedNetwork:
    return TappedNetwork(network, (), Preprocess(DIGITS.mean, DIGITS.std), input_size=(8, 8))


def test_every_image_once_over_processes() -> None:
    network = tapped(Net())
    whole = evaluate(network, DIGITS.test, TASK)
    seen: list[Tensor] = []

    class Store(ImageStore):
        def batch(self, index_B: Tensor) -> Tensor:
            seen.append(index_B)
            return super().batch(index_B)

    store = Store(DIGITS.test.images, DIGITS.test.targets, DIGITS.test.classes)
    sums: list[Tensor] = []

    class Rank(World):
        def sum(self, value: Tensor) -> Tensor:
            sums.append(value)
            return value

        def any(self, flag: bool) -> bool:
            return flag

    for rank in range(3):
        evaluate(network, store, TASK, world=Rank(rank, 3), batch_size=50)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(len(store)))
    found = TASK.scores(torch.stack(sums).sum(0), len(store), 10)
    assert (found["top1"], found["top5"]) == (whole["top1"], whole["top5"])
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_a_sample_is_spread_over_the_split() -> None:
    network = tapped(Net())
    chosen = torch.arange(60) * len(DIGITS.test) // 60
    assert evaluate(network, DIGITS.test, TASK, sample=60) == evaluate(network, DIGITS.test.select(chosen), TASK)
    assert evaluate(network, DIGITS.test, TASK, sample=10**6) == evaluate(network, DIGITS.test, TASK)


def test_it_ends_early_when_it_is_asked_to() -> None:
    seen: list[int] = []
    with pytest.raises(Stopped):
        evaluate(tapped(Net()), DIGITS.test, TASK, batch_size=50, on_batch=seen.append, stopping=lambda: len(seen) == 2)
    assert seen == [50, 50]


def test_batches_on_a_cpu_are_short() -> None:
    seen: list[int] = []
    store = ImageStore(torch.zeros(12, 3, 224, 224, dtype=torch.uint8), torch.zeros(12).long(), DIGITS.test.classes)
    evaluate(tapped(Net()), store, TASK, on_batch=seen.append)
    assert seen == [5, 5, 2]


def test_modes_are_left_as_they_were() -> None:
    network = tapped(Net(dropout=0.5))
    network.train()
    network.network.norm.eval()  # type: ignore[union-attr]
    before = {name: part.training for name, part in network.named_modules()}
    evaluate(network, DIGITS.test, TASK, sample=10)
    assert {name: part.training for name, part in network.named_modules()} == before
