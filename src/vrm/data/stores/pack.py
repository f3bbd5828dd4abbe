"""A data set decoded once, at one size, on disk: a *pack*.

Shards in the format of safetensors hold the targets, the bytes of the images, and CRC-32 sums of each; a manifest
(JSON) lists them with their SHA-256 sums, and everything else that belongs to the data set. To read a pack is to map
its shards into memory: it opens at once, whatever its size, and takes no more memory than what is looked at.

All is written beside, flushed and renamed, the manifest after each shard. To make a pack where one is already, or a
part of it, makes only what is missing or damaged.

What is checked: when a pack is opened, the manifest, and the lengths, headers and targets of the shards; each image,
by its CRC-32, when it is first read; the SHA-256 of every shard by :func:`verify`, and by :func:`pack` if it is kept.

Shapes: N images, n of a shard, 3 channels (RGB), H x W pixels, B batch.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vrm.data.formats.layout import shown, some, visible
from vrm.data.stores.cache import claimed, flush
from vrm.data.stores.host import HostStore, amount
from vrm.data.stores.store import BadData, ChannelValues, DataSet, check_classes, hash_of
from vrm.data.views.policies import view_policy

MANIFEST = "pack.json"
_FORMAT = "vrm pack 1"  # counted up whenever packs made before cannot be read any more
_SHARD = 1 << 28  # bytes of images in a shard, about
_MOST = 256  # shards of a split: each that is mapped holds a file descriptor
_BATCH = 256  # images written at once
_BLOCK = 1 << 20  # bytes read at once

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class DamagedPack(BadData):
    """A pack that is not what was written; ``file`` is which."""

    def __init__(self, file: Path, what: str) -> None:
        """The message tells what to do, too."""
        super().__init__(
            f"{shown(file)} is damaged: {what}; make the pack again in its folder, with the words that made it: only "
            "what is damaged or missing is made (vrm data packed data.root=FOLDER checks all of a pack)"
        )
        self.file = file


# ---- the manifest ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A split as the manifest has it.

    ``images``: N. ``sha256``: the sum of each shard of ``images_per_shard`` images, ``None`` for one not made yet.
    ``source``: the hash of the store that it was made of. ``hash``: that of a store of the same images in memory, empty
    until all shards are made. ``skipped``: the images that were left out as unreadable.
    """

    images: int
    images_per_shard: int
    sha256: tuple[str | None, ...]
    source: str
    skipped: tuple[str, ...] = ()
    hash: str = ""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First image of each shard, and one behind its last."""
        starts = range(0, self.images, self.images_per_shard)
        return [(start, min(start + self.images_per_shard, self.images)) for start in starts]


@dataclass(frozen=True)
class Manifest:
    """Everything about a data set but its images and targets.

    ``size``: (H, W) of the images. ``splits``: ``"train"`` and ``"test"``.
    """

    name: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    mean: ChannelValues
    std: ChannelValues
    view_policy: str
    splits: dict[str, Split]

    def noting(self, folder: Path, split: str, number: int, sha256: str | None) -> Manifest:
        """The same with another sum of one shard, written: a split of which a shard is being made has no hash."""
        of_split = self.splits[split]
        sums = (*of_split.sha256[:number], sha256, *of_split.sha256[number + 1 :])
        noted = replace(self, splits={**self.splits, split: replace(of_split, sha256=sums, hash="")})
        noted.write(folder)
        return noted

    def write(self, folder: Path) -> None:
        """Replace the manifest in ``folder``."""
        content = {"format": _FORMAT, **asdict(self)}
        partial = folder / f".{MANIFEST}.partial"
        partial.write_text(json.dumps({"sha256": _sum(content), "pack": content}, indent=1), encoding="utf-8")
        flush(partial)
        os.replace(partial, folder / MANIFEST)
        flush(folder)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest in ``folder``; :class:`DamagedPack` if it is not what was written."""
        file = folder / MANIFEST
        try:
            told = json.loads(file.read_bytes())
            content, intact = told["pack"], told["sha256"] == _sum(told["pack"])
            kind = content["format"]
        except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
            raise DamagedPack(file, f"{type(error).__name__}: {error}") from None
        if not intact:
            raise DamagedPack(file, "its checksum differs")
        if kind != _FORMAT:
            raise ValueError(f"{shown(file)} is of the kind {kind!r}, not {_FORMAT!r}; make it again in another folder")
        height, width = content["size"]
        return Manifest(
            content["name"],
            tuple(content["classes"]),
            (height, width),
            _three(content["mean"]),
            _three(content["std"]),
            content["view_policy"],
            {
                name: Split(**{**split, "sha256": tuple(split["sha256"]), "skipped": tuple(split["skipped"])})
                for name, split in content["splits"].items()
            },
        )


