"""Classification: the target of an image is one of C classes, and its score is how often the network names it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.models.card import Card
from vrm.tasks import Labelled, Metric
from vrm.wording import counted

TOP1 = Metric("top1", "top-1", "%", higher_is_better=True, perfect=100.0)
TOP5 = Metric("top5", "top-5", "%", higher_is_better=True, perfect=100.0)
LOSS = Metric("loss", "cross entropy", "nats", higher_is_better=False, perfect=0.0, decimals=4)


class Classification:
    """A target is a class number. Scores are top-1 and, above five classes, top-5 accuracy, and the cross entropy."""

    name = "classification"
    primary = TOP1

    def metrics(self, num_classes: int) -> tuple[Metric, ...]:
        """Return top-1, top-5 (above five classes, where it can fail) and the cross entropy."""
        return (TOP1, TOP5, LOSS) if num_classes > 5 else (TOP1, LOSS)

    def chance(self, num_classes: int) -> float:
        """Return the top-1 accuracy of guessing evenly among the classes, in percent."""
        return 100 / num_classes

    def standard_error(self, value: float, num_samples: int) -> float:
        """Return the standard error of a top-1 accuracy in percent, that of a binomial proportion."""
        share = min(max(value / 100, 0.0), 1.0)
        return 100 * math.sqrt(share * (1 - share) / num_samples)

    def is_better(self, new: Mapping[str, float], old: Mapping[str, float]) -> bool:
        """Return whether ``new`` has the higher top-1 accuracy, or ``old`` is empty."""
        return not old or new[TOP1.key] > old[TOP1.key]

    def batch_sums(self, logits_BC: Tensor, target_B: Tensor, num_classes: int) -> Tensor:
        """Return the number of top-1 hits, of top-5 hits (above five classes) and the summed cross entropy, float64.

        A row of logits with a NaN hits nothing, and makes the cross entropy NaN. Raise ``ValueError`` if there are not
        C logits.
        """
        if logits_BC.shape[1] != num_classes:
            raise ValueError(
                f"the network gives {counted(logits_BC.shape[1], 'logit')}, but the data have "
                f"{counted(num_classes, 'class', 'classes')}; give a network with one logit for each class"
            )
        logits_BC = logits_BC.float()
        hits = logits_BC.topk(5 if num_classes > 5 else 1, dim=1).indices == target_B[:, None]
        hits = hits & ~logits_BC.isnan().any(1, keepdim=True)  # topk puts NaN first, whatever the class
        loss = F.cross_entropy(logits_BC, target_B, reduction="sum")
        counts = [hits[:, 0].sum(), hits.sum()] if num_classes > 5 else [hits.sum()]
        return torch.stack([*counts, loss]).double()

    def scores(self, sums_K: Tensor, num_samples: int, num_classes: int) -> dict[str, float]:
        """Return accuracies in percent and the mean cross entropy in nats from the sums of :meth:`batch_sums`."""
        means = dict(zip(self.metrics(num_classes), (sums_K / num_samples).tolist(), strict=True))
        return {metric.key: mean if metric is LOSS else 100 * mean for metric, mean in means.items()}

    def training_score(self, logits_BC: Tensor, target_B: Tensor) -> Tensor:
        """Return the top-1 accuracy of a batch in percent, a float64 scalar on its device."""
        return 100.0 * (logits_BC.argmax(1) == target_B).double().mean()

    def describe(self, scores: Mapping[str, float]) -> str:
        """Return those of top-1, top-5 and cross entropy that ``scores`` holds, with their units."""
        return ", ".join(metric.describe(scores[metric.key]) for metric in (TOP1, TOP5, LOSS) if metric.key in scores)

    def check_classes(self, card: Card, data: Labelled, *, role: str) -> None:
        """Raise ``ValueError`` unless network and data have the same number of classes."""
        if card.num_classes != data.num_classes:
            raise ValueError(
                f"{role} {card.architecture} has {card.num_classes} classes, but {data.name} has {data.num_classes}; "
                f"give a {role} trained for this data"
            )

    def check_order(self, card: Card, data: Labelled, *, role: str) -> None:
        """Raise ``ValueError`` if a network knows the data's classes by the same names, but in another order."""
        if card.classes != data.classes and sorted(card.classes) == sorted(data.classes):
            place = next(i for i, (a, b) in enumerate(zip(card.classes, data.classes, strict=True)) if a != b)
            raise ValueError(
                f"{role} {card.architecture} has the classes of {data.name} in another order: its class {place} is "
                f"{card.classes[place]!r}, that of the data {data.classes[place]!r}; give a {role} trained for this "
                "data"
            )
