"""Data sets by name, and any other."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vrm.data.cache import cached, content_key
from vrm.data.formats.folders import find_class_folders
from vrm.data.formats.idx import read_idx
from vrm.data.formats.layout import EncodedFiles, some, visible
from vrm.data.formats.parquet import find_parquet
from vrm.data.formats.pickles import read_cifar_pickles
from vrm.data.images import Progress, check_size, decode_all, pixels
from vrm.data.store import ChannelValues, DataSet, ImageStore, Stores, channel_statistics, few_labels
from vrm.randomness import permutation

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

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts it."""


@dataclass(frozen=True)
class Request:
    """What a reader is told: the folder, the wanted size, and how to decode."""

    root: Path | None
    size: int | None
    num_workers: int | None
    progress: Progress | None


@dataclass(frozen=True)
class Source:
    """A data set that can be loaded by name.

    ``layouts`` tells what the folder must hold, or where the data come from. ``statistics``: the literature's mean and
    standard deviation of each channel; ``None``: measured on the train split.
    """

    title: str
    layouts: str
    view_policy: str
    read: Callable[[Request], Stores]
    statistics: tuple[ChannelValues, ChannelValues] | None = None


def load(
    name: str,
    *,
    root: Path | str | None = None,
    size: int | None = None,
    labels_per_class: int | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> DataSet:
    """A data set by name, in memory.

    Args:
        name: one of ``SOURCES``.
        root: the folder that holds it; see the source's ``layouts``.
        size: images are brought to this square (bilinear; shorter side first, then the centre); by default they stay
            as they are, and then must have one size.
        labels_per_class: keep only so many train samples of each class, a fixed choice. Mean and standard deviation
            stay those of the whole.
        num_workers: threads that decode; has no influence on the result.
        progress: called with (images decoded, images in all) while images are decoded.

    Raises:
        ValueError: the name is unknown, or the data are missing, incomplete or broken: which file, what was expected,
            and how to get it.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no data set {name!r}; {hint}there are {', '.join(SOURCES)}")
    source = SOURCES[name]
    check_size(size)
    folder = None if root is None else Path(root).expanduser()
    if folder is not None and not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"data.root={root} {state}; it must be the folder that holds {source.title}: {source.layouts}")
    train, test = source.read(Request(folder, size, num_workers, progress))
    if size is not None:
        train, test = _resized(train, size), _resized(test, size)
    absent = torch.nonzero(torch.bincount(train.targets, minlength=train.num_classes) == 0).flatten().tolist()
    if absent:
        raise ValueError(
            f"the train split has no image of {len(absent)} of the {train.num_classes} classes of {source.title} "
            f"({some([train.classes[label] for label in absent])}); is this another data set, or a part of it?"
        )
    mean, std = source.statistics or channel_statistics(train)
    if labels_per_class is not None:
        train = few_labels(train, labels_per_class)
    return DataSet(name, train, test, mean, std, source.view_policy)


def from_dataset(dataset: Any, *, classes: Sequence[str] | None = None, size: int | None = None) -> ImageStore:
    """Any map-style data set of (image, label), decoded.

    Images: PIL images of any mode, uint8 tensors (3 or 1, H, W), uint8 arrays (H, W, 3 or 1) or (H, W); before any
    conversion to floats. Labels: integers. Two stores make a :class:`DataSet`::

        train, test = from_dataset(my_train, classes=names), from_dataset(my_test, classes=names)
        data = DataSet("mine", train, test, *channel_statistics(train), view_policy="cifar")

    Args:
        dataset: anything with ``len`` and items (image, label).
        classes: the names of the classes; by default ``dataset.classes`` where it has them, as torchvision's data sets
            do, else the numbers up to the largest label.
        size: as in :func:`load`.
    """
    check_size(size)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{type(dataset).__name__} is no map-style data set: it needs __len__ and __getitem__; "
            "list() makes one of an iterable"
        )
    if len(dataset) == 0:
        raise ValueError(f"{type(dataset).__name__} is empty; it needs at least one image")
    images, targets = [], []
    for row in range(len(dataset)):
        try:
            image, label = dataset[row]
            images.append(pixels(_as_pil(image), size))
        except (ValueError, TypeError) as error:
            raise ValueError(f"sample {row} of {type(dataset).__name__}: {error}; expected (image, label)") from error
        if images[row].shape != images[0].shape:
            raise ValueError(
                f"sample {row} of {type(dataset).__name__} has shape {images[row].shape}, sample 0 {images[0].shape}; "
                "give a size to fit them to"
            )
        targets.append(_as_label(label, row))
    names = classes if classes is not None else getattr(dataset, "classes", None)
    names = [str(label) for label in range(max(targets) + 1)] if names is None else names
    return ImageStore(torch.from_numpy(np.stack(images)), torch.tensor(targets), tuple(map(str, names)))


def _as_pil(image: object) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ValueError(f"a tensor of shape {tuple(image.shape)}; expected (3, H, W) or (1, H, W)")
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"an image of type {type(image).__name__}; expected a PIL image, a tensor or an array")
    if image.dtype != np.uint8:
        raise ValueError(f"pixels of type {image.dtype}; expected uint8, before ToTensor and Normalize")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim != 2 and image.shape[2:] != (3,):
        raise ValueError(
            f"pixels of shape {image.shape}; expected (H, W), (H, W, 1) or (H, W, 3), tensors with channels first"
        )
    return Image.fromarray(np.ascontiguousarray(image))


def _as_label(label: Any, row: int) -> int:
    if isinstance(label, Tensor | np.ndarray) and label.ndim == 0:
        label = label.item()
    if not isinstance(label, int | np.integer):
        raise ValueError(f"sample {row} has label {label!r}; expected an integer")
    return int(label)


def _resized(store: ImageStore, size: int) -> ImageStore:
    if store.image_size == (size, size):
        return store
    images = [pixels(Image.fromarray(image.permute(1, 2, 0).numpy()), size) for image in store.images]
    return ImageStore(torch.from_numpy(np.stack(images)), store.targets, store.classes)


def _decoded(name: str, found: EncodedFiles, request: Request, expected: tuple[int, int] | None = None) -> Stores:
    """The images of a layout, from the cache or decoded now; of their ``expected`` size or fitted to the wanted one."""
    size = None if expected else request.size

    def build() -> Stores:
        train, test = found.read()
        images = decode_all(
            [*train.images, *test.images],
            [*train.origins, *test.origins],
            size=size,
            expected=expected,
            num_workers=request.num_workers,
            progress=request.progress,
        )
        return (
            ImageStore(images[: len(train.images)], torch.tensor(train.targets), train.classes),
            ImageStore(images[len(train.images) :], torch.tensor(test.targets), test.classes),
        )

    return cached(name, content_key(found.folder, found.files, name=name, size=size), build)


def _digits(request: Request) -> Stores:
    """The handwritten digits that scikit-learn embeds: 1,797 grey images of 8 x 8 pixels with levels 0 to 16.

    Levels become ``level * 255 / 16``, rounded, halves up. Of each class one fifth, rounded, is the test split; which
    is a fixed function of the class and the position in it.
    """
    if request.root is not None:
        raise ValueError("the digits come with scikit-learn; leave data.root out")
    from sklearn.datasets import load_digits  # not above: it takes a second

    levels, labels = load_digits(return_X_y=True)
    grey: NDArray[np.uint8] = ((levels.astype(np.int64) * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    whole = ImageStore(torch.from_numpy(grey.repeat(3, axis=1)), targets, tuple("0123456789"))
    in_test = torch.zeros(len(whole), dtype=torch.bool)
    for label in range(whole.num_classes):
        members = torch.nonzero(targets == label).flatten()
        shuffled = permutation(len(members), 0, "digits split", label)
        in_test[members[shuffled[: round(len(members) / 5)]]] = True
    return whole.select(torch.nonzero(~in_test).flatten()), whole.select(torch.nonzero(in_test).flatten())


def _cifar10(request: Request) -> Stores:
    return _cifar("cifar10", "cifar-10-batches-py", request, CIFAR10_CLASSES)


def _cifar100(request: Request) -> Stores:
    return _cifar("cifar100", "cifar-100-python", request, CIFAR100_CLASSES)


def _cifar(name: str, folder: str, request: Request, classes: tuple[str, ...]) -> Stores:
    root = _needed_root(name, request)
    ten = name == "cifar10"
    stores = read_cifar_pickles(
        root,
        folder=folder,
        train=[f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"],
        test="test_batch" if ten else "test",
        label_key="labels" if ten else "fine_labels",
        classes=classes,
    )
    if stores is not None:
        return stores
    labels = ("label",) if ten else ("fine_label", "label")
    found = find_parquet(root, label_columns=labels, classes=classes) or find_class_folders(root, classes=classes)
    if found is None:
        raise _nothing_there(name, root)
    return _decoded(name, found, request, expected=(32, 32))


def _fashion_mnist(request: Request) -> Stores:
    root = FASHION_MNIST_FOLDER if request.root is None and FASHION_MNIST_FOLDER.is_dir() else request.root
    if root is None:
        raise ValueError(f"fashion-mnist needs data.root=FOLDER: {SOURCES['fashion-mnist'].layouts}")
    stores = read_idx(root, folders=("FashionMNIST/raw", "raw"), classes=FASHION_MNIST_CLASSES)
    if stores is None:
        raise _nothing_there("fashion-mnist", root)
    return stores


def _folder(request: Request) -> Stores:
    root = _needed_root("folder", request)
    found = find_class_folders(root)
    if found is None:
        raise _nothing_there("folder", root)
    return _decoded("folder", found, request)


def _needed_root(name: str, request: Request) -> Path:
    if request.root is None:
        raise ValueError(f"{name} needs data.root=FOLDER: {SOURCES[name].layouts}")
    return request.root


def _nothing_there(name: str, root: Path) -> ValueError:
    held = some([path.name + "/" * path.is_dir() for path in visible(root)])
    return ValueError(f"no {SOURCES[name].title} in {root}, which holds {held}; expected {SOURCES[name].layouts}")


_CIFAR_LAYOUTS = (
    "torchvision's folder {folder} (torchvision.datasets.{cls}(root, download=True) makes it), "
    "or Hugging Face's parquet files train*.parquet and test*.parquet, "
    "or class folders train/CLASS/*.png and test/CLASS/*.png (or val/)"
)

SOURCES: dict[str, Source] = {
    "digits": Source("the handwritten digits", "nothing: they come with scikit-learn", "digits", _digits),
    "cifar10": Source(
        "CIFAR-10",
        _CIFAR_LAYOUTS.format(folder="cifar-10-batches-py", cls="CIFAR10"),
        "cifar",
        _cifar10,
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    "cifar100": Source(
        "CIFAR-100",
        _CIFAR_LAYOUTS.format(folder="cifar-100-python", cls="CIFAR100"),
        "cifar",
        _cifar100,
        ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST",
        "the IDX files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-.., gzipped or not, as Debian's package "
        "dataset-fashion-mnist has them, or torchvision's folder FashionMNIST/raw "
        "(torchvision.datasets.FashionMNIST(root, download=True) makes it)",
        "cifar",
        _fashion_mnist,
        ((0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530)),
    ),
    "folder": Source(
        "images in class folders", "train/CLASS/*.png (or .jpg, ..) and test/CLASS/*.png (or val/)", "cifar", _folder
    ),
}
"""Every data set that :func:`load` knows."""
