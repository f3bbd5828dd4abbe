"""A data set of your own: anything with ``len`` and items of an image and a label.

Images become bytes wherever that changes none of their values: floats as ``ToTensor`` makes them are multiples of 1/255
and are the same images as the bytes that they were made of. Other floats (normalised, resized after ``ToTensor``) are
kept as they are, for all images of the data set, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vrm.data.formats.images import BadImage, check_size, decode_image, fit, to_pixels
from vrm.data.formats.layout import to_label
from vrm.data.stores.memory import ImageStore
from vrm.wording import bytes_in_words, listed, nearest

_MOST_CLASSES = 1_000_000
"""Labels must be below this if no classes are given: a larger one is an identifier rather than a class."""

IMAGE_KEYS = ("image", "img", "images", "pixel_values", "picture", "photo", "jpg", "jpeg", "png", "webp")
"""Where the image of a dict row is looked for."""

LABEL_KEYS = ("label", "labels", "fine_label", "target", "targets", "class", "cls")
"""Where the label of a dict row is looked for."""

_CHANNELS = (1, 3, 4)
"""Grey, RGB, and RGB with alpha, which is dropped."""

Values = Image.Image | NDArray[np.floating[Any]]
"""An image of bytes, or floats (H, W) or (H, W, 3)."""


def from_dataset(
    dataset: Any,
    *,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> ImageStore:
    """Decode a map-style data set of images and labels into a store.

    Items are pairs (image, label), or dicts as Hugging Face's data sets have them. Images: PIL images of any mode;
    tensors and arrays (3, H, W), (H, W, 3) or (H, W), also of 1 channel, or of 4, of which alpha is dropped; encoded
    bytes. Their values: bytes; 16-bit levels; floats from 0 to 1, which become bytes if all are multiples of 1/255;
    floats that are whole numbers from 0 to 255, which become bytes too; any other floats, which stay floats, with a
    warning. Labels: integers, alone or in a container of one. Two stores make a :class:`~vrm.data.DataSet`::

        train, test = from_dataset(my_train, classes=names), from_dataset(my_test, classes=names)
        data = DataSet("mine", train, test, *channel_statistics(train), view_policy="cifar")

    Args:
        dataset: anything with ``len`` and such items.
        classes: the names of the classes; by default ``dataset.classes``, which torchvision's data sets have, or the
            names that Hugging Face's keep of the label, else the numbers up to the largest label.
        size: fit every image to this square, as :func:`vrm.data.load` does.
        image_key: the key of the image in dict rows; by default the one of ``IMAGE_KEYS`` that they have.
        label_key: the key of the label in dict rows; by default the one of ``LABEL_KEYS`` that they have.
    """
    check_size(size)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{type(dataset).__name__} is not a map-style data set: it needs __len__ and __getitem__; "
            "list() makes one of an iterable"
        )
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"{type(dataset).__name__} has the keys {listed(map(repr, dataset))} instead of numbered items; give one "
            "of its splits, as from_dataset(splits['train'])"
        )
    if len(dataset) == 0:
        raise ValueError(f"{type(dataset).__name__} is empty; it needs at least one image")
    rows = _Rows(dataset, size, image_key, label_key)
    for divisor in (255.0, 1.0):  # floats that are multiples of 1/255, or whole numbers
        try:
            images, targets = rows.read(divisor)
            break
        except _NotBytes:
            continue
    else:
        images, targets = rows.read(None)
    names = classes if classes is not None else rows.class_names()
    if names is None:
        row = max(range(len(targets)), key=targets.__getitem__)
        if targets[row] >= _MOST_CLASSES:
            raise ValueError(
                f"sample {row} has label {targets[row]}; labels are numbers of classes from 0 on, below "
                f"{_MOST_CLASSES:,} where no classes are given"
            )
        names = [str(label) for label in range(targets[row] + 1)]
    stored = torch.from_numpy(np.stack(images))
    if stored.is_floating_point():
        low, high = (float(end) for end in stored.aminmax())
        warnings.warn(
            f"the images of {rows.name} are floats from {low:.3g} to {high:.3g} that are not all multiples of 1/255 in "
            f"0 .. 1: they are kept as they are ({bytes_in_words(stored.nbytes)}, four times that of bytes), and mean "
            "and std apply to these values; to have bytes, give the images before Normalize and Resize",
            stacklevel=2,
        )
    return ImageStore(stored, torch.tensor(targets), tuple(map(str, names)))


class _NotBytes(Exception):
    """Floats that bytes cannot hold."""


class _Rows:
    """The items of a data set, read one by one; every error names the sample."""

    def __init__(self, dataset: Any, size: int | None, image_key: str | None, label_key: str | None) -> None:
        self.dataset, self.size = dataset, size
        self.image_key, self.label_key = image_key, label_key
        self.name = type(dataset).__name__

    def read(self, divisor: float | None) -> tuple[list[NDArray[Any]], list[int]]:
        """Return the images (3, H, W) and labels.

        Images are bytes, of which floats are ``1 / divisor``; raise :class:`_NotBytes` for floats that are not. Without
        ``divisor`` all are float32, and bytes become floats from 0 to 1.
        """
        images: list[NDArray[Any]] = []
        targets: list[int] = []
        for row in range(len(self.dataset)):
            try:
                image, label = self._split(self.dataset[row])
                images.append(self._convert(_read_image(image), divisor))
            except (MemoryError, _NotBytes):
                raise
            except Exception as error:  # the data set's code can raise anything
                kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
                raise ValueError(f"sample {row} of {self.name}: {kind}{error}; expected (image, label)") from error
            if images[row].shape != images[0].shape:
                raise ValueError(
                    f"sample {row} of {self.name} has shape {images[row].shape}, sample 0 {images[0].shape}; "
                    "give a size to fit them to"
                )
            try:
                targets.append(to_label(label))
            except ValueError as error:
                raise ValueError(f"sample {row} has {error}") from None
        return images, targets

    def class_names(self) -> Sequence[str] | None:
        """Return the names that the data set has of its classes."""
        features = getattr(self.dataset, "features", None)
        feature = features.get(self.label_key) if isinstance(features, Mapping) else None
        return getattr(self.dataset, "classes", None) or getattr(feature, "names", None)

    def _split(self, item: Any) -> tuple[Any, Any]:
        if not isinstance(item, Mapping):
            if self.image_key is not None or self.label_key is not None:
                raise ValueError(f"image_key and label_key name the keys of dicts, but this is a {type(item).__name__}")
            image, label = item
            return image, label
        self.image_key = _find_key(item, self.image_key, IMAGE_KEYS, "image_key")
        self.label_key = _find_key(item, self.label_key, LABEL_KEYS, "label_key")
        return item[self.image_key], item[self.label_key]

    def _convert(self, image: Values, divisor: float | None) -> NDArray[Any]:
        if isinstance(image, Image.Image):
            pixels = to_pixels(image, self.size)
            return pixels if divisor is not None else pixels.astype(np.float32) / np.float32(255)
        if divisor is not None:
            return to_pixels(Image.fromarray(_to_bytes(image, divisor)), self.size)
        channels = np.atleast_3d(image).astype(np.float32).transpose(2, 0, 1)
        if self.size is not None:
            channels = np.stack([np.asarray(fit(Image.fromarray(each), self.size)) for each in channels])
        return np.ascontiguousarray(np.broadcast_to(channels, (3, *channels.shape[1:])))


def _find_key(item: Mapping[Any, Any], wanted: str | None, usual: Sequence[str], argument: str) -> str:
    """Return the key that ``argument`` names, or the only usual one of a dict row."""
    if wanted is not None:
        if wanted not in item:
            raise ValueError(f"{argument}={wanted!r} is no key of this row; {nearest(wanted, map(str, item))}")
        return wanted
    found = [key for key in usual if key in item]
    if len(found) == 1:
        return found[0]
    have = f"has both {' and '.join(map(repr, found))}" if found else f"has the keys {listed(map(repr, item))}"
    raise ValueError(f"the row {have}; say by {argument}= which is the {argument.removesuffix('_key')}")


def _read_image(image: Any) -> Values:
    """Return what an item holds as an image of bytes, or as floats."""
    if isinstance(image, Mapping):  # as Hugging Face's data sets hold images that are not decoded yet
        image = image["bytes"] or Path(image["path"])
    if isinstance(image, bytes | Path):
        try:
            return decode_image(image, "the image", size=None)
        except BadImage as error:
            raise ValueError(error.reason) from error
    if isinstance(image, Image.Image):
        return image if image.mode != "F" else _finite(np.asarray(image))
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        array, order = (values.float() if values.dtype == torch.bfloat16 else values).numpy(), (0, 2)
    elif isinstance(image, np.ndarray):
        array, order = image, (2, 0)
    else:
        raise ValueError(f"an image of type {type(image).__name__}; expected a PIL image, a tensor or an array")
    array = _channels_last(array, order)
    if array.dtype.kind == "f":
        return _finite(array)
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = ((array.astype(np.int64) + 128) // 257).astype(np.uint8)
    elif array.dtype.kind in "iu":
        if array.min() < 0 or array.max() > 255:
            raise ValueError(
                f"pixels of type {array.dtype} from {array.min()} to {array.max()}; bytes go from 0 to 255"
            )
        array = array.astype(np.uint8)
    else:
        raise ValueError(f"pixels of type {array.dtype}; expected bytes or floats")
    return Image.fromarray(np.ascontiguousarray(array))


def _channels_last(array: NDArray[Any], order: tuple[int, int]) -> NDArray[Any]:
    """Return (H, W) or (H, W, 3), of channels that are in the first axis of ``order`` that can be theirs."""
    axis = next((axis for axis in order if array.ndim == 3 and array.shape[axis] in _CHANNELS), None)
    if 0 in array.shape or (array.ndim != 2 and axis is None):
        raise ValueError(
            f"pixels of shape {array.shape}; expected (H, W), (H, W, C) or (C, H, W) of 1, 3 or 4 channels"
        )
    if axis is None:
        return array
    array = np.moveaxis(array, axis, 2)[:, :, :3]
    return array[:, :, 0] if array.shape[2] == 1 else array


def _finite(values: NDArray[Any]) -> NDArray[np.floating[Any]]:
    if not np.isfinite(values).all():
        raise ValueError("its pixels hold NaN or infinity")
    return values


def _to_bytes(values: NDArray[np.floating[Any]], divisor: float) -> NDArray[np.uint8]:
    """Return the bytes of which ``values`` are ``1 / divisor``, up to their rounding; else raise :class:`_NotBytes`."""
    levels = np.rint(values.astype(np.float64) * divisor)
    rounding = 0.0 if divisor == 1 else max(float(np.finfo(values.dtype).eps), 2.0**-23)
    if levels.min() < 0 or levels.max() > 255 or np.abs(levels / divisor - values).max() > rounding:
        raise _NotBytes
    return levels.astype(np.uint8)
