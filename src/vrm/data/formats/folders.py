"""Trees of class folders."""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path

from vrm.data.formats.layout import Encoded, EncodedFiles, some, visible
from vrm.data.images import SUFFIXES


def find_class_folders(root: Path, *, classes: tuple[str, ...] | None = None) -> EncodedFiles | None:
    """``root/train/CLASS/*`` and ``root/test/CLASS/*``.

    Without ``test`` its place is taken by ``val``, ``valid`` or ``validation``. Classes are the folders' names in
    code-point order (Unicode in its composed form), or ``classes`` in theirs, and both splits must have the same.
    Images may lie in folders further down. Hidden entries are left out silently, files without an image's suffix and
    files beside the class folders with a warning.
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
            f"{some(sorted(set(of_test) - set(of_train)))}"
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
        return Encoded([f for f, _ in files], [str(f) for f, _ in files], [t for _, t in files], order)

    both = encoded(train), encoded(test)
    return EncodedFiles(
        root, tuple(file for split in splits.values() for part in split.values() for file in part), lambda: both
    )


def _list_split(place: Path) -> dict[str, list[Path]]:
    """Class name to its image files, sorted by their paths."""
    split: dict[str, list[Path]] = {}
    ignored = [path for path in visible(place) if not path.is_dir()]
    for folder in visible(place):
        if not folder.is_dir():
            continue
        name = unicodedata.normalize("NFC", folder.name)
        if name in split:
            raise ValueError(f"{place} holds two folders whose names are both {name!r}; join them")
        files = sorted(
            (path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder)),
            key=lambda path: path.relative_to(folder).as_posix(),
        )
        split[name] = [path for path in files if path.suffix.lower() in SUFFIXES]
        ignored += [path for path in files if path.suffix.lower() not in SUFFIXES]
        if not split[name]:
            raise ValueError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}); fill it or remove it")
    if ignored:
        warnings.warn(
            f"{len(ignored)} files in {place} are no images and are left out, such as {ignored[0]}", stacklevel=2
        )
    if not split:
        raise ValueError(f"{place} holds no class folder; expected {place.name}/CLASS/*.png")
    return split


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
