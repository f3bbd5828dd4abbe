"""What the readers of this package share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Encoded:
    """One split before decoding: ``images`` as bytes or files, ``origins`` for errors, ``targets`` into ``classes``."""

    images: Sequence[bytes | Path]
    origins: Sequence[str]
    targets: Sequence[int]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class EncodedFiles:
    """A layout that was found: the ``files`` in ``folder`` it consists of, and how to ``read`` train and test."""

    folder: Path
    files: tuple[Path, ...]
    read: Callable[[], tuple[Encoded, Encoded]]


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without hidden entries."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of many names, for errors."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") if names else "none"


def check_labels(labels: Sequence[int | None], num_classes: int, origin: Path) -> None:
    """``ValueError`` naming file and row of the first label that is not a class."""
    for row, label in enumerate(labels):
        if label is None or not 0 <= label < num_classes:
            raise ValueError(
                f"{origin}, row {row}: label {label}, but {num_classes} classes are numbered 0 to {num_classes - 1}; "
                "is this another data set?"
            )
