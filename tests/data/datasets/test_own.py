"""Any data set of images and labels becomes a store."""

import io
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from vrm.data import from_dataset
from vrm.data.datasets.cifar import CIFAR10_CLASSES
from vrm.data.stores.memory import ImageStore

from ..layouts import ABC, TEST, encoded, pixels_of, sample


def to_tensor(pixels):
    """Convert as torchvision's ToTensor does."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255)


def convert_by_way(image, mode):
    """Convert to a mode, by way of another where Pillow has no direct way."""
    ways = {"La": "LA", "PA": "P", "RGBa": "RGBA", "HSV": "RGB", "YCbCr": "RGB", "CMYK": "RGB"}
    return (image.convert(ways[mode]) if mode in ways else image).convert(mode)


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
        torch.from_numpy,
        lambda pixels: pixels.transpose(2, 0, 1),
        lambda pixels: np.concatenate([pixels, pixels[..., :1]], axis=2),
        lambda pixels: pixels.astype(np.int64),
        lambda pixels: pixels.astype(np.uint16) * 257,
        encoded,
        lambda pixels: {"bytes": encoded(pixels), "path": None},
        to_tensor,
        lambda pixels: to_tensor(pixels).double(),
        lambda pixels: to_tensor(pixels).half(),
        lambda pixels: to_tensor(pixels).numpy(),
        lambda pixels: pixels / 255,
        lambda pixels: pixels * (1 / 255),
        lambda pixels: pixels.astype(np.float32),
    ],
)
def test_any_image_becomes_bytes(convert):
    store = from_dataset(Pairs(convert))
    assert torch.equal(store.images, pixels_of(TEST))
    assert store.classes == tuple("0123456789")


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"]
)
def test_images_of_pillow_are_taken_in_every_mode(mode):
    grey = Image.new("L", (4, 4))
    grey.putdata([0, 255] * 8)
    image = {"LAB": lambda: Image.new("LAB", (4, 4), (50, 128, 128)), "I;16": lambda: Image.new("I;16", (4, 4), 65535)}
    found = from_dataset([(image[mode]() if mode in image else convert_by_way(grey, mode), 0)])
    expected = image[mode]() if mode in image else grey
    assert found.images.shape == (1, 3, 4, 4)
    if mode == "I;16":
        assert (found.images == 255).all()
    elif mode == "LAB":
        assert expected.mode == "LAB"
        assert len(set(found.images[0, :, 0, 0].tolist())) == 1
    elif mode == "I":
        assert found.images.unique().tolist() == [0, 1], "levels of 16 bits"
    else:
        assert torch.equal(found.images, from_dataset([(grey, 0)]).images)


@pytest.mark.parametrize(
    "label",
    [
        np.int64,
        np.uint8,
        torch.tensor,
        np.array,
        lambda label: np.array([label], np.uint8),
        lambda label: np.array([[label]]),
        lambda label: torch.tensor([label]),
        lambda label: [label],
        lambda label: (np.array([label]),),
        lambda label: torch.tensor([[label]], dtype=torch.uint8),
    ],
)
def test_a_label_may_be_in_any_container_of_one(label):
    assert from_dataset(Pairs(lambda pixels: pixels, label=label)).targets.tolist() == TEST[1]


def test_labels_of_a_store_may_be_a_column():
    images = pixels_of(TEST).contiguous()
    plain = ImageStore(images, torch.tensor(TEST[1]), CIFAR10_CLASSES)
    for targets in (torch.tensor(TEST[1])[:, None], torch.tensor(TEST[1]).int(), np.array(TEST[1])[:, None], TEST[1]):
        assert ImageStore(images, targets, CIFAR10_CLASSES).hash == plain.hash


class Named:
    """What Hugging Face's data sets keep of a label."""

    names: ClassVar = list(CIFAR10_CLASSES)


class Dicts(list):
    """Rows as Hugging Face's data sets have them."""

    features: ClassVar = {"img": None, "fine_label": Named()}


def rows(image, label, **others):
    return [{image: pixels, label: number, **others} for pixels, number in zip(*TEST, strict=True)]


@pytest.mark.parametrize(
    ("image", "label"), [("image", "label"), ("img", "fine_label"), ("pixel_values", "labels"), ("jpg", "cls")]
)
def test_rows_may_be_dicts(image, label):
    store = from_dataset(rows(image, label, coarse_label=1, other="x"))
    assert torch.equal(store.images, pixels_of(TEST))
    assert store.targets.tolist() == TEST[1]
    assert from_dataset(Dicts(rows("img", "fine_label"))).classes == CIFAR10_CLASSES


def test_keys_of_rows_can_be_given():
    store = from_dataset(rows("x", "y"), image_key="x", label_key="y")
    assert store.targets.tolist() == TEST[1]
    both = rows("image", "label", fine_label=0)
    assert from_dataset(both, label_key="label").targets.tolist() == TEST[1]
    assert from_dataset(both, label_key="fine_label").targets.tolist() == [0] * 10
    for dataset, keys, words in (
        (both, {}, "the row has both 'label' and 'fine_label'; say by label_key= which is the label"),
        (rows("x", "label"), {}, "the row has the keys 'x', 'label'; say by image_key= which is the image"),
        (both, {"image_key": "imag"}, "image_key='imag' is no key of this row; did you mean 'image'"),
        (Pairs(lambda pixels: pixels), {"label_key": "y"}, "name the keys of dicts, but this is a tuple"),
        ({"train": both, "test": both}, {}, r"dict has the keys 'train', 'test' .*from_dataset\(splits\['train'\]\)"),
    ):
        with pytest.raises(ValueError, match=words):
            from_dataset(dataset, **keys)


