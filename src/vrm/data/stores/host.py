"""Decoded images that are kept off the training device, in the host's memory or in mapped files.

Threads gather each batch into pinned memory some batches ahead, and it is copied to the GPU while that works on the
batch before. On the CPU the same code runs without pinning.

Shapes: N images, 3 channels (RGB), H x W pixels, B batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from vrm.data.stores.base import Store, count_levels, hash_images, hash_with_crop
from vrm.data.stores.memory import ImageStore
from vrm.data.stores.prefetch import copy_to_device, run_ahead, split_on_host
from vrm.data.views.transforms import CentralCrop

if TYPE_CHECKING:
    from vrm.data.views.policies import ViewPolicy

_PORTION = 1 << 26
"""Bytes of images handled at once when all images are gone through."""


class ImageRows(Protocol):
    """Decoded images of one size, off the training device, by number."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the images."""

    @property
    def hash(self) -> str:
        """The :func:`~vrm.data.stores.base.hash_images` of all of them."""

    @property
    def location(self) -> str:
        """Where they are kept, in words."""

    def __len__(self) -> int: ...

    def copy_rows(self, rows: Sequence[int], out: Tensor) -> None:
        """Copy the images with these numbers to ``out``, (B, 3, H, W). Called from several threads."""


@dataclass(frozen=True, eq=False)
class RowsInMemory:
    """The images of a store in the host's memory; the store has no crop."""

    store: ImageStore
    location = "host memory"

    @property
    def size(self) -> tuple[int, int]:
        return self.store.stored_size

    @property
    def dtype(self) -> torch.dtype:
        return self.store.dtype

    @property
    def hash(self) -> str:
        return self.store.hash

    def __len__(self) -> int:
        return len(self.store)

    def copy_rows(self, rows: Sequence[int], out: Tensor) -> None:
        # NumPy's take uses one core and lets other threads run; in this mode it needs no buffer.
        np.take(self.store.images.numpy(), rows, axis=0, out=out.numpy(), mode="clip")


@dataclass(frozen=True, eq=False, repr=False)
class HostStore(Store):
    """A split whose decoded images are in the host's memory or in files; ``targets`` are on the training device.

    ``chosen``: the numbers (N,) of the rows that belong to the split; ``None``: all of ``rows`` do.
    """

    rows: ImageRows
    targets: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    crop: CentralCrop | None = None
    chosen: Tensor | None = None

    @property
    def stored_size(self) -> tuple[int, int]:
        return self.rows.size

    @property
    def num_bytes(self) -> int:
        height, width = self.rows.size
        return len(self) * 3 * height * width * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @cached_property
    def hash(self) -> str:
        """The hash of an :class:`ImageStore` of the same images."""
        if self.chosen is None:
            return hash_with_crop(self.rows.hash, self.crop)
        return hash_with_crop(hash_images(self.rows.size, self._portions(), self.targets, self.classes), self.crop)

    def to(self, device: torch.device | str) -> Self:
        return replace(self, targets=self.targets.to(device))

    def select(self, index_B: Tensor) -> Self:
        rows = index_B.cpu() if self.chosen is None else self.chosen[index_B.cpu()]
        return replace(self, targets=self.targets[index_B], chosen=rows)

    def to_image_store(self) -> ImageStore:
        """Copy the images to the device of the targets."""
        images = torch.empty((len(self), 3, *self.rows.size), dtype=self.dtype, device=self.targets.device)
        done = 0
        for portion in self._portions():
            images[done : done + len(portion)] = portion
            done += len(portion)
        return ImageStore(images, self.targets, self.classes, self.skipped, self.crop)

    def batch(self, index_B: Tensor) -> Tensor:
        images = self._gather(index_B.cpu()).to(self.targets.device)
        return images if self.crop is None else self.crop(images)

    def read(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index_B, images in self._gather_ahead(indices):
            yield index_B, images if self.crop is None else self.crop(images)

    def batches(
        self, indices: Sequence[Tensor], *, epoch: int, seed: int, policy: ViewPolicy, num_virtual: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield ``(index_B, images)`` for every step: one tensor (B, 3, H, W) for all views, read ahead."""
        yield from self._gather_ahead(indices)

    def histogram(self, index_B: Tensor) -> Tensor:
        return count_levels(self._gather(index_B.cpu()))

    def _gather_ahead(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        gathered = run_ahead(partial(self._gather, index_B) for index_B in split_on_host(indices))
        copied = copy_to_device(self.targets.device, ((images,) for images in gathered))
        for index_B, (images,) in zip(indices, copied, strict=True):
            yield index_B, images

    def _gather(self, index_B: Tensor) -> Tensor:
        """Copy the images with these indices (on the host) to one tensor, pinned if a GPU trains."""
        rows = index_B if self.chosen is None else self.chosen[index_B]
        shape, pinned = (len(rows), 3, *self.rows.size), self.targets.device.type == "cuda"
        images = torch.empty(shape, dtype=self.dtype, pin_memory=pinned)
        self.rows.copy_rows(rows.tolist(), images)
        return images

    def _portions(self) -> Iterator[Tensor]:
        """Yield all images in order, some at a time."""
        height, width = self.rows.size
        count = max(1, _PORTION // (3 * height * width * self.dtype.itemsize))
        return run_ahead(partial(self._gather, index) for index in torch.split(torch.arange(len(self)), count))
