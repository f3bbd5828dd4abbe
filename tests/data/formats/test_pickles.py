"""CIFAR's pickles are read, and run nothing."""

import os
import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrm.data import load
from vrm.data.datasets.cifar import CIFAR10_CLASSES
from vrm.data.formats.pickles import read_cifar_pickles

from ..layouts import TEST, TRAIN, pixels_of, sample, write_pickles


def test_a_pickle_of_python_2_is_read(root):
    """The published files: raw text for bytes, numpy's old module names; here with Fortran order, too."""

    def text(content):
        return b"T" + struct.pack("<I", len(content)) + content

    def batch(pixels, labels, fortran):
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)
        raw = (rows.T if fortran else rows).tobytes()
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01"
        array += b"K" + bytes([len(labels)]) + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        array += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        array += (b"\x88" if fortran else b"\x89") + text(raw) + b"tb"
        numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
        return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."

    for i in range(1, 6):
        rows = slice(4 * i - 4, 4 * i)
        (root / f"data_batch_{i}").write_bytes(batch(TRAIN[0][rows], TRAIN[1][rows], fortran=i == 2))
    (root / "test_batch").write_bytes(batch(*TEST, fortran=False))
    data = load("cifar10", root=root)
    assert torch.equal(data.train.images, pixels_of(TRAIN))
    assert torch.equal(data.test.images, pixels_of(TEST))
    assert data.train.targets.tolist() == TRAIN[1]


class Evil:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("place", ["key", "data", "label", "whole", "array"])
def test_a_pickle_runs_nothing(root, place, protocol):
    write_pickles(root)
    sentinel = root / "sentinel"
    evil = Evil(os.mkdir, str(sentinel))
    content = {
        "key": {evil: 0},
        "data": {b"data": evil, b"labels": [0]},
        "label": {b"data": np.zeros((1, 3072), np.uint8), b"labels": [evil]},
        "whole": evil,
        "array": {b"data": np.array([evil], dtype=object), b"labels": [0]},
    }[place]
    pickled = pickle.dumps(content, protocol=protocol)
    (root / "data_batch_3").write_bytes(pickled)
    with pytest.raises(ValueError, match=r"data_batch_3 is not a CIFAR batch .* \(UnpicklingError: it asks for"):
        load("cifar10", root=root)
    assert not sentinel.exists()
    pickle.loads(pickled)  # what an unguarded reader does
    assert sentinel.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "os system", "numpy load", "numpy frombuffer", "_codecs decode",
             "_codecs encode.__globals__", "vrm.data.formats.pickles _encode"],
)  # fmt: skip
def test_a_pickle_may_name_nothing_but_array_parts(root, name):
    write_pickles(root)
    module, attribute = (bytes([len(part)]) + part.encode() for part in name.split())
    (root / "test_batch").write_bytes(b"\x80\x04\x8c" + module + b"\x8c" + attribute + b"\x93.")
    with pytest.raises(ValueError, match=f"it asks for {name.replace(' ', '.')}, which no CIFAR file needs; refused"):
        load("cifar10", root=root)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "EOFError"),
        (b"not a pickle", "UnpicklingError"),
        (pickle.dumps([1, 2]), "AttributeError"),
        (pickle.dumps({b"labels": [0]}), "'data'"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, 4), "2 images with 1 labels"),
        (pickle.dumps({b"data": np.zeros((1, 3071), np.uint8), b"labels": [0]}, 4), "reshape"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.int16), b"labels": [0]}, 4), "'i2'; images are rows of uint8"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0.5]}, 4), "label 0.5; expected an integer"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [1]}, 4), "KeyError: 'labels'"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, 4), "row 0: label 10, but 10 classes"),
    ],
)
def test_a_broken_pickle_is_named(root, content, words):
    write_pickles(root)
    (root / "data_batch_2").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_2.*({words})"):
        load("cifar10", root=root)


def test_a_missing_batch_is_named(root):
    write_pickles(root)
    (root / "data_batch_4").unlink()
    with pytest.raises(ValueError, match=r"root lacks data_batch_4; it must hold data_batch_1, "):
        load("cifar10", root=root)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_a_damaged_pickle_holds_it_is_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pickles(root, names=["train"], train=sample(1), test=sample(1))
        file = root / "train"
        content = bytearray(file.read_bytes())
        head = [*range(400), *range(len(content) - 200, len(content))]  # the rest are pixels
        for position in data.draw(st.lists(st.sampled_from(head), min_size=1, max_size=4)):
            content[position] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        refused = None
        try:
            read_cifar_pickles(
                root, folder="", train=["train"], test="test", label_key="labels", classes=CIFAR10_CLASSES
            )
        except ValueError as error:
            refused = str(error)
        assert refused is None or str(file) in refused
