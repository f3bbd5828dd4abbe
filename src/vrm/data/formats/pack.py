"""A *pack*: a data set decoded once, at one size, in files that can be mapped into memory.

Shards in the format of safetensors hold the targets, the images, and (as four bytes, little-endian) the CRC-32 sum of
each image and, last, of the targets. The manifest
(JSON) lists the shards with their SHA-256 sums, and holds everything else that belongs to the data set. Sums are kept
because packs are kept: they are copied between disks, and read for years.

Shapes: n images of a shard, 3 channels (RGB), H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vrm.data.errors import BadData
from vrm.data.formats.images import Progress
from vrm.data.formats.layout import fingerprint, shown
from vrm.files import Damaged, parse_json, replace_file
from vrm.wording import counted

MANIFEST = "pack.json"
_FORMAT = "vrm pack 1"
"""Counted up whenever packs made before can no longer be read."""


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


def shard_file(folder: Path, split: str, number: int) -> Path:
    """Return the file of a shard."""
    return folder / f"{split}-{number:05d}.safetensors"


def write_shard(file: Path, images: Tensor, targets: Tensor) -> str:
    """Write a shard of images (n, 3, H, W) and their targets, and return the file's SHA-256."""
    sums = np.array([*map(zlib.crc32, images.numpy()), zlib.crc32(targets.numpy().data)], "<u4")
    crc32 = torch.from_numpy(sums.view(np.uint8).reshape(-1, 4))
    content = save({"targets": targets, "images": images, "crc32": crc32})
    replace_file(file, content)
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A shard mapped into memory.

    ``images``: uint8 (n, 3, H, W). ``targets``: int64 (n,). ``crc32``: the CRC-32 sum of each image, uint32 (n,).
    """

    images: NDArray[np.uint8]
    targets: NDArray[np.int64]
    crc32: NDArray[np.uint32]


def map_shard(file: Path, count: int, size: tuple[int, int]) -> Shard:
    """Map a shard of ``count`` images of this size; check all but the images. Raise :class:`DamagedPack`."""
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DamagedPack(file, f"it cannot be read ({error})") from error
    expected = {
        "images": (torch.uint8, (count, 3, *size)),
        "targets": (torch.int64, (count,)),
        "crc32": (torch.uint8, (count + 1, 4)),
    }
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != expected:
        raise DamagedPack(file, "its header differs")
    images, targets, sums = (tensors[name].numpy() for name in expected)
    crc32 = sums.view("<u4")[:, 0]
    if zlib.crc32(targets.data) != crc32[-1]:
        raise DamagedPack(file, "the checksum of its targets differs")
    return Shard(images, targets, crc32[:-1])


def verify(folder: Path | str, *, progress: Progress | None = None) -> int:
    """Read every byte of a pack, compare all SHA-256 sums, and return the number of shards.

    ``progress`` is called with (shards, shards in all). Raise :class:`DamagedPack`, naming all damaged shards.
    """
    folder = Path(folder).expanduser()
    manifest = Manifest.read(folder)
    shards = [
        (shard_file(folder, name, number), sha256)
        for name, split in manifest.splits.items()
        for number, sha256 in enumerate(split.sha256)
    ]
    damaged = []
    for done, (file, sha256) in enumerate(shards, start=1):
        if fingerprint(file)[1] != sha256:
            damaged.append(file)
        if progress:
            progress(done, len(shards))
    if damaged:
        names = ", ".join(file.name for file in damaged)
        raise DamagedPack(damaged[0], f"{len(damaged)} of {counted(len(shards), 'shard')} are: {names}")
    return len(shards)
