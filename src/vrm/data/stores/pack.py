"""Packs as stores: writing one from a data set, and reading images from mapped shards.

To open a pack is to map its shards into memory: it takes no longer for more images, and the system takes the memory of
what was looked at back when it is wanted. Opening checks the manifest and the lengths, headers and targets of the
shards; an image is checked, by its CRC-32, when it is first read; :func:`~vrm.data.formats.pack.verify` and
:func:`write_pack` check whole shards.

Files are replaced at once, the manifest after each shard. :func:`write_pack` on a folder with a pack, or a part of one,
makes only what is missing or damaged.

Shapes: N images, 3 channels (RGB), H x W pixels, B batch.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vrm.data.formats.images import Progress
from vrm.data.formats.layout import fingerprint, names_in_words, shown, visible
from vrm.data.formats.pack import (
    MANIFEST,
    DamagedPack,
    Manifest,
    Split,
    is_pack,
    map_shard,
    shard_file,
    write_shard,
)
from vrm.data.stores.base import start_hash
from vrm.data.stores.dataset import DataSet
from vrm.files import free_bytes, locked, remove_remains
from vrm.wording import bytes_in_words

_SHARD_BYTES = 1 << 28
"""Bytes of images in a shard, about."""

_MOST_SHARDS = 256
"""Shards of a split at most: each that is mapped holds a file descriptor."""

_BATCH = 256
"""Images written at once."""


def write_pack(dataset: DataSet, folder: Path | str, *, progress: Progress | None = None) -> int:
    """Make a pack of a data set in ``folder``, or complete the one there; return how many shards were made.

    Args:
        dataset: of one size. Whole images are packed, whatever evaluation sees of them.
        folder: empty, or with a pack of the same images in part or whole. A second process waits for the first.
        progress: called with (images, images in all).

    Raises:
        ValueError: the folder holds something else, or cannot be written, or the disk is full: what was made is kept.
    """
    folder = Path(folder).expanduser()
    if not dataset.train.dtype == dataset.test.dtype == torch.uint8:
        raise ValueError("a pack holds bytes, and these images are floats; give them before Normalize and Resize")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_folder(folder)
        with locked(folder / ".lock", wait=True):
            remove_remains(folder)
            return _make_shards(dataset, folder, progress)
    except OSError as error:
        raise ValueError(
            f"the pack cannot be written to {shown(folder)} ({error.strerror or error}); check its disk and "
            "permissions, then repeat the same command: what was made is kept"
        ) from error


def _make_shards(dataset: DataSet, folder: Path, progress: Progress | None) -> int:
    manifest = _read_or_plan(dataset, folder)
    total = sum(split.images for split in manifest.splits.values())
    done = made = 0
    for name, store in (("train", dataset.train), ("test", dataset.test)):
        store, targets = store.with_crop(None), store.targets.cpu()
        content = start_hash(len(store), manifest.size, manifest.classes)
        for number, (start, stop) in enumerate(manifest.splits[name].ranges):
            file, sha256 = shard_file(folder, name, number), manifest.splits[name].sha256[number]
            if sha256 is None or fingerprint(file)[1] != sha256:
                manifest = manifest.with_shard(name, number, None)
                manifest.write(folder)
                images = torch.empty((stop - start, 3, *manifest.size), dtype=torch.uint8)
                filled = 0
                for _, portion in store.scan(_BATCH, start, stop):
                    images[filled : filled + len(portion)] = portion
                    filled += len(portion)
                    if progress:
                        progress(done + filled, total)
                manifest = manifest.with_shard(name, number, write_shard(file, images, targets[start:stop]))
                manifest.write(folder)
                made += 1
            content.update(map_shard(file, stop - start, manifest.size).images.data)
            done += stop - start
            if progress:
                progress(done, total)
        content.update(targets.numpy().data)
        whole = replace(manifest.splits[name], hash=content.hexdigest())
        manifest = replace(manifest, splits={**manifest.splits, name: whole})
    manifest.write(folder)
    return made


def _check_folder(folder: Path) -> None:
    """Raise ``ValueError`` if a folder holds anything but a pack."""
    found = visible(folder)
    others = [path for path in found if path.name != MANIFEST and path.suffix != ".safetensors"]
    if others or (found and not is_pack(folder)):
        raise ValueError(
            f"{shown(folder)} holds {names_in_words(shown(Path(path.name)) for path in found)}; name an empty folder"
        )


def _read_or_plan(dataset: DataSet, folder: Path) -> Manifest:
    """Return the manifest in the folder, or that of the pack to make there."""
    planned = _plan(dataset)
    if not is_pack(folder):
        height, width = planned.size
        needed = 3 * height * width * sum(split.images for split in planned.splits.values())
        if needed > (free := free_bytes(folder)):
            raise ValueError(
                f"the pack takes {bytes_in_words(needed)}, but {bytes_in_words(free)} are free in {shown(folder)}; "
                "make room, name another folder, or give a smaller data.size"
            )
        return planned
    try:
        manifest = Manifest.read(folder)
    except DamagedPack:  # nothing is known about the shards: all are made again
        return planned
    if not any(sha256 for split in manifest.splits.values() for sha256 in split.sha256):
        return planned  # its first shard failed, and this may be the second try with other settings
    for what, there, here in (
        ("data set", manifest.name, planned.name),
        ("size", manifest.size, planned.size),
        ("classes", manifest.classes, planned.classes),
        *((f"{name} images", manifest.splits[name].source, split.source) for name, split in planned.splits.items()),
    ):
        if there != here:
            both = f": {there} there, {here} given" if what in ("data set", "size") else ""
            raise ValueError(
                f"{shown(folder)} holds a pack of other data ({what}{both}); name another folder, or remove it"
            )
    return manifest


def _plan(dataset: DataSet) -> Manifest:
    size = dataset.train.stored_size
    splits = {}
    for name, store in (("train", dataset.train), ("test", dataset.test)):
        each = max(1, _SHARD_BYTES // (3 * size[0] * size[1]), -(-len(store) // _MOST_SHARDS))
        splits[name] = Split(len(store), each, (None,) * -(-len(store) // each), store.hash, store.skipped)
    return Manifest(dataset.name, dataset.classes, size, dataset.mean, dataset.std, dataset.view_policy, splits)


class RowsInPack:
    """The images of a split of a pack, mapped into memory. Raise :class:`DamagedPack` for one that is not as written.

    ``targets``: int64 (N,).
    """

    def __init__(self, folder: Path, name: str, split: Split, size: tuple[int, int]) -> None:
        self.size, self.dtype = size, torch.uint8
        self.hash = split.hash
        self.location = f"{shown(folder)}, mapped files"
        self._files = [shard_file(folder, name, number) for number in range(len(split.sha256))]
        self._starts = [start for start, _ in split.ranges]
        self._checked = np.zeros(split.images, dtype=bool)
        self._shards = [
            map_shard(file, stop - start, size) for file, (start, stop) in zip(self._files, split.ranges, strict=True)
        ]
        self.targets = torch.from_numpy(np.concatenate([shard.targets for shard in self._shards]))

    def __len__(self) -> int:
        return len(self._checked)

    def copy_rows(self, rows: Sequence[int], out: Tensor) -> None:
        """Copy the images with these numbers to ``out``, uint8 (B, 3, H, W); check those read for the first time."""
        for image, row in zip(out.numpy(), rows, strict=True):
            number = bisect_right(self._starts, row) - 1
            within = row - self._starts[number]
            image[:] = self._shards[number].images[within]
            if not self._checked[row]:
                if zlib.crc32(image) != self._shards[number].crc32[within]:
                    raise DamagedPack(self._files[number], f"the checksum of its image {within} differs")
                self._checked[row] = True
