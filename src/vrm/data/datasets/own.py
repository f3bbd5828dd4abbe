"""A data set of your own: anything with ``len`` and (image, label) items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vrm.data.formats.images import check_size, to_pixels
from vrm.data.stores.memory import ImageStore

_MOST_CLASSES = 1_000_000
"""Labels must be below this if no classes are given: a larger one is an identifier rather than a class."""


def from_dataset(dataset: Any, *, classes: Sequence[str] | None = None, size: int | None = None) -> ImageStore:
    """Decode a map-style data set of (image, label) into a store.

    Images: PIL images of any mode, uint8 tensors (3 or 1, H, W), uint8 arrays (H, W, 3 or 1) or (H, W); before any
    conversion to floats. Labels: integers. Two stores make a :class:`~vrm.data.DataSet`::

        train, test = from_dataset(my_train, classes=names), from_dataset(my_test, classes=names)
        data = DataSet("mine", train, test, *channel_statistics(train), view_policy="cifar")

    Args:
        dataset: anything with ``len`` and items (image, label).
        classes: the names of the classes; by default ``dataset.classes``, which torchvision's data sets have, else the
            numbers up to the largest label.
        size: fit every image to this square, as :func:`vrm.data.load` does.
    """
    check_size(size)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{type(dataset).__name__} is not a map-style data set: it needs __len__ and __getitem__; "
            "list() makes one of an iterable"
        )
    if len(dataset) == 0:
        raise ValueError(f"{type(dataset).__name__} is empty; it needs at least one image")
    images, targets = [], []
    for row in range(len(dataset)):
        try:
            image, label = dataset[row]
            images.append(to_pixels(_to_pil(image), size))
        except MemoryError:
            raise
        except Exception as error:  # the data set's code can raise anything
            kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
            raise ValueError(
                f"sample {row} of {type(dataset).__name__}: {kind}{error}; expected (image, label)"
            ) from error
        if images[row].shape != images[0].shape:
            raise ValueError(
                f"sample {row} of {type(dataset).__name__} has shape {images[row].shape}, sample 0 {images[0].shape}; "
                "give a size to fit them to"
            )
        targets.append(_to_label(label, row))
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


def _to_pil(image: object) -> Image.Image:
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


def _to_label(label: Any, row: int) -> int:
    if isinstance(label, Tensor | np.ndarray) and label.ndim == 0:
        label = label.item()
    if not isinstance(label, int | np.integer) or not -(2**63) <= label < 2**63:
        raise ValueError(f"sample {row} has label {label!r}; expected an integer")
    return int(label)
