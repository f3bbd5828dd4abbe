"""CIFAR-10 and CIFAR-100: 60,000 pictures of 32 x 32 pixels, in any of the layouts in which they are passed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from vrm.data.datasets.download import Remote, RemoteFile
from vrm.data.datasets.source import Source
from vrm.data.formats.folders import find_class_folders
from vrm.data.formats.layout import Found
from vrm.data.formats.parquet import find_parquet
from vrm.data.formats.pickles import read_cifar_pickles

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

# Alphabetical, as the labels of the published files are.
CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip

_TORONTO = "https://www.cs.toronto.edu/~kriz/"
_CIFAR10 = Remote(
    "cifar-10-batches-py",
    (
        RemoteFile(
            f"{_TORONTO}cifar-10-python.tar.gz",
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            170_498_071,
        ),
    ),
    (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"),
)
_CIFAR100 = Remote(
    "cifar-100-python",
    (
        RemoteFile(
            f"{_TORONTO}cifar-100-python.tar.gz",
            "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            169_001_437,
        ),
    ),
    ("train", "test"),
)


def find_cifar(
    root: Path | None, *, remote: Remote, classes: tuple[str, ...], label_key: str, label_columns: Sequence[str]
) -> Found | None:
    """Find CIFAR in ``root``: the published pickles, else parquet files, else class folders.

    ``label_key`` names the labels in the pickles, ``label_columns`` those in parquet files.
    """
    if root is None:
        return None
    *train, test = remote.members or ()
    pickled = read_cifar_pickles(
        root, folder=remote.folder, train=train, test=test, label_key=label_key, classes=classes
    )
    if pickled is not None:
        return pickled
    found = find_parquet(root, label_columns=label_columns, classes=classes)
    found = found or find_class_folders(root, classes=classes)
    return found and replace(found, image_size=(32, 32))


_LAYOUTS = (
    "torchvision's folder {folder} (torchvision.datasets.{cls}(root, download=True) makes it), "
    "or Hugging Face's parquet files train*.parquet and test*.parquet, "
    "or class folders train/CLASS/*.png and test/CLASS/*.png (or val/)"
)

CIFAR10 = Source(
    "CIFAR-10",
    _LAYOUTS.format(folder=_CIFAR10.folder, cls="CIFAR10"),
    "cifar",
    partial(find_cifar, remote=_CIFAR10, classes=CIFAR10_CLASSES, label_key="labels", label_columns=("label",)),
    ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    _CIFAR10,
)

CIFAR100 = Source(
    "CIFAR-100",
    _LAYOUTS.format(folder=_CIFAR100.folder, cls="CIFAR100"),
    "cifar",
    partial(
        find_cifar,
        remote=_CIFAR100,
        classes=CIFAR100_CLASSES,
        label_key="fine_labels",
        label_columns=("fine_label", "label"),
    ),
    ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    _CIFAR100,
)
