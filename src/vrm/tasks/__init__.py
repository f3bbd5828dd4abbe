"""What a network is trained for: targets, scores, which score counts as better, and what chance achieves.

Everything that compares, keeps or prints scores asks the task of the data set (``tasks.load(dataset.task)``) and knows
no score by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vrm.models.card import Card
from vrm.wording import nearest


@dataclass(frozen=True)
class Metric:
    """One score of an evaluation: its key in files, and how it is named and written for readers."""

    key: str
    label: str
    unit: str
    higher_is_better: bool
    perfect: float
    """The value that no network can surpass."""
    decimals: int = 2

    def text(self, value: float) -> str:
        """Return a value with its unit, for example ``72.31 %``."""
        return f"{value:.{self.decimals}f} {self.unit}"

    def describe(self, value: float) -> str:
        """Return a value with its name and unit, for example ``accuracy 72.31 %``."""
        return f"{self.label} {self.text(value)}"


class Labelled(Protocol):
    """What a task needs to know of a data set (a :class:`vrm.data.DataSet` is one)."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a class is its position here."""
        ...

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        ...


class Task(Protocol):
    """The rules of one kind of task. ``Scores`` below are dictionaries of values by metric key.

    Scores may hold other keys as well, such as the epoch they were measured after; a task ignores these.
    """

    @property
    def name(self) -> str:
        """The name by which data sets and cards refer to the task."""
        ...

    @property
    def primary(self) -> Metric:
        """The metric that decides which epoch is best, and that tables show."""
        ...

    def metrics(self, num_classes: int) -> tuple[Metric, ...]:
        """Return the K metrics of an evaluation: the primary one first, the task's own loss last."""
        ...

    def chance(self, num_classes: int) -> float:
        """Return the primary score that guessing is expected to reach."""
        ...

    def standard_error(self, value: float, num_samples: int) -> float:
        """Return the standard error of a primary score measured on ``num_samples`` randomly chosen samples."""
        ...

    def is_better(self, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
        """Return whether the scores ``new`` beat ``old`` in the primary metric; anything beats no scores at all."""
        ...

    def batch_sums(self, logits_BC: Tensor, target_B: Tensor, num_classes: int) -> Tensor:
        """Return each metric's sum over the samples of a batch, float64 (K,), for :meth:`scores`.

        Raise ``ValueError`` if the logits are not one for each class.
        """
        ...

    def scores(self, sums_K: Tensor, num_samples: int, num_classes: int) -> dict[str, float]:
        """Return the scores of an evaluation from the sums over all of its batches."""
        ...

    def training_score(self, logits_BC: Tensor, target_B: Tensor) -> Tensor:
        """Return the primary score of a training batch, a float64 scalar on its device."""
        ...

    def describe(self, scores: Mapping[str, float]) -> str:
        """Return the scores as text, for example ``accuracy 72.31 %, cross entropy 1.0214 nats``."""
        ...

    def check_classes(self, card: Card, data: Labelled, *, role: str) -> None:
        """Raise ``ValueError`` unless a network has as many classes as the data.

        ``role`` is what messages call the network, for example ``teacher``.
        """
        ...

    def check_order(self, card: Card, data: Labelled, *, role: str) -> None:
        """Raise ``ValueError`` if a network knows the data's classes by the same names, but in another order."""
        ...


def load(name: str) -> Task:
    """Return a task by name. Raise ``ValueError`` if there is none of that name."""
    from vrm.tasks.classification import Classification

    if name != Classification.name:
        raise ValueError(f"unknown task {name!r}; {nearest(name, [Classification.name])}")
    return Classification()
