"""Data sets by name, and any other."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vrm.data.datasets.download import Remote, RemoteFile, obtain
from vrm.data.formats.folders import find_class_folders
from vrm.data.formats.idx import read_idx
from vrm.data.formats.images import Policy, Progress, check_size, decode_all, decode_good, find_bad, pixels
from vrm.data.formats.layout import Encoded, EncodedFiles, shown, some, visible
from vrm.data.formats.parquet import find_parquet
from vrm.data.formats.pickles import read_cifar_pickles
from vrm.data.stores.cache import Table, cached, cached_table, content_key
from vrm.data.stores.host import Placement
from vrm.data.stores.pack import MANIFEST, is_pack, open_pack
from vrm.data.stores.store import ChannelValues, DataSet, ImageStore, Store, Stores, channel_statistics, few_labels
from vrm.data.stores.stream import Decoder, streamed
from vrm.data.views.policies import view_policy
from vrm.data.views.transforms import CentralCrop
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
_ZALANDO = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
_FASHION_MNIST = Remote(
    "FashionMNIST/raw",  # as torchvision calls it
    tuple(
        RemoteFile(f"{_ZALANDO}{name}-ubyte.gz", sha256, num_bytes)
        for name, sha256, num_bytes in (
            ("train-images-idx3", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26_421_880),
            ("train-labels-idx1", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29_515),
            ("t10k-images-idx3", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4_422_102),
            ("t10k-labels-idx1", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5_148),
        )
    ),
)

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` puts it."""

_TOLD = 10  # bad images in a warning
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Source:
    """A data set that can be loaded by name.

    ``layouts`` tells what the folder must hold, or where the data come from. ``find``: what lies in the folder
    ``data.root`` (``None``: none was named), or ``None`` if nothing of this data set does. ``statistics``: the
    literature's mean and standard deviation of each channel; ``None``: measured on the train split. ``remote``: where
    it can be fetched.
    """

    title: str
    layouts: str
    view_policy: str
    find: Callable[[Path | None], Stores | EncodedFiles | None]
    statistics: tuple[ChannelValues, ChannelValues] | None = None
    remote: Remote | None = None


def load(
    name: str,
    *,
    root: Path | str | None = None,
    size: int | None = None,
    labels_per_class: int | None = None,
    views: str | None = None,
    placement: Placement = "auto",
    bad_images: Policy = "error",
    download: bool = False,
    num_workers: int | None = None,
    decoder: Decoder = "cpu",
    progress: Progress | None = None,
) -> DataSet:
    """A data set by name, decoded in memory, or ready to be decoded for every batch; :func:`~vrm.data.place` next.

    Args:
        name: one of ``SOURCES``.
        root: the folder that holds it; see the source's ``layouts``. Or a pack of it (:mod:`vrm.data.stores.pack`).
        size: images are brought to this square (bilinear; shorter side first, then the centre); by default they stay
            as they are, and then must have one size.
        labels_per_class: keep only so many train samples of each class, a fixed choice. Mean and standard deviation
            stay those of the whole.
        views: the view policy that will be used, where not the data's own: where it crops and resizes, evaluation sees
            what :attr:`~vrm.data.views.policies.ViewPolicy.evaluation` says.
        placement: ``"stream"``: files of images are decoded for every batch, see :mod:`vrm.data.stores.stream`;
            ``"auto"``: if they would fill more than half of the free memory; else all are decoded now.
        bad_images: an image that cannot be read stops with its file and the reason (``"error"``: the first one); all of
            them are listed before that (``"report"``); or they are left out with a warning, and each store's
            ``skipped`` lists them (``"skip"``; without ``size``, also those of another size than most).
        download: fetch data of a known address into ``root`` where it does not hold them; without a request where it
            does.
        num_workers: threads (or processes, where images are decoded for every batch) that decode; has no influence on
            the result.
        decoder: what decodes for every batch of training: ``"cpu"``, or ``"nvidia"``: the GPU's decoder, whose pixels
            differ a little (:mod:`vrm.data.stores.nvidia`).
        progress: called with (bytes, bytes in all) while data are fetched, with (images, images in all) while they are
            decoded, now or for mean and standard deviation.

    Raises:
        ValueError: the name is unknown, or the data are missing, incomplete or broken: which file, what was expected,
            and how to get it.
    """
    check_size(size)
    _check_policy(bad_images)
    source = _source(name)
    if root is not None and is_pack(Path(root).expanduser()):
        return _from_pack(name, Path(root).expanduser(), size, labels_per_class, views)
    found = find(name, root=root, download=download, progress=progress)
    crop = _evaluation(views or source.view_policy)
    streams = streamed(
        found,
        lambda files: without_bad(name, files, bad_images, num_workers=num_workers, progress=progress),
        placement=placement,
        size=size,
        crop=crop,
        num_workers=num_workers,
        decoder=decoder,
    )
    train: Store
    test: Store
    if streams is not None:
        train, test = streams.train, streams.test
    elif decoder != "cpu":
        raise ValueError(
            f"data.decoder={decoder} decodes files for every batch, but these images are decoded beforehand; leave it "
            "out, or give data.placement=stream"
        )
    else:
        train, test = _in_memory(name, found, size, bad_images, num_workers, progress)
        test = replace(test, crop=crop)
    absent = torch.nonzero(torch.bincount(train.targets, minlength=train.num_classes) == 0).flatten().tolist()
    if absent:
        left = ", the bad images left out," if train.skipped else ""
        raise ValueError(
            f"the train split has{left} no image of {len(absent)} of the {train.num_classes} classes of {source.title} "
            f"({some([train.classes[label] for label in absent])}); is this another data set, or a part of it?"
        )
    mean, std = source.statistics or channel_statistics(train, progress=progress if streams else None)
    if labels_per_class is not None:
        train = few_labels(train, labels_per_class)
    return DataSet(name, train, test, mean, std, source.view_policy, streams.why if streams else "")


