"""What the readers of all formats return, and the checks they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vrm.wording import listed


@dataclass(frozen=True)
class DecodedSplit:
    """One split of plain pixels: ``images`` uint8 (N, 3, H, W), ``targets`` int64 (N,), indices into ``classes``."""

    images: Tensor
    targets: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True)
class EncodedSplit:
    """One split before decoding.

    ``images``: the encoded bytes, or the file, of each image. ``origins``: where each came from, for errors.
    ``targets``: indices into ``classes``. ``skipped``: the images left out as unreadable, each as "origin: reason".
    """

    images: Sequence[bytes | Path]
    origins: Sequence[str]
    targets: Sequence[int]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def without(self, bad: Mapping[int, str]) -> EncodedSplit:
        """Return the split without the rows in ``bad`` (row to reason), which ``skipped`` then lists."""
        rows = [row for row in range(len(self.images)) if row not in bad]
        return replace(
            self,
            images=[self.images[row] for row in rows],
            origins=[self.origins[row] for row in rows],
            targets=[self.targets[row] for row in rows],
            skipped=self.describe(bad),
        )

    def describe(self, bad: Mapping[int, str]) -> tuple[str, ...]:
        """Return "origin: reason" for each row in ``bad``, in order."""
        return tuple(f"{self.origins[row]}: {reason}" for row, reason in sorted(bad.items()))


@dataclass(frozen=True)
class EncodedFiles:
    """Encoded images that were found on disk but not decoded yet.

    ``files``: the files in ``folder`` that hold them. ``read`` returns the train and the test split. ``image_size``:
    (height, width) of every image, where the data set fixes it. ``origin``: which folders the splits are, in words.
    """

    folder: Path
    files: tuple[Path, ...]
    read: Callable[[], tuple[EncodedSplit, EncodedSplit]]
    image_size: tuple[int, int] | None = None
    origin: str = ""


Found = tuple[DecodedSplit, DecodedSplit] | EncodedFiles
"""What a reader found: train and test as plain pixels, or encoded images."""


def visible(folder: Path) -> list[Path]:
    """Return the entries of a folder, sorted by name, without hidden ones."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from error


def unreadable(folder: Path, error: OSError) -> ValueError:
    """Return the error to raise for a folder that the system does not list."""
    return ValueError(f"the folder {shown(folder)} cannot be read ({error.strerror}); check its permissions and disk")


def shown(path: Path) -> str:
    """Return a path on one line: line breaks, control characters and bytes that are not UTF-8 are escaped."""
    text = str(path)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def names_in_words(names: Iterable[str]) -> str:
    """Return the first few names and how many more there are, or "none"."""
    return listed(names) or "none"


def fingerprint(file: Path) -> tuple[int, str]:
    """Return size and SHA-256 (hexadecimal) of a file; for one that cannot be read, -1 and the reason."""
    try:
        if not file.is_file():  # reading a pipe would wait forever
            return -1, "no file"
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
            return stream.tell(), content
    except OSError as error:
        return -1, type(error).__name__


def to_label(value: Any) -> int:
    """Return the integer that a label is, or that it holds: an array, tensor or list of one element, however nested.

    Raise ``ValueError`` for everything else.
    """
    inner = value
    while isinstance(inner, list | tuple) and len(inner) == 1:
        (inner,) = inner
    if hasattr(inner, "item"):
        with suppress(ValueError, RuntimeError):  # of more than one element
            inner = inner.item()
    if not isinstance(inner, int) or not -(2**63) <= inner < 2**63:
        raise ValueError(f"label {value!r}; expected an integer, alone or in a container of one")
    return int(inner)


def check_labels(labels: Sequence[int | None], num_classes: int, origin: Path) -> None:
    """Raise ``ValueError``, naming file and row, for the first label that is not the number of a class."""
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < num_classes:
            raise ValueError(
                f"{origin}, row {row}: label {label}, but {num_classes} classes are numbered 0 to {num_classes - 1}; "
                "is this another data set?"
            )
