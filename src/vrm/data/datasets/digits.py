"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vrm.data.datasets.source import Source
from vrm.data.formats.layout import DecodedSplit
from vrm.randomness import permutation


def read_digits(root: Path | None) -> tuple[DecodedSplit, DecodedSplit]:
    """Read the 1,797 grey images of 8 x 8 pixels with levels 0 to 16.

    A level becomes ``level * 255 / 16``, rounded, halves up. One fifth of each class, rounded, is the test split: a
    fixed function of the class and the position in it.
    """
    if root is not None:
        raise ValueError("the digits come with scikit-learn; leave data.root out")
    from sklearn.datasets import load_digits  # here, because importing it takes a second

    levels, labels = load_digits(return_X_y=True)
    grey: NDArray[np.uint8] = ((levels.astype(np.int64) * 255 + 8) // 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    images, targets = torch.from_numpy(grey.repeat(3, axis=1)), torch.from_numpy(labels.astype(np.int64))
    classes = tuple("0123456789")
    in_test = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(len(classes)):
        members = torch.nonzero(targets == label).flatten()
        shuffled = permutation(len(members), 0, "digits split", label)
        in_test[members[shuffled[: round(len(members) / 5)]]] = True
    train, test = (DecodedSplit(images[rows], targets[rows], classes) for rows in (~in_test, in_test))
    return train, test


DIGITS = Source("the handwritten digits", "nothing: they come with scikit-learn", "digits", read_digits)
