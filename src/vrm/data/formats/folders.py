"""Trees of class folders."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

from vrm.data.formats.images import SUFFIXES
from vrm.data.formats.layout import Encoded, EncodedFiles, shown, some, unreadable, visible


def find_class_folders(root: Path, *, classes: tuple[str, ...] | None = None) -> EncodedFiles | None:
    """``root/train/CLASS/*`` and ``root/test/CLASS/*``.

    Without ``test`` its place is taken by ``val``, ``valid`` or ``validation``. Classes are the folders' names in
    code-point order (Unicode in its composed form), or ``classes`` in theirs, and both splits must have the same.
    Images may lie in folders further down; each is its own sample, whatever others are called, and their order is that
    of their paths by code points (composed). Links are followed. Hidden entries are left out silently, files without
    an image's suffix and files beside the class folders with a warning.
    """
    places = {name: root / name for name in ("train", "test", "val", "valid", "validation") if (root / name).is_dir()}
    if not places:
        return None
    train, test = places.pop("train", None), next(iter(places.values()), None)
    if train is None or test is None:
        raise ValueError(
            f"{root} has no folder {'train' if train is None else 'test (or val)'}; "
            "expected train/CLASS/*.png and test/CLASS/*.png"
        )
    splits = {place: _list_split(place) for place in (train, test)}
    of_train, of_test = (tuple(sorted(split)) for split in splits.values())
    if of_train != of_test:
        raise ValueError(
            f"{train} and {test} must hold the same classes; only in {train.name}: "
            f"{some(sorted(set(of_train) - set(of_test)))}; only in {test.name}: "
            f"{some(sorted(set(of_test) - set(of_train)))}; give each class a folder of this very name in both, or in "
            "neither"
        )
    order = of_train if classes is None else classes
    if set(order) != set(of_train):
        raise ValueError(
            f"{train} must hold the {len(order)} classes {some(order)}; missing: "
            f"{some(sorted(set(order) - set(of_train)))}; unknown: "
            f"{some(sorted(set(of_train) - set(order)))}"
        )

    def encoded(place: Path) -> Encoded:
        files = [(file, target) for target, name in enumerate(order) for file in splits[place][name]]
        return Encoded([f for f, _ in files], [shown(f) for f, _ in files], [t for _, t in files], order)

    both = encoded(train), encoded(test)
    return EncodedFiles(
        root, tuple(file for split in splits.values() for part in split.values() for file in part), lambda: both
    )


def _list_split(place: Path) -> dict[str, list[Path]]:
    """Class name to its image files, sorted by their paths."""
    split: dict[str, list[Path]] = {}
    folders: list[Path] = []
    ignored: list[Path] = []
    for path in visible(place):
        (folders if path.is_dir() else ignored).append(path)
    for folder in folders:
        name = unicodedata.normalize("NFC", folder.name)
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"the name of the class folder {shown(folder)} is no UTF-8; rename it")
        if name in split:
            raise ValueError(f"{place} holds two folders whose names are both {name!r}; join them")
        files = sorted(_files(folder), key=lambda path: _order(str(path)))
        split[name] = [path for path in files if path.suffix.lower() in SUFFIXES]
        others = [path for path in files if path.suffix.lower() not in SUFFIXES]
        if not split[name]:
            held = f", only {some([shown(path.relative_to(folder)) for path in others])}" if others else ""
            raise ValueError(
                f"{shown(folder)} holds no image ({', '.join(sorted(SUFFIXES))}){held}; fill it or remove it, this "
                "class from both splits"
            )
        ignored += others
    if ignored:
        warnings.warn(
            f"{len(ignored)} files in {place} are no images and are left out, such as {shown(ignored[0])}",
            stacklevel=2,
        )
    if not split:
        raise ValueError(f"{place} holds no class folder; expected {place.name}/CLASS/*.png")
    return split


def _order(path: str) -> tuple[str, str]:
    """Equal for copies of a tree on file systems that store names in other forms of Unicode."""
    return unicodedata.normalize("NFC", path), path


def _files(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Everything below but folders, without what is hidden; a link that leads nowhere is a file that cannot be read."""
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
            yield from _files(path, here)
        else:
            yield path