def find(
    name: str, *, root: Path | str | None = None, download: bool = False, progress: Progress | None = None
) -> Stores | EncodedFiles:
    """What :func:`load` decodes: a layout of encoded images, or stores where the layout holds plain pixels.

    Arguments and errors as in :func:`load`.
    """
    try:
        return _find(name, None if root is None else Path(root).expanduser(), download, progress)
    except OSError as error:
        raise ValueError(
            f"data.root={root} cannot be read ({error.strerror}: {error.filename}); see to its permissions and disk"
        ) from error


def _find(name: str, folder: Path | None, download: bool, progress: Progress | None) -> Stores | EncodedFiles:
    source = _source(name)
    offer = ""
    if source.remote is None and download:
        raise ValueError(
            f"data.download=true, but {source.title} have no known address: they are {source.layouts}; leave it out"
        )
    if source.remote is not None and not download:
        offer = f"; data.download=true fetches it there ({source.remote.num_bytes / 1e6:,.0f} MB)"
    if folder is None or folder.is_dir():
        try:
            found = source.find(folder)
        except ValueError as error:
            if not download:
                raise
            raise ValueError(
                f"{error}; or name an empty folder as data.root, which data.download=true fills"
            ) from error
        if found is not None:
            return found
    elif folder.exists() or not download:
        state = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"data.root={folder} {state}; it must be the folder that holds {source.title}: {source.layouts}{offer}"
        )
    if folder is None:
        raise ValueError(f"{name} needs data.root=FOLDER: {source.layouts}{offer}")
    if source.remote is not None and download:
        obtain(source.remote, folder, progress=progress)
        found = source.find(folder)
        if found is not None:
            return found
    held = some([shown(Path(path.name)) + "/" * path.is_dir() for path in visible(folder)])
    raise ValueError(f"no {source.title} in {folder}, which holds {held}; expected {source.layouts}{offer}")


def without_bad(
    name: str,
    found: EncodedFiles,
    bad_images: Policy,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Encoded, Encoded]:
    """Train and test for those who decode images as they need them: with the bad ones known beforehand, and left out.

    Arguments and errors as in :func:`load`. With ``"error"`` nothing is looked through: decoding a bad image will
    raise :class:`~vrm.data.formats.images.BadImage`. Otherwise every image is decoded once, whatever its size, and
    what was found is kept in the cache, by the content of the files.
    """
    _check_policy(bad_images)
    splits = found.read()
    if bad_images == "error":
        return splits

    def build() -> Table:
        return _by_split(find_bad(*_joined(splits), num_workers=num_workers, progress=progress), splits)

    bad = cached_table(f"{name}-bad", content_key(found.folder, found.files, name=name), build)
    if bad_images == "report":
        _report(splits, bad)
    train, test = _left(found, splits, bad)
    _warn_skipped(train.skipped, test.skipped)
    return train, test


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
        except MemoryError:
            raise
        except Exception as error:  # the data set is somebody else's
            kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
            raise ValueError(
                f"sample {row} of {type(dataset).__name__}: {kind}{error}; expected (image, label)"
            ) from error
        if images[row].shape != images[0].shape:
            raise ValueError(
                f"sample {row} of {type(dataset).__name__} has shape {images[row].shape}, sample 0 {images[0].shape}; "
                "give a size to fit them to"
            )
        targets.append(_as_label(label, row))
    names = classes if classes is not None else getattr(dataset, "classes", None)
    if names is None:
        row = max(range(len(targets)), key=targets.__getitem__)
        if targets[row] >= _MOST_CLASSES:
            raise ValueError(
                f"sample {row} has label {targets[row]}; labels are numbers of classes from 0 on, below "
                f"{_MOST_CLASSES:,} where no classes are given"
            )
        names = [str(label) for label in range(targets[row] + 1)]
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
    if not isinstance(label, int | np.integer) or not -(2**63) <= label < 2**63:
        raise ValueError(f"sample {row} has label {label!r}; expected an integer")
    return int(label)