def _three(values: Sequence[float]) -> ChannelValues:
    red, green, blue = values
    return red, green, blue


def _sum(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_pack(folder: Path) -> bool:
    """Whether there is a pack in the folder, or a part of one."""
    return os.path.isfile(folder / MANIFEST)  # unlike Path's, no error for a name that no file can have


# ---- a shard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """Where things are in the file of a shard: header, targets, images, sums."""

    images: int
    size: tuple[int, int]

    @cached_property
    def header(self) -> bytes:
        """The beginning of the file, as safetensors wants it."""
        begin = 8 * self.images
        end = begin + self.images * self.image_bytes
        tensors = {
            "targets": {"dtype": "I64", "shape": [self.images], "data_offsets": [0, begin]},
            "images": {"dtype": "U8", "shape": [self.images, 3, *self.size], "data_offsets": [begin, end]},
            # Of each image, and of the targets. Four bytes, little end first: behind images of any size a wider type
            # would lie askew.
            "crc32": {"dtype": "U8", "shape": [self.images + 1, 4], "data_offsets": [end, end + self._sums]},
        }
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def image_bytes(self) -> int:
        return 3 * self.size[0] * self.size[1]

    @property
    def begin(self) -> int:
        """Of the images."""
        return len(self.header) + 8 * self.images

    @property
    def end(self) -> int:
        """Of the images."""
        return self.begin + self.images * self.image_bytes

    @property
    def num_bytes(self) -> int:
        return self.end + self._sums

    @property
    def _sums(self) -> int:
        return 4 * (self.images + 1)


def _file(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.safetensors"


def _write(file: Path, shard: _Shard, targets: Tensor, portions: Iterator[Tensor], content: Any) -> str:
    """Make a shard; ``content``, a hash, is told its images. Gives the file's SHA-256."""
    total = hashlib.sha256()
    sums: list[int] = []
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:

            def put(data: Any) -> None:
                stream.write(data)
                total.update(data)

            put(shard.header)
            put(targets.numpy().data)
            for portion in portions:
                images = portion.numpy()
                put(images.data)
                content.update(images.data)
                sums += map(zlib.crc32, images)
            put(np.array([*sums, zlib.crc32(targets.numpy().data)], "<u4").data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(file.parent)
    return total.hexdigest()


def _check(file: Path, shard: _Shard, expected: str | None, content: Any) -> Any | None:
    """``content``, a hash, that has been told the shard's images; ``None`` if the file is not what was written."""
    if expected is None or not file.is_file() or file.stat().st_size != shard.num_bytes:
        return None
    total, content, position = hashlib.sha256(), content.copy(), 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total.update(block)
            content.update(block[max(0, shard.begin - position) : max(0, shard.end - position)])
            position += len(block)
    return content if total.hexdigest() == expected else None


# ---- to make a pack -------------------------------------------------------------------------------------------------


def pack(dataset: DataSet, folder: Path | str, *, progress: Progress | None = None) -> int:
    """Make a pack of a data set in ``folder``, or make whole the one there; the number of shards that were made.

    Args:
        dataset: loaded with ``views="none"``, so that evaluation sees whole images; of one size.
        folder: empty, or with a pack of the same images in part or whole. One process at a time works in it.
        progress: called with (images, images in all).

    Raises:
        ValueError: the folder holds something else, or cannot be written, or the disk is full: what was made is kept.
    """
    folder = Path(folder).expanduser()
    if dataset.train.crop is not None or dataset.test.crop is not None:
        raise ValueError('evaluation sees a part of these images only; load the data set with views="none" to pack it')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder / ".making.partial", keep=False):
            return _make(dataset, folder, progress)
    except OSError as error:
        raise ValueError(
            f"the pack cannot be written to {shown(folder)} ({error.strerror}); see to its disk and permissions, then "
            "give the same words again: what was made is kept"
        ) from error


def _make(dataset: DataSet, folder: Path, progress: Progress | None) -> int:
    manifest = _begun(dataset, folder)
    total = sum(split.images for split in manifest.splits.values())
    done = made = 0
    for name, store in (("train", dataset.train), ("test", dataset.test)):
        targets = store.targets.cpu()
        content = hash_of(len(store), manifest.size, manifest.classes)
        for number, (start, stop) in enumerate(manifest.splits[name].spans):
            file, shard = _file(folder, name, number), _Shard(stop - start, manifest.size)
            kept = _check(file, shard, manifest.splits[name].sha256[number], content)
            if kept is None:
                manifest = manifest.noting(folder, name, number, None)
                images = _told(store.scan(_BATCH, start, stop), progress, done, total)
                sha256 = _write(file, shard, targets[start:stop], images, content)
                manifest = manifest.noting(folder, name, number, sha256)
                made += 1
            else:
                content = kept
            done += stop - start
            if progress:
                progress(done, total)
        content.update(targets.numpy().data)
        whole = replace(manifest.splits[name], hash=content.hexdigest())
        manifest = replace(manifest, splits={**manifest.splits, name: whole})
    manifest.write(folder)
    return made


def _begun(dataset: DataSet, folder: Path) -> Manifest:
    """The manifest of what there is, or of what there will be."""
    size = dataset.train.stored_size
    image_bytes = 3 * size[0] * size[1]
    splits = {}
    for name, store in (("train", dataset.train), ("test", dataset.test)):
        each = max(1, _SHARD // image_bytes, -(-len(store) // _MOST))
        splits[name] = Split(len(store), each, (None,) * -(-len(store) // each), store.hash, store.skipped)
    planned = Manifest(dataset.name, dataset.classes, size, dataset.mean, dataset.std, dataset.view_policy, splits)
    others = [path for path in visible(folder) if path.name != MANIFEST and path.suffix != ".safetensors"]
    if others or (not is_pack(folder) and visible(folder)):
        raise ValueError(
            f"{shown(folder)} holds {some([shown(Path(path.name)) for path in visible(folder)])}; name an empty folder"
        )
    if not is_pack(folder):
        needed, free = image_bytes * sum(split.images for split in splits.values()), shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(
                f"the pack takes {amount(needed)}, but {amount(free)} are free in {shown(folder)}; make room, name "
                "another folder, or give a smaller data.size"
            )
        return planned
    try:
        found = Manifest.read(folder)
    except DamagedPack:  # nothing is known of the shards: all are made again
        return planned
    for what, there, here in (
        ("data set", found.name, planned.name),
        ("size", found.size, planned.size),
        ("classes", found.classes, planned.classes),
        *((f"{name} images", found.splits[name].source, split.source) for name, split in splits.items()),
    ):
        if there != here:
            shown_both = f": {there} there, {here} given" * (what in ("data set", "size"))
            raise ValueError(
                f"{shown(folder)} holds a pack of other data ({what}{shown_both}); name another folder, or remove it"
            )
    return found


def _told(
    portions: Iterator[tuple[Tensor, Tensor]], progress: Progress | None, done: int, total: int
) -> Iterator[Tensor]:
    """The images of the portions, with ``progress`` told."""
    for index, images in portions:
        yield images.cpu()
        done += len(index)
        if progress:
            progress(done, total)


# ---- to read it -----------------------------------------------------------------------------------------------------


class MappedRows:
    """The images of a split of a pack, mapped into memory; :class:`DamagedPack` for one that is not as written."""

    def __init__(self, folder: Path, name: str, split: Split, size: tuple[int, int]) -> None:
        """Opens and maps every shard, and reads its targets."""
        self.size = size
        self.hash = split.hash
        self.place = f"{shown(folder)}, mapped files"
        self._files = [_file(folder, name, number) for number in range(len(split.sha256))]
        self._starts = [start for start, _ in split.spans]
        self._checked = np.zeros(split.images, dtype=bool)
        self._images: list[NDArray[np.uint8]] = []
        self._sums: list[NDArray[np.uint32]] = []
        targets = []
        for file, (start, stop) in zip(self._files, split.spans, strict=True):
            shard = _Shard(stop - start, size)
            mapped = _mapped(file, shard)
            targets.append(np.frombuffer(mapped, "<i8", shard.images, len(shard.header)))
            images = np.frombuffer(mapped, np.uint8, shard.end - shard.begin, shard.begin)
            self._images.append(images.reshape(shard.images, 3, *size))
            self._sums.append(np.frombuffer(mapped, "<u4", shard.images + 1, shard.end))
            if zlib.crc32(targets[-1].data) != self._sums[-1][-1]:
                raise DamagedPack(file, "the checksum of its targets differs")
        self.targets = torch.from_numpy(np.concatenate(targets).astype(np.int64))

    def __len__(self) -> int:
        return len(self._checked)

    def gather(self, rows: Sequence[int], out: Tensor) -> None:
        """Write the images with these numbers to ``out``, uint8 (B, 3, H, W); each is checked when it is first read."""
        for image, row in zip(out.numpy(), rows, strict=True):
            number = bisect_right(self._starts, row) - 1
            within = row - self._starts[number]
            image[:] = self._images[number][within]
            if not self._checked[row]:
                if zlib.crc32(image) != self._sums[number][within]:
                    raise DamagedPack(self._files[number], f"the checksum of its image {within} differs")
                self._checked[row] = True


def _mapped(file: Path, shard: _Shard) -> mmap.mmap:
    """The file, mapped, after its length and header are checked."""
    try:
        with file.open("rb") as stream:
            num_bytes = os.fstat(stream.fileno()).st_size
            if num_bytes != shard.num_bytes:
                raise DamagedPack(file, f"it has {num_bytes:,} bytes, not {shard.num_bytes:,}")
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DamagedPack(file, f"it cannot be read ({error.strerror})") from error
    if mapped[: len(shard.header)] != shard.header:
        raise DamagedPack(file, "its header differs")
    return mapped


def open_pack(folder: Path | str, *, views: str | None = None) -> DataSet:
    """The data set in a pack, its images left in their files. ``ValueError`` if it is unfinished or damaged.

    ``views`` names the view policy that will be used, where not the data's own: it decides what evaluation sees.
    """
    folder = Path(folder).expanduser()
    manifest = Manifest.read(folder)
    crops = {"train": None, "test": view_policy(views or manifest.view_policy).evaluation}
    stores = []
    for name, split in manifest.splits.items():
        if not split.hash:
            made = sum(sha256 is not None for each in manifest.splits.values() for sha256 in each.sha256)
            total = sum(len(each.sha256) for each in manifest.splits.values())
            raise ValueError(
                f"the pack in {shown(folder)} is unfinished ({made} of {total} shards are made); give the words that "
                "began it again, it goes on where it stopped"
            )
        rows = MappedRows(folder, name, split, manifest.size)
        try:
            check_classes(rows.targets, manifest.classes)
        except ValueError as error:
            raise DamagedPack(_file(folder, name, 0), f"of the {name} images, {error}") from None
        stores.append(HostStore(rows, rows.targets, manifest.classes, split.skipped, crops[name]))
    return DataSet(manifest.name, stores[0], stores[1], manifest.mean, manifest.std, manifest.view_policy)


def verify(folder: Path | str, *, progress: Progress | None = None) -> int:
    """Read every byte of a pack and compare all SHA-256 sums; the number of shards.

    ``progress`` is called with (shards, shards in all). ``ValueError`` names all that are damaged.
    """
    folder = Path(folder).expanduser()
    manifest = Manifest.read(folder)
    shards = [
        (_file(folder, name, number), _Shard(stop - start, manifest.size), split.sha256[number])
        for name, split in manifest.splits.items()
        for number, (start, stop) in enumerate(split.spans)
    ]
    damaged = []
    for done, (file, shard, sha256) in enumerate(shards, start=1):
        if _check(file, shard, sha256, hashlib.sha256()) is None:
            damaged.append(file)
        if progress:
            progress(done, len(shards))
    if damaged:
        raise DamagedPack(
            damaged[0], f"{len(damaged)} of {len(shards)} shards are: " + ", ".join(f.name for f in damaged)
        )
    return len(shards)
