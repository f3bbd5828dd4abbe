"""Class folders: classes, order, and what is refused."""

import contextlib
import os
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vrm.data import load
from vrm.data.formats import images
from vrm.runs.checks.data import check_data

from ..layouts import (
    encoded,
    hashes,
    pixels_of,
    sample,
    write_abc,
    write_tree,
)


def test_class_folders_with_any_names(root):
    names = ("Ж β", "a b", "b'")
    write_tree(root, train=sample(6, classes=3), test=sample(3, classes=3), classes=names)
    data = load("folder", root=root)
    assert data.classes == ("a b", "b'", "Ж β")
    assert data.test.targets.tolist() == [0, 1, 2]
    assert torch.equal(data.test.images, pixels_of(sample(3, classes=3))[[1, 2, 0]])
    assert data.mean != (0.5071, 0.4867, 0.4408)


def test_class_names_are_equal_in_every_unicode_form(root):
    train, test = sample(2, classes=2), sample(2, classes=2)
    write_tree(root / "one", train=train, test=test, classes=(unicodedata.normalize("NFD", "é"), "x"))
    (root / "one" / "train").rename(root / "train")
    write_tree(root / "two", train=train, test=test, classes=(unicodedata.normalize("NFC", "é"), "x"))
    (root / "two" / "test").rename(root / "test")
    assert load("folder", root=root).classes == ("x", unicodedata.normalize("NFC", "é"))
    (root / "two" / "train" / unicodedata.normalize("NFC", "é")).rename(
        root / "train" / unicodedata.normalize("NFC", "é")
    )
    with pytest.raises(ValueError, match="two folders whose names are both 'é'; join them"):
        load("folder", root=root)


def test_loading_depends_neither_on_the_file_system_nor_on_the_workers(root, monkeypatch):
    monkeypatch.setattr(images, "_CHUNK", 2)
    write_abc(root / "one", shuffle=1)
    write_abc(root / "two", shuffle=2)
    expected = hashes(load("folder", root=root / "one", num_workers=1))
    listing, scandir = Path.iterdir, os.scandir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(listing(self))))
    monkeypatch.setattr(os, "scandir", lambda path: contextlib.nullcontext(reversed(list(scandir(path)))))
    for number, num_workers in enumerate((None, 1, 2, 7)):
        monkeypatch.setenv("VRM_CACHE", str(root / f"cache {number}"))
        assert hashes(load("folder", root=root / "two", num_workers=num_workers)) == expected


def test_progress_is_told(root, monkeypatch):
    monkeypatch.setattr(images, "_CHUNK", 5)
    write_abc(root)
    told = []
    load("folder", root=root, progress=lambda done, total: told.append((done, total)))
    assert told == [(5, 12), (10, 12), (12, 12)]


def test_what_is_hidden_or_no_image_is_left_out(root):
    write_abc(root)
    expected = hashes(load("folder", root=root))
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "a" / ".ipynb_checkpoints").mkdir()
    for name in (".hidden/x.png", "a/.x.png", "a/.ipynb_checkpoints/x.png"):
        (root / "train" / name).write_bytes(b"no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hashes(load("folder", root=root)) == expected
    (root / "train" / "a" / "notes.txt").touch()
    (root / "train" / "labels.csv").touch()
    with pytest.warns(UserWarning, match=r"2 files in .*train left out for not being images, such as .*labels\.csv"):
        assert hashes(load("folder", root=root)) == expected


def test_images_may_lie_deeper_and_bear_any_suffix(root):
    write_abc(root)
    expected = hashes(load("folder", root=root))
    (root / "train" / "a" / "images").mkdir()
    for file in sorted((root / "train" / "a").glob("*.png")):
        file.rename(root / "train" / "a" / "images" / (file.stem + ".JPEG"))
    assert hashes(load("folder", root=root)) == expected


def test_incomplete_trees_are_refused(root):
    write_abc(root)
    (root / "test").rename(root / "elsewhere")
    with pytest.raises(ValueError, match=r"has no folder test \(or val\); expected train/CLASS"):
        load("folder", root=root)
    (root / "elsewhere").rename(root / "valid")
    load("folder", root=root)
    (root / "train").rename(root / "elsewhere")
    with pytest.raises(ValueError, match="has no folder train;"):
        load("folder", root=root)
    (root / "train").mkdir()
    with pytest.raises(ValueError, match=r"train holds no class folder; expected train/CLASS"):
        load("folder", root=root)


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "testing"), ("training", "validation"), ("Training", "Testing"), ("TRAIN", "VAL"), ("train", "valid")],
)
def test_every_usual_layout_is_found_and_told(root, train, test):
    write_abc(root / "usual")
    expected = hashes(load("folder", root=root / "usual"))
    write_abc(root / "other", test_name=test)
    (root / "other" / "train").rename(root / "other" / train)
    data = load("folder", root=root / "other")
    assert hashes(data) == expected
    assert data.origin == f"trained on {train}/ and evaluated on {test}/ of {root / 'other'}"


