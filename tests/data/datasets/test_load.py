"""Data sets by name: what is found, what is missing, and how it is told."""

import numpy as np
import pytest
import torch
from PIL import Image

from vrm.data import SOURCES, load
from vrm.data.datasets import fashion_mnist
from vrm.data.datasets.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES

from ..layouts import (
    TRAIN,
    hashes,
    pixels_of,
    sample,
    write_idx,
    write_parquet,
    write_parquets,
    write_pickles,
    write_tree,
)


def test_class_lists_are_the_published_ones():
    assert (len(CIFAR10_CLASSES), len(CIFAR100_CLASSES)) == (10, 100)
    for classes in (CIFAR10_CLASSES, CIFAR100_CLASSES):
        assert list(classes) == sorted(set(classes))
    assert [CIFAR100_CLASSES[i] for i in (0, 19, 50, 99)] == ["apple", "cattle", "mouse", "worm"]


def test_an_unknown_name_is_answered_with_the_near_one():
    with pytest.raises(ValueError, match=r"no data set 'cifar-100'; did you mean 'cifar100' or 'cifar10'\?$"):
        load("cifar-100")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "folder"])
def test_a_folder_is_asked_for(name):
    with pytest.raises(ValueError, match=rf"{name} needs data.root=FOLDER: .*train/CLASS/"):
        load(name)


def test_fashion_mnist_is_looked_for_where_debian_puts_it(root, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", root / "absent")
    with pytest.raises(ValueError, match=r"fashion-mnist needs data.root=FOLDER: .*dataset-fashion-mnist"):
        load("fashion-mnist")
    write_idx(root / "debian", zipped=True)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", root / "debian")
    assert len(load("fashion-mnist").train) == 20


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"digits"}))
def test_a_wrong_folder_is_told_with_what_was_expected(name, root):
    with pytest.raises(ValueError, match=r"root/nowhere does not exist; it must be the folder that holds"):
        load(name, root=root / "nowhere")
    (root / "some file").touch()
    with pytest.raises(ValueError, match="is a file"):
        load(name, root=root / "some file")
    (root / "other").mkdir()
    with pytest.raises(ValueError, match=r"no .* in .*root, which holds other/, some file; expected "):
        load(name, root=root)
    with pytest.raises(ValueError, match="which holds none; expected"):
        load(name, root=root / "other")


def test_digits_are_split_once_and_for_all():
    data = load("digits")
    assert (len(data.train), len(data.test), data.image_size, data.num_classes) == (1438, 359, (8, 8), 10)
    whole = data.train.targets.bincount() + data.test.targets.bincount()
    assert data.test.targets.bincount().tolist() == [round(count / 5) for count in whole.tolist()]
    assert torch.equal(data.train.images[:, 0], data.train.images[:, 2])
    # Frozen: whoever changes the split or the rounding changes every published number.
    assert data.train.hash == "bc4cd98aa6b8c866572499853bb1cd664d1eaf9fb00ed2a10ba1a038bda68e8c"
    assert data.test.hash == "b4ebcaacecb0cee3d850943e66bcfd40f2e5415270ef0e3281fcdbc9b6b63b48"


def test_digits_levels_are_rounded_halves_up():
    levels = np.arange(17)
    assert set(load("digits").train.images.flatten().tolist()) == set(np.floor(levels * 255 / 16 + 0.5).astype(int))


def test_digits_grow_and_shrink_on_request():
    native, large, few = load("digits"), load("digits", size=16), load("digits", labels_per_class=3)
    assert large.image_size == (16, 16)
    grey = Image.fromarray(native.test.images[5, 0].numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(large.test.images[5, 0].numpy(), np.asarray(grey))
    assert load("digits", size=8).train.hash == native.train.hash
    assert few.train.targets.bincount().tolist() == [3] * 10
    assert (few.mean, few.std, few.test.hash) == (native.mean, native.std, native.test.hash)
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        load("digits", size=0)


def test_digits_lie_in_no_folder(root):
    with pytest.raises(ValueError, match="scikit-learn; leave data"):
        load("digits", root=root)


def test_every_layout_of_cifar10_gives_the_same_pixels(root):
    write_pickles(root / "a" / "cifar-10-batches-py")
    write_parquets(root / "b", image="img", names=CIFAR10_CLASSES)
    write_parquets(root / "c" / "data", bare=True)
    write_tree(root / "d", test_name="val")
    a, unpacked, b, c, d = (
        load("cifar10", root=root / place) for place in ("a", "a/cifar-10-batches-py", "b", "c", "d")
    )
    assert hashes(a) == hashes(unpacked) == hashes(b) == hashes(c)
    assert torch.equal(a.train.images, pixels_of(TRAIN))
    assert a.train.targets.tolist() == TRAIN[1]
    by_class = torch.argsort(a.train.targets, stable=True)
    assert a.train.select(by_class).hash == d.train.hash
    assert (a.mean, a.std, a.view_policy) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "cifar")


def test_cifar100_reads_its_fine_labels(root):
    train, test = sample(100, classes=100), sample(100, classes=100, seed=1)
    write_pickles(root / "a", train=train, test=test, names=["train"], label_key=b"fine_labels")
    for split, part in (("train", train), ("test", test)):
        write_parquet(root / "b" / f"cifar100-{split}.parquet", part, label="fine_label", names=CIFAR100_CLASSES)
    a, b = load("cifar100", root=root / "a"), load("cifar100", root=str(root / "b"))
    assert hashes(a) == hashes(b)
    assert (a.classes, a.mean) == (CIFAR100_CLASSES, (0.5071, 0.4867, 0.4408))


def test_another_data_set_is_recognised(root):
    write_parquets(root / "unnamed")
    with pytest.raises(ValueError, match=r"no image of 90 of the 100 classes of CIFAR-100 \(bowl, boy, .*another"):
        load("cifar100", root=root / "unnamed")
    write_parquets(root / "named", names=CIFAR10_CLASSES)
    with pytest.raises(ValueError, match=r"'label' has 10 classes \(airplane, .*expected 100 \(apple,"):
        load("cifar100", root=root / "named")
    write_tree(root / "tree")
    with pytest.raises(ValueError, match=r"must hold the 100 classes apple, .*missing: apple, .*unknown: airplane,"):
        load("cifar100", root=root / "tree")


@pytest.mark.parametrize("layout", ["parquet", "tree"])
def test_cifar_images_are_32_pixels(root, layout):
    small = sample(10, side=31)
    if layout == "tree":
        write_tree(root, test=small)
    else:
        write_parquet(root / "train.parquet", TRAIN)
        write_parquet(root / "test.parquet", small)
    with pytest.raises(ValueError, match=r"(000\.png|test\.parquet, row 0) is 31x31 pixels, .* 32x32 .*=skip leaves"):
        load("cifar10", root=root, size=32)


@pytest.mark.parametrize(("key", "given"), [("num_workers", "workers=2"), ("bad_images", "bad_images=skip")])
def test_what_decodes_images_has_no_effect_on_plain_pixels(key, given):
    with pytest.warns(UserWarning, match=rf"data.{given} has no effect: .* plain pixels"):
        load("digits", **{key: 2 if key == "num_workers" else "skip"})
