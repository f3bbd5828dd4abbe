"""Any data set of images and labels becomes a store."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from vrm.data import from_dataset
from vrm.data.datasets.cifar import CIFAR10_CLASSES

from ..layouts import ABC, TEST, encoded, pixels_of, sample


class Pairs:
    """A map-style data set that converts each image."""

    def __init__(self, convert, *, split=TEST, label=int):
        self.convert, self.split, self.label = convert, split, label

    def __len__(self):
        return len(self.split[1])

    def __getitem__(self, row):
        if row >= len(self):
            raise IndexError(row)
        return self.convert(self.split[0][row]), self.label(self.split[1][row])


@pytest.mark.parametrize(
    "convert",
    [
        lambda pixels: pixels,
        Image.fromarray,
        lambda pixels: Image.fromarray(pixels).convert("RGBA"),
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
    ],
)
@pytest.mark.parametrize("label", [int, np.int64, torch.tensor, np.array])
def test_any_data_set_becomes_a_store(convert, label):
    store = from_dataset(Pairs(convert, label=label))
    assert torch.equal(store.images, pixels_of(TEST))
    assert store.targets.tolist() == TEST[1]
    assert store.classes == tuple("0123456789")


@pytest.mark.parametrize(
    "convert",
    [
        lambda pixels: pixels[..., 0],
        lambda pixels: pixels[..., :1],
        lambda pixels: Image.fromarray(pixels[..., 0]),
        lambda pixels: torch.from_numpy(pixels)[None, ..., 0],
    ],
)
def test_grey_is_repeated(convert):
    assert torch.equal(from_dataset(Pairs(convert)).images, pixels_of(TEST)[:, :1].expand(-1, 3, -1, -1))


def test_a_data_set_of_torch_serves():
    store = from_dataset(TensorDataset(pixels_of(TEST), torch.tensor(TEST[1])), size=8)
    assert store.image_size == (8, 8)


def test_class_names_come_from_the_caller_or_the_data_set():
    named = Pairs(lambda pixels: pixels)
    named.classes = [f"class {i}" for i in range(10)]
    assert from_dataset(named).classes[3] == "class 3"
    assert from_dataset(named, classes=CIFAR10_CLASSES).classes == CIFAR10_CLASSES
    with pytest.raises(ValueError, match="class names repeat: 'a'"):
        from_dataset(named, classes=["a"] * 10)
    with pytest.raises(ValueError, match="image 3 has label 3, but the 3 classes"):
        from_dataset(named, classes=ABC)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (
            Pairs(lambda pixels: pixels / 255),
            "sample 0 of Pairs: pixels of type float64; expected uint8, before ToTensor",
        ),
        (Pairs(lambda pixels: pixels[..., :2]), r"pixels of shape \(32, 32, 2\)"),
        (Pairs(torch.from_numpy), r"pixels of shape \(32, 3, 32\)"),
        (Pairs(lambda pixels: torch.from_numpy(pixels[..., 0])), r"a tensor of shape \(32, 32\)"),
        (Pairs(lambda pixels: "a.png"), "an image of type str"),
        (Pairs(lambda pixels: pixels, label=lambda label: label + 0.5), "sample 0 has label 0.5; expected an integer"),
        (Pairs(lambda pixels: pixels, label=str), "sample 0 has label '0'"),
        (Pairs(lambda pixels: pixels, label=lambda label: label - 1), "image 0 has label -1"),
        (
            Pairs(lambda pixels: pixels, label=lambda label: label + 10**9),
            "sample 9 has label 1000000009; .* classes are",
        ),
        (Pairs(lambda pixels: pixels, label=lambda label: label + 2**63), "sample 0 has label 9223372036854775808"),
        (Pairs(lambda pixels: Image.open(io.BytesIO(encoded(pixels)[:99]))), "sample 0 of Pairs: OSError: .*truncated"),
        (Pairs(lambda pixels: {}["absent"]), r"sample 0 of Pairs: KeyError: 'absent'; expected \(image, label\)"),
        (Pairs(lambda pixels: pixels[: 5 + pixels[0, 0, 0] % 2]), "sample 1 of Pairs has shape .* give a size"),
        (Pairs(lambda pixels: pixels, split=sample(0)), "Pairs is empty"),
        ([TEST[0][0]], r"sample 0 of list: .*expected \(image, label\)"),
        (iter([]), "list_iterator is not a map-style data set"),
    ],
)
def test_what_is_no_data_set_of_images_and_labels_is_refused(dataset, words):
    with pytest.raises(ValueError, match=words):
        from_dataset(dataset)
