"""Class folders: ``train/CLASS/*.png`` and ``test/CLASS/*.png``."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

from vrm.data.formats.images import SUFFIXES
from vrm.data.formats.layout import EncodedFiles, EncodedSplit, names_in_words, shown, unreadable, visible
from vrm.wording import counted


def find_class_folders(root: Path, *, classes: tuple[str, ...] | None = None) -> EncodedFiles | None:
    """Find ``root/train/CLASS/*`` and ``root/test/CLASS/*`` (or ``val``, ``valid``, ``validation`` without ``test``).

    Classes are the folders' names in code-point order (Unicode in its composed form), or ``classes`` in their order;
    both splits must have the same. Images may lie in folders further down; each is a sample of its own, and their order
    is that of their composed paths by code points. Links are followed. Hidden entries are left out silently, files
    without an image's suffix and files beside the class folders with a warning.
    """
    folders = {name: root / name for name in ("train", "test", "val", "valid", "validation") if (root / name).is_dir()}
    if not folders:
        return None
    train, test = folders.pop("train", None), next(iter(folders.values()), None)
    if train is None or test is None:
        raise ValueError(
            f"{root} has no folder {'train' if train is None else 'test (or val)'}; "
            "expected train/CLASS/*.png and test/CLASS/*.png"
        )
    splits = {folder: _list_split(folder) for folder in (train, test)}
    in_train, in_test = (set(split) for split in splits.values())
    if in_train != in_test:
        raise ValueError(
            f"{train} and {test} must hold the same classes; only in {train.name}: "
            f"{names_in_words(sorted(in_train - in_test))}; only in {test.name}: "
            f"{names_in_words(sorted(in_test - in_train))}; give each class a folder of this very name in both, or in "
            "neither"
        )
    order = tuple(sorted(in_train)) if classes is None else classes
    if set(order) != in_train:
        raise ValueError(
            f"{train} must hold the {len(order)} classes {names_in_words(order)}; missing: "
            f"{names_in_words(sorted(set(order) - in_train))}; unknown: "
            f"{names_in_words(sorted(in_train - set(order)))}"
        )

    def encoded(folder: Path) -> EncodedSplit:
        files = [(file, target) for target, name in enumerate(order) for file in splits[folder][name]]
        return EncodedSplit([f for f, _ in files], [shown(f) for f, _ in files], [t for _, t in files], order)

    both = encoded(train), encoded(test)
    return EncodedFiles(
        root, tuple(file for split in splits.values() for part in split.values() for file in part), lambda: both
    )


def _list_split(place: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, sorted by their paths."""
    split: dict[str, list[Path]] = {}
    folders: list[Path] = []
    ignored: list[Path] = []
    for path in visible(place):
        (folders if path.is_dir() else ignored).append(path)
    for folder in folders:
        name = unicodedata.normalize("NFC", folder.name)
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"the name of the class folder {shown(folder)} is not UTF-8; rename it")
        if name in split:
            raise ValueError(f"{place} holds two folders whose names are both {name!r}; join them")
        files = sorted(_files_below(folder), key=lambda path: _sort_key(str(path)))
        split[name] = [path for path in files if path.suffix.lower() in SUFFIXES]
        others = [path for path in files if path.suffix.lower() not in SUFFIXES]
        if not split[name]:
            held = f", only {names_in_words(shown(path.relative_to(folder)) for path in others)}" if others else ""
            raise ValueError(
                f"{shown(folder)} holds no image ({', '.join(sorted(SUFFIXES))}){held}; add images, or remove this "
                "class from both splits"
            )
        ignored += others
    if ignored:
        warnings.warn(
            f"{counted(len(ignored), 'file')} in {place} left out for not being images, such as {shown(ignored[0])}",
            stacklevel=2,
        )
    if not split:
        raise ValueError(f"{place} holds no class folder; expected {place.name}/CLASS/*.png")
    return split


def _sort_key(path: str) -> tuple[str, str]:
    """Return a key that is equal for copies of a tree on file systems that store names in other forms of Unicode."""
    return unicodedata.normalize("NFC", path), path


def _files_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Yield every visible entry below that is not a folder, also links that lead nowhere."""
    try:
        status = folder.stat()
        here = above | {(status.st_dev, status.st_ino)}
        if len(here) == len(above):
            raise ValueError(f"{shown(folder)} is a link to a folder that holds it; remove the link")
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise unreadable(folder, error) from error
    for entry in found:
        path = Path(entry.path)
        if path.is_dir() if entry.is_symlink() else entry.is_dir():
            yield from _files_below(path, here)
        else:
            yield path
