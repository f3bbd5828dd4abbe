"""A split of class folders whose images, of any size, are decoded anew for every batch.

What :mod:`vrm.data.stores.decoding` returns for a batch goes to the training device, where flips, RandAugment and the
like follow for the whole batch.

Shapes: N images, 3 channels (RGB), H x W pixels, B batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrm.data.formats.images import SUFFIXES, BadImage, decode_image
from vrm.data.formats.layout import EncodedFiles, EncodedSplit, fingerprint, shown
from vrm.data.stores.base import Store, check_classes, hash_with_crop
from vrm.data.stores.decoding import REQUEST_SIZE, Decoder, Request, default_workers
from vrm.data.stores.placement import HOST_FRACTION, Placement, free_memory
from vrm.data.stores.prefetch import copy_to_device, split_on_host
from vrm.data.views.transforms import CentralCrop
from vrm.wording import bytes_in_words

if TYPE_CHECKING:
    from vrm.data.views.policies import ViewPolicy

_HASHED = 1 << 30
"""Bytes of a split's files that its hash reads at most, which take a disk of today a second or two."""


@dataclass(frozen=True, eq=False, repr=False)
class StreamStore(Store):
    """A split whose images are decoded anew for every batch; ``targets`` are on the training device.

    ``names``: the encoded paths of the files within ``folder``, in an array: a million of them take little memory.
    ``side``: (H, W) of every image, where the data set fixes it. ``size``: every image is fitted to this square before
    anything else. Without both, images stay as they are: they must have one size, or the views begin with a resized
    crop and evaluation with ``crop``. ``chosen``: the numbers (N,) of the files that belong to the split; ``None``: all
    do.
    """

    folder: Path
    names: NDArray[np.bytes_]
    targets: Tensor
    classes: tuple[str, ...]
    decoder: Decoder
    skipped: tuple[str, ...] = ()
    size: int | None = None
    side: tuple[int, int] | None = None
    crop: CentralCrop | None = None
    chosen: Tensor | None = None

    def __post_init__(self) -> None:
        check_classes(self.targets, self.classes)

    def file(self, row: int) -> str:
        """Return the path of a file."""
        return os.path.join(self.folder, os.fsdecode(self.names[row]))

    @cached_property
    def stored_size(self) -> tuple[int, int]:
        """(H, W) in pixels before the crop; without ``size`` and ``side`` that of the first image."""
        if self.size is not None:
            return self.size, self.size
        if self.side is not None:
            return self.side
        file = self._paths([0])[0]
        first = decode_image(Path(file), shown(Path(file)), size=None)
        return first.height, first.width

    @property
    def num_bytes(self) -> None:
        """``None``: the images are never all decoded at once."""
        return None

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of the names, sizes and contents of the files, of targets, classes and sizes.

        Of more than 1 GiB of files, 1 GiB is read, in files spread evenly over the split.
        """
        digest = hashlib.sha256(json.dumps([len(self), self.size, self.side, self.classes]).encode())
        rows = range(len(self)) if self.chosen is None else self.chosen.tolist()
        sizes = np.fromiter((_file_size(self.file(row)) for row in rows), np.int64, len(self))
        for row in rows:
            digest.update(self.names[row] + b"\0")
        digest.update(sizes.data)
        digest.update(self.targets.cpu().numpy().data)
        chosen = rows[:: max(1, -(-int(sizes.clip(0).sum()) // _HASHED))]
        portion = 32

        def fingerprints(start: int) -> bytes:
            return json.dumps([fingerprint(Path(self.file(row))) for row in chosen[start : start + portion]]).encode()

        with ThreadPoolExecutor(default_workers()) as pool:
            for content in pool.map(fingerprints, range(0, len(chosen), portion)):
                digest.update(content)
        return hash_with_crop(digest.hexdigest(), self.crop)

    def to(self, device: torch.device | str) -> Self:
        return replace(self, targets=self.targets.to(device))

    def select(self, index_B: Tensor) -> Self:
        rows = index_B.cpu() if self.chosen is None else self.chosen[index_B.cpu()]
        return replace(self, targets=self.targets[index_B], chosen=rows)

    def batch(self, index_B: Tensor) -> Tensor:
        ((_, images),) = self.read([index_B])
        return images

    def read(self, indices: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index_B, (images,) in zip(indices, self._decode(indices, self._whole(self.crop)), strict=True):
            yield index_B, images

    def batches(
        self, indices: Sequence[Tensor], *, epoch: int, seed: int, policy: ViewPolicy, num_virtual: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield ``(index_B, *images)`` for every step: whole images, or the crop of each view if :meth:`crops`."""
        request = self._whole(None)
        if policy.crops is not None and self.crops(policy):
            real, virtual = policy.crops
            request = Request((), self.side, crops=(real, *[virtual] * num_virtual), epoch=epoch, seed=seed)
        for index_B, images in zip(indices, self._decode(indices, request), strict=True):
            yield index_B, *images

    def crops(self, policy: ViewPolicy) -> bool:
        """Return whether images are cropped for every view where they are decoded: those that are not fitted first."""
        return policy.crops is not None and self.size is None

    def histogram(self, index_B: Tensor) -> Tensor:
        tasks = self._requests(index_B.cpu(), Request((), self.side, self.size, histogram=True))
        return torch.stack([counts for (counts,) in self.decoder.decode(tasks, depth=len(tasks))]).sum(0)

    def _whole(self, crop: CentralCrop | None) -> Request:
        """Return a request for whole images, or for what evaluation sees of them."""
        side = self.stored_size if crop is None and self.size is None else self.side
        return Request((), side, self.size, crop)

    def _paths(self, index: Sequence[int]) -> tuple[str, ...]:
        rows = index if self.chosen is None else self.chosen[torch.as_tensor(index)].tolist()
        return tuple(self.file(row) for row in rows)

    def _requests(self, index_B: Tensor, request: Request) -> list[Callable[[], Request]]:
        """Return functions that make the requests for these samples (indices on the host), a few samples each."""

        def make(rows: Tensor) -> Request:
            index = tuple(rows.tolist())
            return replace(request, files=self._paths(index), index=index)

        return [partial(make, rows) for rows in torch.split(index_B, REQUEST_SIZE)]

    def _decode(self, indices: Sequence[Tensor], request: Request) -> Iterator[tuple[Tensor, ...]]:
        """Yield what the request wants of every batch of indices, on the training device."""
        batches = [self._requests(index_B, request) for index_B in split_on_host(indices)]
        largest = max(map(len, batches), default=1)
        parts = self.decoder.decode([make for batch in batches for make in batch], depth=largest)
        return copy_to_device(self.targets.device, (self._join(parts, len(batch)) for batch in batches))

    def _join(self, parts: Iterator[tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
        """Join the next parts to a batch, pinned if a GPU trains."""
        pinned = self.targets.device.type == "cuda"
        return tuple(
            torch.cat(view, out=torch.empty(0, dtype=torch.uint8, pin_memory=pinned))
            for view in zip(*(next(parts) for _ in range(count)), strict=True)
        )


def _file_size(file: str) -> int:
    """Return -1 for a file that is not there: decoding it will say so."""
    return os.stat(file).st_size if os.path.exists(file) else -1


# ---- which data sets are streamed -----------------------------------------------------------------------------------


class Streams(NamedTuple):
    """Train and test, decoded for every batch, and in words where and why."""

    train: StreamStore
    test: StreamStore
    placement: str


def stream_files(
    found: object,
    read: Callable[[EncodedFiles], tuple[EncodedSplit, EncodedSplit]],
    *,
    placement: Placement,
    size: int | None = None,
    num_workers: int | None = None,
) -> Streams | None:
    """Return both splits to be decoded for every batch, or ``None`` if all images are to be decoded beforehand.

    They are decoded for every batch if ``placement`` is ``"stream"``; or if it is ``"auto"``, they are image files, and
    decoded they would take more than half of the free memory (``HOST_FRACTION``).

    Args:
        found: what a reader found in the data's folder.
        read: returns its splits; called only if they are streamed.
        placement: as in :func:`~vrm.data.stores.placement.place`.
        size: fit every image to this square first; by default they stay as they are.
        num_workers: processes that decode, for both splits together; by default one for each core that this process
            may use (its part of them, where ``torchrun`` has started several processes here).

    Raises:
        ValueError: ``placement`` is ``"stream"``, and there are no image files.
    """
    if not are_image_files(found):
        if placement == "stream":
            raise ValueError(
                "placement=stream decodes image files in class folders, and these data are kept otherwise; use "
                "placement=auto, device or host, or make a pack of them once: vrm data ... pack=FOLDER"
            )
        return None
    reason = "as asked for" if placement == "stream" else _too_large(found, size) if placement == "auto" else ""
    if not reason:
        return None
    count = default_workers() if num_workers is None else num_workers
    decoder, within = Decoder(count), os.path.join(os.fsencode(found.folder), b"")
    train, test = (
        StreamStore(
            found.folder,
            np.array([os.fsencode(image).removeprefix(within) for image in split.images]),
            torch.tensor(split.targets),
            split.classes,
            decoder,
            split.skipped,
            size,
            found.image_size,
        )
        for split in read(found)
    )
    by = f"{count} processes" if count > 1 else "one process" if count else "the process that trains"
    return Streams(train, test, f"images in {shown(found.folder)}, decoded for every batch by {by}: {reason}")


def are_image_files(found: object) -> TypeGuard[EncodedFiles]:
    """Return whether what was found are image files, one for each image."""
    return isinstance(found, EncodedFiles) and found.files[0].suffix.lower() in SUFFIXES


def _too_large(found: EncodedFiles, size: int | None) -> str:
    """Return why images should not be decoded beforehand; empty if they may be."""
    height, width = (size, size) if size else found.image_size or _first_size(found.files)
    needed, free = 3 * height * width * len(found.files), free_memory()
    if needed <= HOST_FRACTION * free:
        return ""
    return f"decoded they take {bytes_in_words(needed)}, more than half of {bytes_in_words(free)} free"


def _first_size(files: Sequence[Path]) -> tuple[int, int]:
    """Return (height, width) of the first good image; (0, 0) without any."""
    for file in files:
        try:
            image = decode_image(file, shown(file), size=None)
        except BadImage:  # reported when the image is needed
            continue
        return image.height, image.width
    return 0, 0
