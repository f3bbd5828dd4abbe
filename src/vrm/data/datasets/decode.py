"""Decoding what was found into memory, by way of the cache, and what is done about images that cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vrm.data.datasets.cache import BadRows, content_key, keep_bad_rows, keep_stores
from vrm.data.formats.images import BadImagePolicy, Progress, decode_all, find_bad, to_pixels
from vrm.data.formats.layout import EncodedFiles, EncodedSplit, Found, shown
from vrm.data.stores.memory import ImageStore
from vrm.wording import counted

_LISTED = 10
"""Bad images named in a warning; the store's ``skipped`` names all."""


def decode_found(
    name: str,
    found: Found,
    *,
    size: int | None,
    bad_images: BadImagePolicy,
    num_workers: int | None,
    progress: Progress | None,
) -> tuple[ImageStore, ImageStore]:
    """Decode both splits, of the size they have or fitted to the wanted one. Arguments as in :func:`vrm.data.load`."""
    if isinstance(found, EncodedFiles):
        train, test = _decode_files(name, found, size, bad_images, num_workers, progress)
    else:
        train, test = (ImageStore(split.images, split.targets, split.classes) for split in found)
    _warn_skipped(train.skipped, test.skipped)
    return (train, test) if size is None else (_resize(train, size), _resize(test, size))


def _decode_files(
    name: str,
    found: EncodedFiles,
    size: int | None,
    bad_images: BadImagePolicy,
    num_workers: int | None,
    progress: Progress | None,
) -> tuple[ImageStore, ImageStore]:
    side = found.image_size
    size = None if side else size

    def build() -> tuple[ImageStore, ImageStore]:
        splits = found.read()
        encoded, origins = _join(splits)
        images, bad = decode_all(
            encoded,
            origins,
            size=size,
            expected=side,
            leave_out=bad_images != "error",
            num_workers=num_workers,
            progress=progress,
        )
        rows = _separate(bad, splits)
        if bad_images == "report":
            _raise_if_bad(splits, rows)
        train, test = _leave_out(found, splits, rows)
        return (
            ImageStore(images[: len(train.images)], torch.tensor(train.targets), train.classes, train.skipped),
            ImageStore(images[len(train.images) :], torch.tensor(test.targets), test.classes, test.skipped),
        )

    # "report" succeeds only without bad images, and then makes what "error" makes.
    key = content_key(found.folder, found.files, name=name, size=size, skip=bad_images == "skip")
    return keep_stores(name, key, build)


def read_without_bad(
    name: str,
    found: EncodedFiles,
    bad_images: BadImagePolicy,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[EncodedSplit, EncodedSplit]:
    """Return both splits for decoding image by image later, without the bad images if they are to be skipped.

    Arguments and errors as in :func:`vrm.data.load`. With ``"error"`` nothing is looked through: decoding a bad image
    will raise :class:`~vrm.data.formats.images.BadImage`. Otherwise every image is decoded once, whatever its size, and
    the bad ones are kept in the cache, by the content of the files.
    """
    splits = found.read()
    if bad_images == "error":
        return splits

    def build() -> BadRows:
        return _separate(find_bad(*_join(splits), num_workers=num_workers, progress=progress), splits)

    bad = keep_bad_rows(f"{name}-bad", content_key(found.folder, found.files, name=name), build)
    if bad_images == "report":
        _raise_if_bad(splits, bad)
    train, test = _leave_out(found, splits, bad)
    _warn_skipped(train.skipped, test.skipped)
    return train, test


def _join(splits: tuple[EncodedSplit, EncodedSplit]) -> tuple[list[bytes | Path], list[str]]:
    """Return the images of both splits, and their origins."""
    train, test = splits
    return [*train.images, *test.images], [*train.origins, *test.origins]


def _separate(bad: Mapping[int, str], splits: tuple[EncodedSplit, EncodedSplit]) -> BadRows:
    """Turn bad rows of the joined splits into rows of each split."""
    first = len(splits[0].images)
    return (
        {row: reason for row, reason in bad.items() if row < first},
        {row - first: reason for row, reason in bad.items() if row >= first},
    )


def _raise_if_bad(splits: tuple[EncodedSplit, EncodedSplit], bad: BadRows) -> None:
    """Raise ``ValueError``, listing all bad images, if there are any."""
    lines = [line for split, rows in zip(splits, bad, strict=True) for line in split.describe(rows)]
    if lines:
        raise ValueError(
            f"{len(lines)} of {sum(len(split.images) for split in splits):,} images are bad; get them again, remove "
            "them, or leave them out: data.bad_images=skip\n" + "\n".join(lines)
        )


def _leave_out(
    found: EncodedFiles, splits: tuple[EncodedSplit, EncodedSplit], bad: BadRows
) -> tuple[EncodedSplit, EncodedSplit]:
    """Return both splits without the bad images; ``skipped`` names these by their paths within the folder."""
    left = []
    for name, split, rows in zip(("train", "test"), splits, bad, strict=True):
        if len(rows) == len(split.images):
            raise ValueError(f"all of the {len(rows)} {name} images are bad, such as {split.describe(rows)[0]}")
        good = split.without(rows)
        here = f"{shown(found.folder)}/"
        left.append(replace(good, skipped=tuple(line.removeprefix(here) for line in good.skipped)))
    return left[0], left[1]


def _warn_skipped(*splits: Sequence[str]) -> None:
    skipped = [line for split in splits for line in split]
    if skipped:
        rest = f"; and {len(skipped) - _LISTED} more" if len(skipped) > _LISTED else ""
        warnings.warn(
            f"{counted(len(skipped), 'bad image')} left out (data.bad_images=skip): "
            f"{'; '.join(skipped[:_LISTED])}{rest}",
            stacklevel=3,
        )


def _resize(store: ImageStore, size: int) -> ImageStore:
    if store.image_size == (size, size):
        return store
    images = [to_pixels(Image.fromarray(image.permute(1, 2, 0).numpy()), size) for image in store.images]
    return replace(store, images=torch.from_numpy(np.stack(images)))
