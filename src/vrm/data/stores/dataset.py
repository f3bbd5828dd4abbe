"""A data set: two splits with the same classes, the statistics of its channels, and the order of an epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from vrm.data.stores.base import Store
from vrm.data.stores.memory import ImageStore
from vrm.data.views.policies import view_policy
from vrm.randomness import permutation
from vrm.wording import counted

ChannelValues = tuple[float, float, float]
"""One value for each of the channels R, G, B."""

AnyStore = TypeVar("AnyStore", bound=Store)


@dataclass(frozen=True, eq=False, repr=False)
class DataSet:
    """Two splits with the same classes and image size, and what belongs to their images.

    ``test`` is always seen as the view policy's evaluation says, whatever ``crop`` it was given with. It may lack
    classes of ``train``, also their names: its classes are then numbered as those of ``train``. ``mean`` and ``std``:
    per channel, of pixels scaled to [0, 1], or of float images as they are. ``view_policy``: the name of the views that
    suit these images (digits must not be flipped), see :mod:`vrm.data.views`. ``placement``: where the images are kept
    and why, as :func:`vrm.data.place` describes it. ``task``: the name of the task, see :mod:`vrm.tasks`. ``origin``:
    what was taken as train and test, in words, where there was a choice.
    """

    name: str
    train: Store
    test: Store
    mean: ChannelValues
    std: ChannelValues
    view_policy: str
    placement: str = ""
    task: str = "classification"
    origin: str = ""

    def __post_init__(self) -> None:
        try:
            policy = view_policy(self.view_policy)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        # Training images are whole, unless they may have any size because each view is cropped as it is decoded.
        train_crop = policy.evaluation if self.train.crops(policy) else None
        for split, store, crop in (("train", self.train, train_crop), ("test", self.test, policy.evaluation)):
            if store.crop != crop:
                object.__setattr__(self, split, store.with_crop(crop))
        if isinstance(self.test, ImageStore) and set(self.test.classes) < set(self.train.classes):
            object.__setattr__(self, "test", self.test.with_classes(self.train.classes))
        if self.train.classes != self.test.classes:
            only_train = [name for name in self.train.classes if name not in self.test.classes]
            only_test = [name for name in self.test.classes if name not in self.train.classes]
            raise ValueError(
                f"{self.name}: train and test must have the same classes in the same order; "
                f"only in train: {only_train}, only in test: {only_test}"
                + "; nothing is learnt of a class that train lacks"
                * bool(only_test)
            )
        if self.test.crop is None and self.train.image_size != self.test.image_size:
            raise ValueError(
                f"{self.name}: train images are {self.train.image_size}, test images {self.test.image_size} pixels; "
                "both splits need one size"
            )
        if min(self.std) <= 0:
            raise ValueError(
                f"{self.name}: std must be positive in every channel, got {self.std}; give 1 for a channel that never "
                "varies, as channel_statistics does"
            )
        for store, other in ((self.train, self.test), (self.test, self.train)):
            if isinstance(store, ImageStore) and store.dtype != other.dtype == torch.uint8:
                low, high = (float(end) for end in store.images.aminmax())
                if low < 0 or high > 1:
                    raise ValueError(
                        f"{self.name}: one split holds bytes, which networks see as 0 .. 1, the other floats from "
                        f"{low:.3g} to {high:.3g}; give both splits the same transform"
                    )

    def __repr__(self) -> str:
        """Return one line: name, splits, views and placement."""
        where = f", {self.placement}" * bool(self.placement)
        return f"DataSet({self.name!r}, train={self.train}, test={self.test}, views {self.view_policy}{where})"

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a class's number is its position here."""
        return self.train.classes

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self.train.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels, as evaluation sees the images."""
        return self.test.image_size

    def to(self, device: torch.device | str) -> DataSet:
        """Return the same data set for training on ``device``."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


_SAMPLE = 10_000
_PORTION = 512


def channel_statistics(
    store: Store, *, progress: Callable[[int, int], None] | None = None
) -> tuple[ChannelValues, ChannelValues]:
    """Return mean and standard deviation of each channel, of pixels scaled to [0, 1], or of float images as they are.

    For a channel that never varies the standard deviation is 1, by which it can be divided. Those of bytes are computed
    from exact histograms, so they are the same on every machine and in every kind of store. Of more than 10,000 images,
    10,000 spread evenly over the split are used. ``progress`` is called with (done, total).
    """
    count = min(len(store), _SAMPLE)
    chosen = torch.arange(count) * len(store) // count
    if store.dtype != torch.uint8:
        return _statistics_of_floats(store.with_crop(None), torch.split(chosen, _PORTION))
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for index in torch.split(chosen, _PORTION):
        counts += store.histogram(index)
        if progress:
            progress(int(index[-1]) + 1, len(store))
    level = torch.arange(256, dtype=torch.float64) / 255
    frequency = counts.double() / counts.sum(1, keepdim=True)
    mean = (frequency * level).sum(1, keepdim=True)
    std = (frequency * (level - mean) ** 2).sum(1).sqrt()
    return _to_channel_values(mean[:, 0]), _to_channel_values(torch.where(std > 0, std, 1.0))


def _statistics_of_floats(store: Store, indices: Sequence[Tensor]) -> tuple[ChannelValues, ChannelValues]:
    """Return mean and standard deviation of each channel of these float images, as :func:`channel_statistics`."""
    # Sums of differences from the first pixel are exactly zero in a channel that never varies.
    first = store.batch(indices[0][:1])[:, :, :1, :1].double().cpu()
    number, sums, squares = 0, torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for index in indices:
        difference = store.batch(index).double().cpu() - first
        number += difference.numel() // 3
        sums += difference.sum((0, 2, 3))
        squares += (difference**2).sum((0, 2, 3))
    std = (squares / number - (sums / number) ** 2).clamp(min=0).sqrt()
    return _to_channel_values(first.flatten() + sums / number), _to_channel_values(torch.where(std > 0, std, 1.0))


def _to_channel_values(values: Tensor) -> ChannelValues:
    red, green, blue = values.tolist()
    return red, green, blue


def few_labels(store: AnyStore, labels_per_class: int) -> AnyStore:
    """Keep only ``labels_per_class`` samples of each class, in the order of the store.

    The choice depends only on the store's targets, and fewer labels are a subset of more. Raise ``ValueError`` if a
    class has not that many.
    """
    if labels_per_class < 1:
        raise ValueError(f"labels_per_class must be at least 1, got {labels_per_class}")
    kept = []
    for label, name in enumerate(store.classes):
        members = torch.nonzero(store.targets == label).flatten()
        if len(members) < labels_per_class:
            raise ValueError(
                f"labels_per_class={labels_per_class}, but class {name!r} has only {counted(len(members), 'sample')}"
            )
        shuffled = permutation(len(members), 0, "few labels", label, device=members.device)
        kept.append(members[shuffled[:labels_per_class]])
    return store.select(torch.cat(kept).sort().values)


def epoch_order(num_samples: int, *, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the order (N,) in which an epoch visits the samples: a function of seed and epoch alone."""
    return permutation(num_samples, seed, "epoch order", epoch, device=device)


def epoch_batches(
    num_samples: int, batch_size: int, *, seed: int, epoch: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Cut the epoch's order into batches of indices (B,); the last one may be smaller, none is dropped."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return torch.split(epoch_order(num_samples, seed=seed, epoch=epoch, device=device), batch_size)
