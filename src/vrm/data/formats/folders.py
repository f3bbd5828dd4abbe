"""Class folders: ``train/CLASS/*.png`` and ``test/CLASS/*.png``."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from vrm.data.formats.images import SUFFIXES
from vrm.data.formats.layout import EncodedFiles, EncodedSplit, names_in_words, shown, unreadable, visible
from vrm.wording import counted

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation", "eval")
"""How the folders of the splits are called, in any case; the first is preferred."""


def find_class_folders(root: Path, *, classes: tuple[str, ...] | None = None) -> EncodedFiles | None:
    """Find ``root/train/CLASS/*`` and ``root/test/CLASS/*``; other names are in ``TRAIN_NAMES`` and ``TEST_NAMES``.

    Classes are the folders' names in code-point order (Unicode in its composed form), or ``classes`` in their order.
    The test split is the first of its folders that holds a class of the train split; it may lack classes. Images may
    lie in folders further down; each is a sample of its own, and their order is that of their composed paths by code
    points. Links are followed. Hidden entries are left out silently, files without an image's suffix and files beside
    the class folders with a warning.
    """
    folders = {path.name.lower(): path for path in visible(root) if path.is_dir()}
    trains, tests = ([folders[name] for name in names if name in folders] for names in (TRAIN_NAMES, TEST_NAMES))
    if not trains and not tests:
        _refuse_without_splits(root, [*folders.values()])
        return None
    if not trains or not tests:
        raise ValueError(
            f"{root} has no folder {'test (or val)' if trains else 'train'}; "
            "expected train/CLASS/*.png and test/CLASS/*.png"
        )
    train = trains[0]
    splits = {train: _list_split(train)}
    empty = [name for name, files in splits[train].items() if not files]
    if empty:
        raise ValueError(
            f"{shown(train / empty[0])} holds no image ({', '.join(sorted(SUFFIXES))}); add images to learn the class "
            "from, or remove its folder"
        )
    test = next((folder for folder in tests if splits[train].keys() & _class_names(folder)), tests[0])
    splits[test] = _list_split(test)
    in_train, in_test = ({name for name, files in split.items() if files} for split in splits.values())
    if not in_test <= in_train:
        raise ValueError(
            f"{train} and {test} must hold the same classes; only in {train.name}: "
            f"{names_in_words(sorted(in_train - in_test))}; only in {test.name}: "
            f"{names_in_words(sorted(in_test - in_train))}; give each class a folder of this very name in both: "
            "nothing is learnt of a class without training images"
        )
    if not any(splits[test].values()):
        raise ValueError(f"{test} holds no image ({', '.join(sorted(SUFFIXES))}); add images of each class")
    order = tuple(sorted(in_train)) if classes is None else classes
    if set(order) != in_train:
        raise ValueError(
            f"{train} must hold the {len(order)} classes {names_in_words(order)}; missing: "
            f"{names_in_words(sorted(set(order) - in_train))}; unknown: "
            f"{names_in_words(sorted(in_train - set(order)))}"
        )
    unused = [f"{shown(Path(folder.name))}/" for folder in (*trains, *tests) if folder not in splits]
    origin = f"trained on {train.name}/ and evaluated on {test.name}/ of {shown(root)}"
    origin += f"; not used: {names_in_words(unused)}" * bool(unused)

    def encoded(folder: Path) -> EncodedSplit:
        files = [(file, target) for target, name in enumerate(order) for file in splits[folder].get(name, ())]
        return EncodedSplit([f for f, _ in files], [shown(f) for f, _ in files], [t for _, t in files], order)

    both = encoded(train), encoded(test)
    return EncodedFiles(
        root,
        tuple(file for split in splits.values() for part in split.values() for file in part),
        lambda: both,
        origin=origin,
    )


def _refuse_without_splits(root: Path, folders: Sequence[Path]) -> None:
    """Raise ``ValueError`` if there are class folders that are not split, or splits in a folder further down."""
    for folder in folders:
        if any(path.name.lower() in TRAIN_NAMES and path.is_dir() for path in visible(folder)):
            raise ValueError(f"{root} holds the data set in a folder further down; give data.root={folder}")
    of_images = [f for f in folders if any(path.suffix.lower() in SUFFIXES for path in visible(f))]
    if len(of_images) > 1:
        raise ValueError(
            f"{root} holds class folders ({names_in_words(shown(Path(folder.name)) for folder in of_images)}), but no "
            "folders train and test; move them into a folder train, and some images of each class, say every fifth, "
            "into folders of the same names in a folder test"
        )


def _class_names(place: Path) -> set[str]:
    """Return the composed names of the folders in a split's folder."""
    return {unicodedata.normalize("NFC", path.name) for path in visible(place) if path.is_dir()}


def _list_split(place: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, sorted by their paths; none of a class whose folder holds no image."""
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