def _resized(store: ImageStore, size: int) -> ImageStore:
    if store.image_size == (size, size):
        return store
    images = [pixels(Image.fromarray(image.permute(1, 2, 0).numpy()), size) for image in store.images]
    return replace(store, images=torch.from_numpy(np.stack(images)))


def _source(name: str) -> Source:
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no data set {name!r}; {hint}there are {', '.join(SOURCES)}")
    return SOURCES[name]


def _from_pack(name: str, folder: Path, size: int | None, labels_per_class: int | None, views: str | None) -> DataSet:
    """A data set that was packed under this name; its images stay in their files."""
    if views is not None:
        _evaluation(views)
    data = open_pack(folder, views=views)
    if name not in ("packed", data.name):
        raise ValueError(
            f"data.root={folder} is a pack of {data.name}, not of {name}; give data={data.name} or data=packed"
        )
    height, width = data.train.stored_size
    if size is not None and (height, width) != (size, size):
        raise ValueError(
            f"data.size={size}, but the images in {folder} are packed at {height} x {width} pixels; leave it out, or "
            "pack the data again at another size"
        )
    return data if labels_per_class is None else replace(data, train=few_labels(data.train, labels_per_class))


def _evaluation(views: str) -> CentralCrop | None:
    """What evaluation sees of images that are trained on with these views."""
    try:
        return view_policy(views).evaluation
    except ValueError as error:
        raise ValueError(f"data.views={views}: {error}") from None


def _in_memory(
    name: str,
    found: Stores | EncodedFiles,
    size: int | None,
    bad_images: Policy,
    num_workers: int | None,
    progress: Progress | None,
) -> Stores:
    """The images decoded, of one size."""
    if isinstance(found, EncodedFiles):
        found = _decoded(name, found, size, bad_images, num_workers, progress)
    train, test = found
    _warn_skipped(train.skipped, test.skipped)
    return (train, test) if size is None else (_resized(train, size), _resized(test, size))


def _decoded(
    name: str,
    found: EncodedFiles,
    size: int | None,
    bad_images: Policy,
    num_workers: int | None,
    progress: Progress | None,
) -> Stores:
    """The images of a layout, from the cache or decoded now; of the size they must have or fitted to the wanted one."""
    side = found.image_size
    size = None if side else size

    def build() -> Stores:
        splits = found.read()
        encoded, origins = _joined(splits)
        bad: dict[int, str] = {}
        if bad_images == "error":
            images = decode_all(encoded, origins, size=size, expected=side, num_workers=num_workers, progress=progress)
        else:
            images, bad = decode_good(
                encoded, origins, size=size, expected=side, num_workers=num_workers, progress=progress
            )
        table = _by_split(bad, splits)
        if bad_images == "report":
            _report(splits, table)
        train, test = _left(found, splits, table)
        return (
            ImageStore(images[: len(train.images)], torch.tensor(train.targets), train.classes, train.skipped),
            ImageStore(images[len(train.images) :], torch.tensor(test.targets), test.classes, test.skipped),
        )

    # Of a data set without bad images "report" makes what "error" makes.
    key = content_key(found.folder, found.files, name=name, size=size, skip=bad_images == "skip")
    return cached(name, key, build)


def _check_policy(bad_images: str) -> None:
    if bad_images not in get_args(Policy):
        raise ValueError(f"bad_images must be one of {', '.join(get_args(Policy))}, got {bad_images!r}")


def _joined(splits: tuple[Encoded, Encoded]) -> tuple[list[bytes | Path], list[str]]:
    """The images of both splits, and their origins."""
    train, test = splits
    return [*train.images, *test.images], [*train.origins, *test.origins]


def _by_split(bad: Mapping[int, str], splits: tuple[Encoded, Encoded]) -> Table:
    """Bad rows of the joined splits as rows of each."""
    first = len(splits[0].images)
    return (
        {row: reason for row, reason in bad.items() if row < first},
        {row - first: reason for row, reason in bad.items() if row >= first},
    )


def _report(splits: tuple[Encoded, Encoded], bad: Table) -> None:
    """Stop if there are bad images, and list all."""
    lines = [line for split, rows in zip(splits, bad, strict=True) for line in split.told(rows)]
    if lines:
        raise ValueError(
            f"{len(lines)} of {sum(len(split.images) for split in splits):,} images are bad; get them again, remove "
            "them, or leave them out: data.bad_images=skip\n" + "\n".join(lines)
        )