def test_a_data_set_of_hugging_face_serves():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CIFAR10_CLASSES))})
    content = {"img": [Image.fromarray(pixels) for pixels in TEST[0]], "label": TEST[1]}
    dataset = datasets.Dataset.from_dict(content, features=features)
    for form in (
        dataset,
        dataset.with_format("torch"),
        dataset.with_format("numpy"),
        dataset.cast_column("img", datasets.Image(decode=False)),
    ):
        store = from_dataset(form)
        assert torch.equal(store.images, pixels_of(TEST))
        assert (store.targets.tolist(), store.classes) == (TEST[1], CIFAR10_CLASSES)


def test_other_floats_are_kept_as_they_are():
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], 0.25
    normalised = Pairs(lambda pixels: (to_tensor(pixels) - mean) / std)
    with pytest.warns(
        UserWarning, match=r"images of Pairs are floats from -2 to 2\.8 that are not all multiples of 1/255"
    ):
        store = from_dataset(normalised)
    assert store.dtype == torch.float32
    assert torch.equal(store.images, (pixels_of(TEST).float() / 255 - mean) / std)
    assert store.num_bytes == 4 * from_dataset(Pairs(lambda pixels: pixels)).num_bytes
    # One image that bytes cannot hold keeps all of them floats, those before it too.
    last = Pairs(lambda pixels: to_tensor(pixels) * (1 if (pixels != TEST[0][9]).any() else 0.7))
    with pytest.warns(UserWarning, match="floats from 0 to 1 "):
        store = from_dataset(last)
    assert torch.equal(store.images[:9], pixels_of(TEST)[:9].float() / 255)
    with pytest.warns(UserWarning, match="floats"):
        small = from_dataset(last, size=8)
    assert (small.image_size, small.dtype) == ((8, 8), torch.float32)
    whole = from_dataset(Pairs(lambda pixels: pixels), size=8)
    assert torch.allclose(small.images[:9], whole.images[:9].float() / 255, atol=1 / 255)


@pytest.mark.parametrize(
    "convert",
    [
        lambda pixels: pixels[..., 0],
        lambda pixels: pixels[..., :1],
        lambda pixels: Image.fromarray(pixels[..., 0]),
        lambda pixels: torch.from_numpy(pixels)[None, ..., 0],
        lambda pixels: torch.from_numpy(pixels[..., 0]),
        lambda pixels: torch.from_numpy(pixels[..., 0])[None] / 255,
    ],
)
def test_grey_is_repeated(convert):
    assert torch.equal(from_dataset(Pairs(convert)).images, pixels_of(TEST)[:, :1].expand(-1, 3, -1, -1))


def test_a_data_set_of_torch_serves():
    store = from_dataset(TensorDataset(pixels_of(TEST), torch.tensor(TEST[1])[:, None]), size=8)
    assert store.image_size == (8, 8)


def test_class_names_come_from_the_caller_or_the_data_set():
    named = Pairs(lambda pixels: pixels)
    named.classes = [f"class {i}" for i in range(10)]
    assert from_dataset(named).classes[3] == "class 3"
    assert from_dataset(named, classes=CIFAR10_CLASSES).classes == CIFAR10_CLASSES
    with pytest.raises(ValueError, match="class names repeat: 'a'"):
        from_dataset(named, classes=["a"] * 10)
    with pytest.raises(ValueError, match="image 3 has label 3, but there are 3 classes"):
        from_dataset(named, classes=ABC)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Pairs(lambda pixels: pixels * np.nan), "sample 0 of Pairs: its pixels hold NaN or infinity"),
        (Pairs(lambda pixels: pixels.astype(np.int16) - 1), "pixels of type int16 from -1 to .* bytes go from 0"),
        (Pairs(lambda pixels: pixels * 1j), "pixels of type complex128; expected bytes or floats"),
        (Pairs(lambda pixels: {"bytes": b"no image", "path": None}), "no readable image .* begins with b'no image'"),
        (Pairs(lambda pixels: pixels[:0]), r"pixels of shape \(0, 32, 3\)"),
        (Pairs(lambda pixels: pixels[..., :2]), r"pixels of shape \(32, 32, 2\)"),
        (Pairs(lambda pixels: pixels[None]), r"pixels of shape \(1, 32, 32, 3\)"),
        (Pairs(lambda pixels: pixels, label=lambda label: np.array([1, 0, label])), "sample 0 has label array"),
        (Pairs(lambda pixels: "a.png"), "an image of type str"),
        (
            Pairs(lambda pixels: pixels, label=lambda label: label + 0.5),
            "sample 0 has label 0.5; expected an integer, alone or in",
        ),
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