@pytest.mark.parametrize("place", ["test", "test/unknown"])
def test_a_test_folder_without_labels_gives_way_to_a_labelled_one(root, place):
    write_abc(root, test_name="val")
    expected = hashes(load("folder", root=root))
    (root / place).mkdir(parents=True)
    (root / place / "0.png").write_bytes(encoded(sample(1, side=6)[0][0]))
    data = load("folder", root=root)
    assert hashes(data) == expected
    assert data.origin == f"trained on train/ and evaluated on val/ of {root}; not used: test/"


def test_of_two_labelled_folders_the_one_left_out_is_told(root):
    write_abc(root)
    write_abc(root, test_name="val")
    assert load("folder", root=root).origin.endswith(f"evaluated on test/ of {root}; not used: val/")


def test_class_folders_that_are_not_split_are_told_what_to_do(root):
    write_abc(root)
    with pytest.raises(ValueError, match=r"holds class folders \(a, b, c\), but no folders train and test; move them"):
        load("folder", root=root / "train")
    (root / "deeper").mkdir()
    for name in ("train", "test"):
        (root / name).rename(root / "deeper" / name)
    with pytest.raises(ValueError, match=r"further down; give data\.root=.*/deeper$"):
        load("folder", root=root)


def test_endings_are_taken_in_any_letters(root):
    write_abc(root)
    expected = hashes(load("folder", root=root))
    endings = ["JPEG", "Jpg", "JPG", "jfif", "PNG", "TIFF", "WebP"]
    for number, file in enumerate(sorted(root.glob("*/*/*.png"))):
        file.rename(file.with_suffix(f".{endings[number % len(endings)]}"))
    assert hashes(load("folder", root=root)) == expected


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_the_test_split_may_lack_a_class(root, folder):
    write_abc(root)
    (root / "test" / "b" / "001.png").unlink()
    if folder == "absent":
        (root / "test" / "b").rmdir()
    data = load("folder", root=root)
    assert (data.classes, data.test.classes) == (("a", "b", "c"),) * 2
    assert data.test.targets.tolist() == [0, 2]
    assert check_data(data)[1].detail.endswith("; no image of 1 class (b)")
    for name in ("a/000.png", "c/002.png"):
        (root / "test" / name).unlink()
    with pytest.raises(ValueError, match=r"test holds no image \("):
        load("folder", root=root)


def test_a_class_is_learnt_from_images_alone(root):
    write_abc(root)
    for file in sorted((root / "train" / "b").glob("*.png")):
        file.unlink()
    with pytest.raises(ValueError, match=r"train/b holds no image .*; add images to learn the class from, or remove"):
        load("folder", root=root)
    (root / "train" / "b").rmdir()
    with pytest.raises(ValueError, match=r"in train: none; only in test: b; .* nothing is learnt of a class without"):
        load("folder", root=root)


def test_both_splits_must_have_the_same_classes(root):
    write_abc(root)
    (root / "test" / "c").rename(root / "test" / "d")
    with pytest.raises(ValueError, match="only in train: c; only in test: d; give each class a folder of this"):
        load("folder", root=root)


def test_images_of_several_sizes_need_a_size(root):
    write_abc(root)
    odd = sample(1, side=9)[0][0][:, :7]
    (root / "test" / "b" / "001.png").write_bytes(encoded(odd))
    with pytest.raises(ValueError, match=r"test/b/001\.png is 9x7 pixels, but all .* 6x6 .*like .*data\.size=N"):
        load("folder", root=root)
    data = load("folder", root=root, size=6)
    fitted = np.asarray(Image.fromarray(odd).resize((6, 8), Image.Resampling.BILINEAR))[1:7]
    assert np.array_equal(data.test.images[1].permute(1, 2, 0), fitted)
    assert load("folder", root=root, size=5).image_size == (5, 5)
