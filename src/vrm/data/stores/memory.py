"""A split that is kept decoded in the memory of the training device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from vrm.data.stores.base import Store, check_classes, count_levels, hash_images, hash_with_crop
from vrm.data.views.transforms import CentralCrop

if TYPE_CHECKING:
    from vrm.data.views.policies import ViewPolicy


@dataclass(frozen=True, eq=False)
class ImageStore(Store):
    """A split whose decoded images are in the memory of the training device.

    ``images``: uint8 (N, 3, H, W), contiguous, on the device of ``targets``. Raise ``ValueError`` for anything else, or
    if images and targets do not fit each other.
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
        return (self.images.shape[2], self.images.shape[3])

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of shapes, images, targets and class names, the same on every device."""
        return hash_with_crop(hash_images(self.stored_size, [self.images], self.targets, self.classes), self.crop)

    @property
    def num_bytes(self) -> int:
        return self.images.numel()

    def to(self, device: torch.device | str) -> Self:
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))

    def select(self, index_B: Tensor) -> Self:
        return replace(self, images=self.images[index_B].contiguous(), targets=self.targets[index_B])

    def batch(self, index_B: Tensor) -> Tensor:
        images = self.images[index_B]
        return images if self.crop is None else self.crop(images)

    def read(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index_B in indices:
            yield index_B, self.batch(index_B)

    def batches(
        self, indices: Sequence[Tensor], *, epoch: int, seed: int, policy: ViewPolicy, num_virtual: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield ``(index_B,)`` for every step: :meth:`batch` has the images at once."""
        for index_B in indices:
            yield (index_B,)

    def histogram(self, index_B: Tensor) -> Tensor:
        return count_levels(self.images[index_B.to(self.images.device)])
