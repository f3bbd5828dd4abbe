"""The interface of a split of a data set, wherever its images are kept.

A split that fits is kept decoded on the training device (:mod:`vrm.data.stores.memory`): a batch is one indexed read,
and every augmentation a tensor operation (:mod:`vrm.data.views`). Larger ones are kept decoded in the host's memory or
in mapped files (:mod:`vrm.data.stores.host`), or are decoded for every batch (:mod:`vrm.data.stores.stream`). The
networks see the same pixels in every case.

Shapes: N images, 3 channels (RGB), H x W pixels, B batch.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from vrm.data.formats.layout import to_label
from vrm.data.views.transforms import CentralCrop
from vrm.wording import counted, shape_in_words

if TYPE_CHECKING:
    from vrm.data.views.policies import ViewPolicy


class Store(ABC):
    """One split of a data set; every kind is a dataclass with a field ``crop``.

    ``targets``: int64 (N,), indices into ``classes``, on the training device. ``skipped``: the images left out as
    unreadable, each as "origin: reason". ``crop``: how evaluation crops an image, if it does.
    """

    targets: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    crop: CentralCrop | None

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        """Return one line: kind, number and size of the images, classes, device."""
        stored, seen = self.stored_size, self.image_size
        size = shape_in_words(stored) + f" ({shape_in_words(seen)} in evaluation)" * (stored != seen)
        return (
            f"{type(self).__name__}({counted(len(self), 'image')} of {size}, "
            f"{counted(self.num_classes, 'class', 'classes')}, for {self.targets.device})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of the images: ``torch.uint8``, or ``torch.float32`` where bytes cannot hold them."""
        return torch.uint8

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.classes)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels of the images that :meth:`batch` returns."""
        return self.stored_size if self.crop is None else (self.crop.size, self.crop.size)

    @property
    @abstractmethod
    def stored_size(self) -> tuple[int, int]:
        """(H, W) in pixels before the crop."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of everything that decides what :meth:`batch` returns, and of targets and classes."""

    @property
    @abstractmethod
    def num_bytes(self) -> int | None:
        """Bytes of all images decoded; ``None`` if they are never all decoded at once."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Return the same split for training on ``device``; only an :class:`ImageStore` moves its images there."""

    def with_crop(self, crop: CentralCrop | None) -> Self:
        """Return the same split, of which evaluation sees what ``crop`` leaves."""
        return replace(self, crop=crop)  # type: ignore[type-var]

    @abstractmethod
    def select(self, index_B: Tensor) -> Self:
        """Return a split of only the samples with these indices, in this order; ``classes`` stays whole."""

    @abstractmethod
    def batch(self, index_B: Tensor) -> Tensor:
        """Return the images with these indices as evaluation sees them, (B, 3, H, W), on the training device."""

    @abstractmethod
    def read(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(index_B, self.batch(index_B))`` for every batch of indices, read ahead."""

    def scan(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield consecutive samples, ``start`` to ``stop``, in batches, as :meth:`read` does."""
        index = torch.arange(len(self), device=self.targets.device)[start:stop]
        yield from self.read(torch.split(index, batch_size) if len(index) else ())

    @abstractmethod
    def batches(
        self, indices: Sequence[Tensor], *, epoch: int, seed: int, policy: ViewPolicy, num_virtual: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield ``(index_B, *images)``, on the training device, for every training step.

        ``images`` is empty where :meth:`batch` has them at once; one tensor for all views, uint8 (B, 3, H, W); or, if
        :meth:`crops` is true, one cropped tensor for each of the ``1 + num_virtual`` views.

        Args:
            indices: for every step the indices (B,) of its samples, on the training device.
            epoch: as the views count it.
            seed: the run's ``data.seed``.
            policy: the views that will be made of the images.
            num_virtual: how many virtual views.
        """

    @abstractmethod
    def histogram(self, index_B: Tensor) -> Tensor:
        """Count each level in each channel of these images, before any crop: int64 (3, 256) on the host."""

    def crops(self, policy: ViewPolicy) -> bool:
        """Return whether :meth:`batches` yields one tensor for each view, with the policy's first crop applied."""
        return False


def to_targets(targets: Any) -> Tensor:
    """Return labels as int64 (N,). Raise ``ValueError`` unless there is one integer for each of the N entries."""
    if not isinstance(targets, Tensor | np.ndarray):
        return torch.tensor([to_label(label) for label in targets], dtype=torch.int64)
    given = torch.as_tensor(targets)
    if given.is_floating_point() or given.is_complex() or given.ndim == 0 or given.numel() != len(given):
        raise ValueError(f"targets must be integers of shape (N,), got {given.dtype} {tuple(given.shape)}")
    return given.reshape(-1).long()


def describe_spread(store: Store) -> str:
    """Return in words how many images the classes have: ``50 images each``, ``from 3 images (a) to 1,200 (b)``."""
    counts = store.targets.cpu().bincount(minlength=store.num_classes)
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    low, high = int(counts[smallest]), int(counts[largest])
    if low == high:
        return f"{counted(low, 'image')} each"
    return f"from {counted(low, 'image')} ({store.classes[smallest]}) to {high:,} ({store.classes[largest]})"


def check_classes(targets: Tensor, classes: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless class names are unique and every target is the number of one."""
    repeated = sorted(name for name, count in Counter(classes).items() if count > 1)
    if repeated:
        raise ValueError(f"class names repeat: {', '.join(map(repr, repeated))}; each class needs its own")
    outside = torch.nonzero((targets < 0) | (targets >= len(classes)))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"image {row} has label {int(targets[row])}, but there {'is' if len(classes) == 1 else 'are'} "
            f"{counted(len(classes), 'class', 'classes')}, numbered from 0 to {len(classes) - 1}"
        )


def count_levels(images: Tensor) -> Tensor:
    """Count each level in each channel of uint8 images (B, 3, H, W): int64 (3, 256) on the host."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).cpu()


def hash_images(size: tuple[int, int], images: Iterable[Tensor], targets: Tensor, classes: tuple[str, ...]) -> str:
    """Return the SHA-256 (hexadecimal) of images of this size, in portions (n, 3, H, W), of targets and class names."""
    digest = start_hash(len(targets), size, classes)
    for portion in chain(images, [targets]):
        digest.update(portion.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def start_hash(num_images: int, size: tuple[int, int], classes: tuple[str, ...]) -> hashlib._Hash:
    """Begin a :func:`hash_images`; update it with all images and then with the targets."""
    return hashlib.sha256(json.dumps([[num_images, 3, *size], classes]).encode())


def hash_with_crop(content: str, crop: CentralCrop | None) -> str:
    """Return the hash of a store whose content has the hash ``content`` and is evaluated through ``crop``."""
    return content if crop is None else hashlib.sha256(f"{content} {crop}".encode()).hexdigest()
