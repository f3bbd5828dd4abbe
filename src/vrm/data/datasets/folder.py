"""Your own images in class folders."""

from __future__ import annotations

from pathlib import Path

from vrm.data.datasets.source import Source
from vrm.data.formats.folders import find_class_folders
from vrm.data.formats.layout import EncodedFiles


def find_folder(root: Path | None) -> EncodedFiles | None:
    """Find class folders with any names."""
    return None if root is None else find_class_folders(root)


FOLDER = Source(
    "images in class folders",
    "train/CLASS/*.png (or .jpg, ..) and test/CLASS/*.png (or val/)",
    "cifar",
    find_folder,
)
