"""Loading a data set by its name."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from vrm.data.datasets.cifar import CIFAR10, CIFAR100
from vrm.data.datasets.decode import decode_found, read_without_bad
from vrm.data.datasets.digits import DIGITS
from vrm.data.datasets.download import download_data_set
from vrm.data.datasets.fashion_mnist import FASHION_MNIST
from vrm.data.datasets.folder import FOLDER
from vrm.data.datasets.packed import PACKED, load_packed
from vrm.data.datasets.source import Source
from vrm.data.formats.images import BadImagePolicy, Progress, check_size
from vrm.data.formats.layout import EncodedFiles, Found, names_in_words, shown, visible
from vrm.data.formats.pack import is_pack
from vrm.data.stores.base import Store
from vrm.data.stores.dataset import DataSet, channel_statistics, few_labels
from vrm.data.stores.placement import Placement
from vrm.data.stores.stream import stream_files
from vrm.data.views.policies import view_policy
from vrm.wording import bytes_in_words, nearest

SOURCES: dict[str, Source] = {
    "digits": DIGITS,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "fashion-mnist": FASHION_MNIST,
    "folder": FOLDER,
    "packed": PACKED,
}
"""Every data set that :func:`load` knows."""


def load(
    name: str,
    *,
    root: Path | str | None = None,
    size: int | None = None,
    labels_per_class: int | None = None,
    views: str | None = None,
    placement: Placement = "auto",
    bad_images: BadImagePolicy = "error",
    download: bool = False,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> DataSet:
    """Load a data set by name, decoded in memory or to be decoded for every batch; call :func:`~vrm.data.place` next.

    Args:
        name: one of ``SOURCES``.
        root: the folder that holds it, see the source's ``layouts``; or a pack of it (:mod:`vrm.data.stores.pack`).
        size: fit images to this square (bilinear; shorter side first, then the centre); by default they stay as they
            are, and then must have one size.
        labels_per_class: keep only so many train samples of each class, a fixed choice. Mean and standard deviation
            stay those of the whole.
        views: the view policy, if not the data's own.
        placement: ``"stream"``: image files are decoded for every batch, see :mod:`vrm.data.stores.stream`; ``"auto"``:
            if they would fill more than half of the free memory; otherwise all are decoded now.
        bad_images: an image that cannot be read stops with its file and the reason (``"error"``: the first one); all of
            them are listed before that (``"report"``); or they are left out with a warning, and each store's
            ``skipped`` lists them (``"skip"``; without ``size``, also those of another size than most).
        download: download data of a known address into ``root`` if it does not hold them.
        num_workers: threads (processes, if images are decoded for every batch) that decode; the result does not depend
            on it.
        progress: called with (bytes, bytes in all) during a download, with (images, images in all) while images are
            decoded, now or for mean and standard deviation.

    Raises:
        ValueError: the name is unknown, or the data are missing, incomplete or broken: which file, what was expected,
            and how to get it.
    """
    check_size(size)
    if bad_images not in get_args(BadImagePolicy):
        raise ValueError(f"bad_images must be one of {', '.join(get_args(BadImagePolicy))}, got {bad_images!r}")
    source = _source(name)
    policy = _check_views(views or source.view_policy)
    if root is not None and is_pack(Path(root).expanduser()):
        data = load_packed(name, Path(root).expanduser(), size=size, views=views)
        return data if labels_per_class is None else replace(data, train=few_labels(data.train, labels_per_class))
    found = find(name, root=root, download=download, progress=progress)
    if not isinstance(found, EncodedFiles):
        for key, value in (("workers", num_workers), ("bad_images", None if bad_images == "error" else bad_images)):
            if value is not None:
                text = f"data.{key}={value} has no effect: {source.title} are plain pixels, which nothing decodes"
                warnings.warn(text, stacklevel=2)
    streams = stream_files(
        found,
        lambda files: read_without_bad(name, files, bad_images, num_workers=num_workers, progress=progress),
        placement=placement,
        size=size,
        num_workers=num_workers,
    )
    train: Store
    test: Store
    if streams is not None:
        train, test = streams.train, streams.test
    else:
        train, test = decode_found(
            name, found, size=size, bad_images=bad_images, num_workers=num_workers, progress=progress
        )
    absent = torch.nonzero(torch.bincount(train.targets, minlength=train.num_classes) == 0).flatten().tolist()
    if absent:
        left_out = ", the bad images left out," if train.skipped else ""
        raise ValueError(
            f"the train split has{left_out} no image of {len(absent)} of the {train.num_classes} classes of "
            f"{source.title} ({names_in_words(train.classes[label] for label in absent)}); is this another data set, "
            "or a part of it?"
        )
    mean, std = source.statistics or channel_statistics(train, progress=progress if streams else None)
    if labels_per_class is not None:
        train = few_labels(train, labels_per_class)
    origin = found.origin if isinstance(found, EncodedFiles) else ""
    return DataSet(name, train, test, mean, std, policy, streams.placement if streams else "", origin=origin)


def find(
    name: str, *, root: Path | str | None = None, download: bool = False, progress: Progress | None = None
) -> Found:
    """Return what :func:`load` decodes: encoded images, or plain pixels. Arguments and errors as there."""
    try:
        return _find(name, None if root is None else Path(root).expanduser(), download, progress)
    except OSError as error:
        raise ValueError(
            f"data.root={root} cannot be read ({error.strerror}: {error.filename}); check its permissions and disk"
        ) from error


def _find(name: str, folder: Path | None, download: bool, progress: Progress | None) -> Found:
    source = _source(name)
    offer = ""
    if source.remote is None and download:
        raise ValueError(
            f"data.download=true, but {source.title} have no known address: they are {source.layouts}; leave it out"
        )
    if source.remote is not None and not download:
        offer = f"; data.download=true downloads it there ({bytes_in_words(source.remote.num_bytes)})"
    if folder is None or folder.is_dir():
        try:
            found = source.find(folder)
        except ValueError as error:
            if not download:
                raise
            raise ValueError(
                f"{error}; or name an empty folder as data.root, which data.download=true fills"
            ) from error
        if found is not None:
            return found
    elif folder.exists() or not download:
        state = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"data.root={folder} {state}; it must be the folder that holds {source.title}: {source.layouts}{offer}"
        )
    if folder is None:
        raise ValueError(f"{name} needs data.root=FOLDER: {source.layouts}{offer}")
    if source.remote is not None and download:
        download_data_set(source.remote, folder, progress=progress)
        found = source.find(folder)
        if found is not None:
            return found
    held = names_in_words(shown(Path(path.name)) + "/" * path.is_dir() for path in visible(folder))
    raise ValueError(f"no {source.title} in {folder}, which holds {held}; expected {source.layouts}{offer}")


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"there is no data set {name!r}; {nearest(name, SOURCES)}")
    return SOURCES[name]


def _check_views(name: str) -> str:
    """Return the name of a view policy. Raise ``ValueError`` if it is unknown, before anything is decoded."""
    try:
        return view_policy(name).name
    except ValueError as error:
        raise ValueError(f"data.views={name}: {error}") from None
