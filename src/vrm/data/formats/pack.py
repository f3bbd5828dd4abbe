"""A *pack*: a data set decoded once, at one size, in files that can be mapped into memory.

Shards in the format of safetensors hold the targets, the bytes of the images, and a CRC-32 sum of each. The manifest
(JSON) lists the shards with their SHA-256 sums, and holds everything else that belongs to the data set. Sums are kept
because packs are kept: they are copied between disks, and read for years.

Shapes: n images of a shard, 3 channels (RGB), H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vrm.data.errors import BadData
from vrm.data.formats.images import Progress
from vrm.data.formats.layout import shown
from vrm.files import Damaged, parse_json, replace_file, replacing
from vrm.wording import counted

MANIFEST = "pack.json"
_FORMAT = "vrm pack 1"
"""Counted up whenever packs made before can no longer be read."""

_BLOCK = 1 << 20
"""Bytes read at once."""


class DamagedPack(BadData):
    """A pack that is not what was written; ``file`` is the damaged file."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(
            f"{shown(file)} is damaged: {what}; repeat the command that made the pack: it makes only what is damaged "
            "or missing (vrm data packed data.root=FOLDER checks a whole pack)"
        )
        self.file = file


# ---- the manifest ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One split in the manifest.

    ``images``: how many. ``sha256``: the sum of each shard of ``images_per_shard`` images, ``None`` for one not made
    yet. ``source``: the hash of the store that it is made of. ``hash``: the hash of a store of the same images in
    memory, empty until all shards are made. ``skipped``: the images that were left out as unreadable.
    """

    images: int
    images_per_shard: int
    sha256: tuple[str | None, ...]
    source: str
    skipped: tuple[str, ...] = ()
    hash: str = ""

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The first image of each shard, and one past its last."""
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
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    view_policy: str
    splits: dict[str, Split]

    def with_shard(self, split: str, number: int, sha256: str | None) -> Manifest:
        """Return the manifest with another sum of one shard; the split's hash is unknown again."""
        of_split = self.splits[split]
        sums = (*of_split.sha256[:number], sha256, *of_split.sha256[number + 1 :])
        return replace(self, splits={**self.splits, split: replace(of_split, sha256=sums, hash="")})

    def write(self, folder: Path) -> None:
        """Replace the manifest in ``folder``."""
        content = {"format": _FORMAT, **asdict(self)}
        text = json.dumps({"sha256": _sum_json(content), "pack": content}, indent=1)
        replace_file(folder / MANIFEST, text.encode())

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read the manifest in ``folder``. Raise :class:`DamagedPack` if it is not what was written."""
        file = folder / MANIFEST
        try:
            written = parse_json(file.read_bytes(), file)
            content, intact = written["pack"], written["sha256"] == _sum_json(written["pack"])
            kind = content["format"]
        except (OSError, Damaged, LookupError, TypeError) as error:
            raise DamagedPack(file, f"it cannot be read ({error})") from None
        if not intact:
            raise DamagedPack(file, "its checksum differs")
        if kind != _FORMAT:
            raise ValueError(f"{shown(file)} is of the kind {kind!r}, not {_FORMAT!r}; make it again in another folder")
        return Manifest(
            name=content["name"],
            classes=tuple(content["classes"]),
            size=tuple(content["size"]),
            mean=tuple(content["mean"]),
            std=tuple(content["std"]),
            view_policy=content["view_policy"],
            splits={
                name: Split(**{**split, "sha256": tuple(split["sha256"]), "skipped": tuple(split["skipped"])})
                for name, split in content["splits"].items()
            },
        )


def _sum_json(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_pack(folder: Path) -> bool:
    """Return whether the folder holds a pack, or a part of one."""
    return os.path.isfile(folder / MANIFEST)  # unlike Path's, this does not raise for an impossible name


# ---- a shard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """The layout of a shard's file: header, targets, images, sums."""

    images: int
    size: tuple[int, int]

    @cached_property
    def header(self) -> bytes:
        """The beginning of the file, as safetensors defines it."""
        begin = 8 * self.images
        end = begin + self.images * self.image_bytes
        tensors = {
            "targets": {"dtype": "I64", "shape": [self.images], "data_offsets": [0, begin]},
            "images": {"dtype": "U8", "shape": [self.images, 3, *self.size], "data_offsets": [begin, end]},
            # Of each image, then of the targets: four bytes, little-endian. As bytes, because after images of any size
            # a wider type would not be aligned.
            "crc32": {"dtype": "U8", "shape": [self.images + 1, 4], "data_offsets": [end, end + self._sum_bytes]},
        }
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return 3 * self.size[0] * self.size[1]

    @property
    def images_begin(self) -> int:
        """Position of the first image."""
        return len(self.header) + 8 * self.images

    @property
    def images_end(self) -> int:
        """Position after the last image."""
        return self.images_begin + self.images * self.image_bytes

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return self.images_end + self._sum_bytes

    @property
    def _sum_bytes(self) -> int:
        return 4 * (self.images + 1)


def shard_file(folder: Path, split: str, number: int) -> Path:
    """Return the file of a shard."""
    return folder / f"{split}-{number:05d}.safetensors"


def write_shard(file: Path, shard: Shard, targets: Tensor, portions: Iterator[Tensor], content: Any) -> str:
    """Write a shard from portions of its images (n, 3, H, W), and return the file's SHA-256.

    ``content``, a hash, is updated with the images.
    """
    total = hashlib.sha256()
    sums: list[int] = []
    with replacing(file) as beside, beside.open("wb") as stream:

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
    return total.hexdigest()


def hash_shard(file: Path, shard: Shard, expected: str | None, content: Any) -> Any | None:
    """Return a copy of the hash ``content`` updated with the shard's images; ``None`` if the file is not as written."""
    if expected is None or not file.is_file() or file.stat().st_size != shard.num_bytes:
        return None
    total, content, position = hashlib.sha256(), content.copy(), 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total.update(block)
            content.update(block[max(0, shard.images_begin - position) : max(0, shard.images_end - position)])
            position += len(block)
    return content if total.hexdigest() == expected else None


def map_shard(file: Path, shard: Shard) -> mmap.mmap:
    """Map a shard's file into memory. Raise :class:`DamagedPack` if its length or header are wrong."""
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


def verify(folder: Path | str, *, progress: Progress | None = None) -> int:
    """Read every byte of a pack, compare all SHA-256 sums, and return the number of shards.

    ``progress`` is called with (shards, shards in all). Raise :class:`DamagedPack`, naming all damaged shards.
    """
    folder = Path(folder).expanduser()
    manifest = Manifest.read(folder)
    shards: Sequence[tuple[Path, Shard, str | None]] = [
        (shard_file(folder, name, number), Shard(stop - start, manifest.size), split.sha256[number])
        for name, split in manifest.splits.items()
        for number, (start, stop) in enumerate(split.ranges)
    ]
    damaged = []
    for done, (file, shard, sha256) in enumerate(shards, start=1):
        if hash_shard(file, shard, sha256, hashlib.sha256()) is None:
            damaged.append(file)
        if progress:
            progress(done, len(shards))
    if damaged:
        names = ", ".join(file.name for file in damaged)
        raise DamagedPack(damaged[0], f"{len(damaged)} of {counted(len(shards), 'shard')} are: {names}")
    return len(shards)
