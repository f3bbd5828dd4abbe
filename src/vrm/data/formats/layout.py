"""What the readers of this package share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Encoded:
    """One split before decoding: ``images`` as bytes or files, ``origins`` for errors, ``targets`` into ``classes``.

    ``skipped``: the images that were left out as unreadable, each as "origin: reason".
    """

    images: Sequence[bytes | Path]
    origins: Sequence[str]
    targets: Sequence[int]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def without(self, skipped: Mapping[int, str]) -> Encoded:
        """The same without the rows ``skipped``, which are told with their reasons."""
        rows = [row for row in range(len(self.images)) if row not in skipped]
        return replace(
            self,
            images=[self.images[row] for row in rows],
            origins=[self.origins[row] for row in rows],
            targets=[self.targets[row] for row in rows],
            skipped=self.told(skipped),
        )

    def told(self, bad: Mapping[int, str]) -> tuple[str, ...]:
        """The rows ``bad`` by their origins, with their reasons."""
        return tuple(f"{self.origins[row]}: {reason}" for row, reason in sorted(bad.items()))


@dataclass(frozen=True)
class EncodedFiles:
    """A layout that was found: the ``files`` in ``folder`` it consists of, and how to ``read`` train and test.

    ``image_size``: (height, width) of every image, where the data set fixes it.
    """

    folder: Path
    files: tuple[Path, ...]
    read: Callable[[], tuple[Encoded, Encoded]]
    image_size: tuple[int, int] | None = None


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without hidden entries."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from error


def unreadable(folder: Path, error: OSError) -> ValueError:
    """What to raise for a folder that the system does not list."""
    return ValueError(f"the folder {shown(folder)} cannot be read ({error.strerror}); see to its permissions and disk")


def shown(path: Path) -> str:
    """A path on one line: line breaks, control characters and bytes that are no UTF-8 are escaped."""
    text = str(path)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
