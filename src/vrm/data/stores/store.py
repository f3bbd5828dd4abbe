"""Splits of a data set, wherever their images lie, and the order in which an epoch visits them.

Every split is a :class:`Store`. One that fits is kept decoded, as bytes, on the device that trains: a batch is then one
indexed read, and every augmentation is a tensor operation (:mod:`vrm.data.views`). Larger ones lie in the host's memory
or in mapped files (:mod:`vrm.data.stores.host`), or are decoded for every batch (:mod:`vrm.data.stores.stream`). What a
network sees is the same in every case.

Shapes: N images, 3 channels (RGB), H x W pixels, B batch.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from torch import Tensor

from vrm.data.views.transforms import CentralCrop
from vrm.randomness import permutation

if TYPE_CHECKING:
    from vrm.data.views.policies import ViewPolicy

ChannelValues = tuple[float, float, float]


class BadData(ValueError):
    """Data that cannot be used, met when they are read: the message says which, why, and what to do."""

    exit_code = 1


class Store(ABC):
    """One split of a data set.

    ``targets``: int64 (N,), class indices into ``classes``, on the device that trains. ``skipped``: the images that
    were left out as unreadable, each as "origin: reason". ``crop``: how evaluation sees an image, where not as it is.
    """

    targets: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    crop: CentralCrop | None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.classes)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels of the images that :meth:`batch` gives."""
        return self.stored_size if self.crop is None else (self.crop.size, self.crop.size)

    @property
    @abstractmethod
    def stored_size(self) -> tuple[int, int]:
        """(H, W) in pixels before the crop."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of everything that decides what :meth:`batch` gives, and of targets and classes."""

    @property
    @abstractmethod
    def num_bytes(self) -> int | None:
        """Bytes of all images decoded; ``None`` where they never are at once."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same split for training on ``device``; images that do not lie on the device stay where they are."""

    @abstractmethod
    def select(self, index_B: Tensor) -> Self:
        """The samples with these indices only, in their order; the class list stays whole."""

    @abstractmethod
    def batch(self, index_B: Tensor) -> Tensor:
        """The images with these indices as evaluation sees them, uint8 (B, 3, H, W) on the device of ``targets``."""

    @abstractmethod
    def read(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """``(index_B, self.batch(index_B))`` for every batch of indices, read ahead."""

    def scan(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`read`, of consecutive samples."""
        index = torch.arange(len(self), device=self.targets.device)[start:stop]
        yield from self.read(torch.split(index, batch_size) if len(index) else ())

    @abstractmethod
    def feed(
        self, batches: Sequence[Tensor], *, epoch: int, seed: int, policy: ViewPolicy, num_virtual: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """What a training step needs of every batch, ``(index_B, *images)``, on the device of ``targets``.

        No images where :meth:`batch` has them at once; one tensor of them, uint8 (B, 3, H, W), for all views; or one
        for each of the ``1 + num_virtual`` views, cropped already, where :meth:`crops` says so.

        Args:
            batches: indices (B,) on the device of ``targets``, in the order to train.
            epoch: as the views count it.
            seed: the run's ``data.seed``.
            policy: the views that will be made of the images.
            num_virtual: how many virtual views.
        """

    @abstractmethod
    def levels(self, index_B: Tensor) -> Tensor:
        """How often each level occurs in each channel of these images, before any crop: int64 (3, 256) on the host."""

    def crops(self, policy: ViewPolicy) -> bool:
        """Whether :meth:`feed` gives one tensor for each view, with the crop at the head of the policy made."""
        return False


@dataclass(frozen=True, eq=False)
class ImageStore(Store):
    """A split that is decoded and lies in the memory of the device that trains.

    ``images`` uint8 (N, 3, H, W), contiguous, on the device of ``targets``. ``ValueError`` if images and targets are
    anything else, or do not fit each other.
    """

    images: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    crop: CentralCrop | None = None

    def __post_init__(self) -> None:
        images, targets = self.images, self.targets
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.is_contiguous():
            raise ValueError(
                f"images must be a contiguous uint8 tensor (N, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        if 0 in images.shape:
            raise ValueError(f"images are empty, of shape {tuple(images.shape)}; a store needs at least one")
        if targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
            raise ValueError(
                f"targets must be an int64 tensor ({len(images)},), one for each image, "
                f"got {targets.dtype} {tuple(targets.shape)}"
            )
        check_classes(targets, self.classes)

    @property
    def stored_size(self) -> tuple[int, int]:
        """(H, W) in pixels before the crop."""
        return (self.images.shape[2], self.images.shape[3])

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of shapes, images, targets and class names, whatever device holds them."""
        return with_crop(content_hash(self.stored_size, [self.images], self.targets, self.classes), self.crop)

    @property
    def num_bytes(self) -> int:
        """Bytes of all images."""
        return self.images.numel()

    def to(self, device: torch.device | str) -> Self:
        """The same store on ``device``."""
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))

    def select(self, index_B: Tensor) -> Self:
        """A store of the samples with these indices only, in their order; the class list stays whole."""
        return replace(self, images=self.images[index_B].contiguous(), targets=self.targets[index_B])

    def batch(self, index_B: Tensor) -> Tensor:
        """The images with these indices, uint8 (B, 3, H, W)."""
        images = self.images[index_B]
        return images if self.crop is None else self.crop(images)

    def read(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """``(index_B, self.batch(index_B))`` for every batch of indices."""
        for index_B in batches:
            yield index_B, self.batch(index_B)

    def feed(
        self, batches: Sequence[Tensor], *, epoch: int, seed: int, policy: ViewPolicy, num_virtual: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """The batches of indices, ``(index_B,)`` each: :meth:`batch` has the images at once."""
        for index_B in batches:
            yield (index_B,)

    def levels(self, index_B: Tensor) -> Tensor:
        """How often each level occurs in each channel of these images: int64 (3, 256) on the host."""
        return count_levels(self.images[index_B.to(self.images.device)])


def check_classes(targets: Tensor, classes: tuple[str, ...]) -> None:
    """``ValueError`` unless class names differ and every target is the number of one."""
    repeated = sorted(name for name, count in Counter(classes).items() if count > 1)
    if repeated:
        raise ValueError(f"class names repeat: {', '.join(map(repr, repeated))}; each class needs its own")
    outside = torch.nonzero((targets < 0) | (targets >= len(classes)))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"image {row} has label {int(targets[row])}, but the {len(classes)} classes are numbered "
            f"0 to {len(classes) - 1}"
        )


def content_hash(size: tuple[int, int], images: Iterable[Tensor], targets: Tensor, classes: tuple[str, ...]) -> str:
    """SHA-256 (hexadecimal) of images of this size, given in portions (n, 3, H, W), of targets and class names."""
    digest = hash_of(len(targets), size, classes)
    for portion in chain(images, [targets]):
        digest.update(portion.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def hash_of(num_images: int, size: tuple[int, int], classes: tuple[str, ...]) -> hashlib._Hash:
    """The beginning of a :func:`content_hash`, to be told the images and then the targets."""
    return hashlib.sha256(json.dumps([[num_images, 3, *size], classes]).encode())


def with_crop(content: str, crop: CentralCrop | None) -> str:
    """The hash of a store that shows what has this hash through ``crop``."""
    return content if crop is None else hashlib.sha256(f"{content} {crop}".encode()).hexdigest()


Kind = TypeVar("Kind", bound=Store)

Stores = tuple[ImageStore, ImageStore]
"""Train and test."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """A classification task: two splits with the same classes and image size, and what belongs to its images.

    ``mean`` and ``std``: per channel, of pixels scaled to [0, 1]. ``view_policy``: the name of the views that suit
    these images (digits must not be flipped), see :mod:`vrm.data.views`. ``placement``: where the images lie
    and why, as :func:`vrm.data.place` tells it.
    """

    name: str
    train: Store
    test: Store
    mean: ChannelValues
    std: ChannelValues
    view_policy: str
    placement: str = ""
    task: str = "classification"
    """What its targets are, see :mod:`vrm.tasks`."""

    def __post_init__(self) -> None:
        if self.train.classes != self.test.classes:
            only_train = [name for name in self.train.classes if name not in self.test.classes]
            only_test = [name for name in self.test.classes if name not in self.train.classes]
            raise ValueError(
                f"{self.name}: train and test must have the same classes in the same order; "
                f"only in train: {only_train}, only in test: {only_test}"
            )
        if self.test.crop is None and self.train.image_size != self.test.image_size:
            raise ValueError(
                f"{self.name}: train images are {self.train.image_size}, test images {self.test.image_size} pixels; "
                "both splits need one size"
            )
        if min(self.std) <= 0:
            raise ValueError(f"{self.name}: std must be positive in every channel, got {self.std}")

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a class is its position here."""
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
        """The same data on ``device``."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


_SAMPLE = 10_000
_PORTION = 512


def channel_statistics(
    store: Store, *, progress: Callable[[int, int], None] | None = None
) -> tuple[ChannelValues, ChannelValues]:
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1].

    Computed from exact histograms, the same on every machine and wherever the images lie; of more than 10,000 images
    from so many, spread evenly over the split. ``progress`` is called with (done, total).
    """
    count = min(len(store), _SAMPLE)
    chosen = torch.arange(count) * len(store) // count
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for index in torch.split(chosen, _PORTION):
        counts += store.levels(index)
        if progress:
            progress(int(index[-1]) + 1, len(store))
    level = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = (share * level).sum(1, keepdim=True)
    std = (share * (level - mean) ** 2).sum(1).sqrt()
    return _three(mean[:, 0]), _three(std)


def _three(values: Tensor) -> ChannelValues:
    red, green, blue = values.tolist()
    return red, green, blue


def count_levels(images: Tensor) -> Tensor:
    """How often each level occurs in each channel of uint8 images (B, 3, H, W): int64 (3, 256) on the host."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).cpu()


def few_labels(store: Kind, labels_per_class: int) -> Kind:
    """Only ``labels_per_class`` samples of each class, in the order of the store.

    The choice depends on nothing but the store's targets, and fewer labels are a subset of more. ``ValueError`` if a
    class has not that many.
    """
    if labels_per_class < 1:
        raise ValueError(f"labels_per_class must be at least 1, got {labels_per_class}")
    kept = []
    for label, name in enumerate(store.classes):
        members = torch.nonzero(store.targets == label).flatten()
        if len(members) < labels_per_class:
            raise ValueError(f"labels_per_class={labels_per_class}, but class {name!r} has only {len(members)} samples")
        shuffled = permutation(len(members), 0, "few labels", label, device=members.device)
        kept.append(members[shuffled[:labels_per_class]])
    return store.select(torch.cat(kept).sort().values)


def epoch_order(num_samples: int, *, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The order (N,) in which an epoch visits the samples: a function of seed and epoch alone."""
    return permutation(num_samples, seed, "epoch order", epoch, device=device)


def epoch_batches(
    num_samples: int, batch_size: int, *, seed: int, epoch: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """The epoch's order cut into batches of indices (B,); the last one may be smaller, none is dropped."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return torch.split(epoch_order(num_samples, seed=seed, epoch=epoch, device=device), batch_size)
