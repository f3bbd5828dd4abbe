"""CIFAR's pickled files, as published and as torchvision keeps them, read without executing anything."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from vrm.data.formats.layout import DecodedSplit, check_labels, to_label


class _StoredDtype:
    """Stands in for ``numpy.dtype`` while a pickle is read."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Ignore the byte order and such, which mean nothing for single bytes."""


class _StoredArray:
    """Stands in for ``numpy.ndarray`` while a pickle is read, and keeps a plain array of bytes in ``value``."""

    value: NDArray[np.uint8]

    def __setstate__(self, state: tuple[int, tuple[int, ...], _StoredDtype, bool, bytes]) -> None:
        _, shape, dtype, fortran_order, content = state
        if dtype.code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {dtype.code!r}; images are rows of uint8")
        self.value = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran_order else "C")


def _reconstruct(*_: object) -> _StoredArray:
    return _StoredArray()


def _encode(text: str, encoding: str) -> bytes:
    """Encode text as ``_codecs.encode`` does: this is how Python 3 pickles bytes for old readers."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}; only latin1 is used for bytes")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, text and arrays of uint8; refuses every other object before it is made.

    It knows four of the functions that a pickle may name, and replaces each by one of ours: not even numpy's
    constructors are called.
    """

    known: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "dtype"): _StoredDtype,
        ("numpy", "ndarray"): _StoredArray,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs; refused") from None


def _read_pickle(file: Path, label_key: str) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the images, (N, 3, 32, 32), and labels of one file."""
    try:
        with file.open("rb") as stream:
            content = _PlainUnpickler(stream, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images, labels = batch["data"].value, batch[label_key]
        images = images.reshape(-1, 3, 32, 32)
        if not isinstance(labels, list):
            raise TypeError(f"{label_key!r} is not a list of integers")
        labels = [to_label(label) for label in labels]
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images with {len(labels)} labels")
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(
            f"{file} is not a CIFAR batch as published ({type(error).__name__}: {error}); expected a pickled dict with "
            f"'data' (uint8, 3072 bytes a row) and {label_key!r}; unpack the archive again"
        ) from error
    return images, labels


def read_cifar_pickles(
    root: Path, *, folder: str, train: Sequence[str], test: str, label_key: str, classes: tuple[str, ...]
) -> tuple[DecodedSplit, DecodedSplit] | None:
    """Read CIFAR's pickled files ``train`` and ``test`` from ``root`` or ``root/folder``."""
    for place in (root, root / folder):
        if any((place / name).is_file() for name in (*train, test)):
            break
    else:
        return None
    missing = [name for name in (*train, test) if not (place / name).is_file()]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}; it must hold {', '.join((*train, test))}")
    splits = []
    for names in (train, (test,)):
        parts = [_read_pickle(place / name, label_key) for name in names]
        for name, (_, labels) in zip(names, parts, strict=True):
            check_labels(labels, len(classes), place / name)
        images = np.concatenate([images for images, _ in parts])
        targets = torch.tensor([label for _, labels in parts for label in labels])
        splits.append(DecodedSplit(torch.from_numpy(images), targets, classes))
    return splits[0], splits[1]
