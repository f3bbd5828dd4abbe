"""The IDX files of MNIST and its relatives."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vrm.data.formats.layout import DecodedSplit, check_labels

_LARGEST = 1 << 31
"""Bytes of a file's content that are read at most, so that a small gzip file cannot fill the memory."""


def read_idx(
    root: Path, *, folders: Sequence[str], classes: tuple[str, ...]
) -> tuple[DecodedSplit, DecodedSplit] | None:
    """Read MNIST's four IDX files, gzipped or not, from ``root`` or one of ``folders`` below; grey becomes RGB."""
    for place in (root, *(root / folder for folder in folders)):
        stems = {
            (split, kind): place / f"{split}-{kind}-ubyte"
            for split in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        }
        files = {key: _with_or_without_gz(stem) for key, stem in stems.items()}
        if any(files.values()):
            break
    else:
        return None
    splits = []
    for split in ("train", "t10k"):
        parts = []
        for kind, ndim in (("images-idx3", 3), ("labels-idx1", 1)):
            file = files[split, kind]
            if file is None:
                raise ValueError(f"{place} lacks {stems[split, kind].name} (or the same with .gz)")
            parts.append(_read_idx_file(file, ndim))
        images, labels = parts
        if len(images) != len(labels):
            raise ValueError(f"{files[split, 'images-idx3']}: {len(images)} images, but {len(labels)} labels beside it")
        check_labels(labels.tolist(), len(classes), stems[split, "labels-idx1"])
        rgb = torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1)
        splits.append(DecodedSplit(rgb, torch.from_numpy(labels.astype(np.int64)), classes))
    return splits[0], splits[1]


def _with_or_without_gz(stem: Path) -> Path | None:
    return next((file for file in (stem, stem.with_name(stem.name + ".gz")) if file.is_file()), None)


def _read_idx_file(file: Path, ndim: int) -> NDArray[np.uint8]:
    """Read an array: two zero bytes, type (8: uint8), number of axes, each length (4 bytes, big-endian), content."""
    start = 4 + 4 * ndim
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            header = stream.read(start)
            if header[:4] != bytes((0, 0, 8, ndim)) or len(header) < start:
                raise ValueError(
                    f"{file} begins with {header[:4].hex()}, expected {bytes((0, 0, 8, ndim)).hex()}: IDX, uint8, "
                    f"{ndim} axes"
                )
            shape = tuple(np.frombuffer(header, dtype=">u4", count=ndim, offset=4).tolist())
            size = prod(shape)
            if size > _LARGEST:
                raise ValueError(f"{file} announces {shape}, {size:,} bytes; at most {_LARGEST:,} are read")
            content = stream.read(size + 1)  # one byte more than announced: enough to see that there is more
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a whole gzip file ({error}); get it again") from error
    if len(content) != size:
        follow = "more" if len(content) > size else len(content)
        raise ValueError(f"{file} announces {shape}, {size} bytes, but {follow} follow; get it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape).copy()
