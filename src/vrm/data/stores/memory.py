"""A split that is kept decoded in the memory of the training device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from vrm.data.stores.base import Store, check_classes, count_levels, hash_images, hash_with_crop, to_targets
from vrm.data.views.transforms import CentralCrop
from vrm.wording import counted

if TYPE_CHECKING:
    from vrm.data.views.policies import ViewPolicy


@dataclass(frozen=True, eq=False, repr=False)
class ImageStore(Store):
    """A split whose decoded images are in the memory of the training device.

    ``images``: (N, 3, H, W), contiguous, on the device of ``targets``: bytes, or float32, which networks see as they
    are. ``targets``: integers (N,) or (N, 1). Raise ``ValueError`` for anything else, or if images and targets do not
    fit each other.
    """

    images: Tensor
    targets: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    crop: CentralCrop | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", to_targets(self.targets))
        images, targets = self.images, self.targets
        known = images.dtype in (torch.uint8, torch.float32)
        if not known or images.ndim != 4 or images.shape[1] != 3 or not images.is_contiguous():
            raise ValueError(
                "images must be a contiguous uint8 or float32 tensor (N, 3, H, W), "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        if 0 in images.shape:
            raise ValueError(f"images are empty, of shape {tuple(images.shape)}; a store needs at least one")
        if len(targets) != len(images):
            raise ValueError(f"{counted(len(images), 'image')} need as many targets, got {len(targets)}")
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
        return self.images.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.images.dtype

    def to(self, device: torch.device | str) -> Self:
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))

    def select(self, index_B: Tensor) -> Self:
        return replace(self, images=self.images[index_B].contiguous(), targets=self.targets[index_B])

    def with_classes(self, classes: tuple[str, ...]) -> Self:
        """Return the same split with its classes numbered as in ``classes``, which holds all of them and more."""
        numbers = torch.tensor([classes.index(name) for name in self.classes], device=self.targets.device)
        return replace(self, targets=numbers[self.targets], classes=classes)

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