def _left(found: EncodedFiles, splits: tuple[Encoded, Encoded], bad: Table) -> tuple[Encoded, Encoded]:
    """Both splits without the bad images, whose origins are told as they lie in the folder."""
    left = []
    for name, split, rows in zip(("train", "test"), splits, bad, strict=True):
        if len(rows) == len(split.images):
            raise ValueError(f"all of the {len(rows)} {name} images are bad, such as {split.told(rows)[0]}")
        good = split.without(rows)
        here = f"{shown(found.folder)}/"
        left.append(replace(good, skipped=tuple(line.removeprefix(here) for line in good.skipped)))
    return left[0], left[1]


def _warn_skipped(*splits: Sequence[str]) -> None:
    skipped = [line for split in splits for line in split]
    if skipped:
        rest = f"; and {len(skipped) - _TOLD} more" if len(skipped) > _TOLD else ""
        warnings.warn(
            f"{len(skipped)} bad images are left out (data.bad_images=skip): {'; '.join(skipped[:_TOLD])}{rest}",
            stacklevel=3,
        )


def _digits(root: Path | None) -> Stores:
    """The handwritten digits that scikit-learn embeds: 1,797 grey images of 8 x 8 pixels with levels 0 to 16.

    Levels become ``level * 255 / 16``, rounded, halves up. Of each class one fifth, rounded, is the test split; which
    is a fixed function of the class and the position in it.
    """
    if root is not None:
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


def _cifar10(root: Path | None) -> Stores | EncodedFiles | None:
    return None if root is None else _cifar(root, _CIFAR10, CIFAR10_CLASSES, "labels", ("label",))


def _cifar100(root: Path | None) -> Stores | EncodedFiles | None:
    return None if root is None else _cifar(root, _CIFAR100, CIFAR100_CLASSES, "fine_labels", ("fine_label", "label"))


def _cifar(
    root: Path, remote: Remote, classes: tuple[str, ...], label_key: str, label_columns: Sequence[str]
) -> Stores | EncodedFiles | None:
    *train, test = remote.members or ()
    stores = read_cifar_pickles(
        root, folder=remote.folder, train=train, test=test, label_key=label_key, classes=classes
    )
    if stores is not None:
        return stores
    found = find_parquet(root, label_columns=label_columns, classes=classes)
    found = found or find_class_folders(root, classes=classes)
    return found and replace(found, image_size=(32, 32))


def _fashion_mnist(root: Path | None) -> Stores | None:
    if root is None and FASHION_MNIST_FOLDER.is_dir():
        root = FASHION_MNIST_FOLDER
    if root is None:
        return None
    return read_idx(root, folders=(_FASHION_MNIST.folder, "raw"), classes=FASHION_MNIST_CLASSES)


def _folder(root: Path | None) -> EncodedFiles | None:
    return None if root is None else find_class_folders(root)


_CIFAR_LAYOUTS = (
    "torchvision's folder {folder} (torchvision.datasets.{cls}(root, download=True) makes it), "
    "or Hugging Face's parquet files train*.parquet and test*.parquet, "
    "or class folders train/CLASS/*.png and test/CLASS/*.png (or val/)"
)

SOURCES: dict[str, Source] = {
    "digits": Source("the handwritten digits", "nothing: they come with scikit-learn", "digits", _digits),
    "cifar10": Source(
        "CIFAR-10",
        _CIFAR_LAYOUTS.format(folder=_CIFAR10.folder, cls="CIFAR10"),
        "cifar",
        _cifar10,
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        _CIFAR10,
    ),
    "cifar100": Source(
        "CIFAR-100",
        _CIFAR_LAYOUTS.format(folder=_CIFAR100.folder, cls="CIFAR100"),
        "cifar",
        _cifar100,
        ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        _CIFAR100,
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST",
        "the IDX files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-.., gzipped or not, as Debian's package "
        "dataset-fashion-mnist has them, or torchvision's folder FashionMNIST/raw "
        "(torchvision.datasets.FashionMNIST(root, download=True) makes it)",
        "cifar",
        _fashion_mnist,
        ((0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530)),
        _FASHION_MNIST,
    ),
    "folder": Source(
        "images in class folders", "train/CLASS/*.png (or .jpg, ..) and test/CLASS/*.png (or val/)", "cifar", _folder
    ),
    "packed": Source(
        "packed images",
        f"{MANIFEST} and its shards, as vrm data RECIPE .. pack=FOLDER makes them",
        "cifar",
        lambda root: None,
    ),
}
"""Every data set that :func:`load` knows."""
