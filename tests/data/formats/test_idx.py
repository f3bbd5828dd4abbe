"""IDX files are read, or the broken one is named."""

import gzip
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vrm.data import load
from vrm.data.formats.idx import read_idx

from ..layouts import TRAIN, idx_bytes, pixels_of, write_idx


@pytest.mark.parametrize(("below", "zipped"), [("", False), ("", True), ("FashionMNIST/raw", False), ("raw", True)])
def test_fashion_mnist_is_read(root, below, zipped):
    write_idx(root / below, zipped=zipped)
    data = load("fashion-mnist", root=root)
    assert torch.equal(data.train.images, pixels_of(TRAIN)[:, :1].expand(-1, 3, -1, -1))
    assert data.train.targets.tolist() == TRAIN[1]
    assert (len(data.test), data.classes[9]) == (10, "Ankle boot")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train-images-idx3-ubyte", b"", "begins with , expected 00000803: IDX, uint8, 3 axes"),
        ("train-images-idx3-ubyte", bytes((0, 0, 8, 3, 0)), "begins with 00000803"),
        ("train-images-idx3-ubyte", bytes((0, 0, 13, 3)) + bytes(12), "begins with 00000d03"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((10, 2, 2), np.uint8))[:-1], "40 bytes, but 39 follow"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((10, 2, 2), np.uint8)) + b"x", "40 bytes, but more follow"),
        ("t10k-images-idx3-ubyte", bytes((0, 0, 8, 3)) + b"\xff" * 12, "bytes; at most 2,147,483,648 are read"),
        ("t10k-images-idx3-ubyte", idx_bytes(np.zeros((9, 2, 2), np.uint8)), "9 images, but 10 labels"),
        ("t10k-labels-idx1-ubyte", idx_bytes(np.full(10, 10, np.uint8)), "row 0: label 10, but 10 classes"),
    ],
)
def test_a_broken_idx_file_is_named(root, name, content, words):
    write_idx(root)
    (root / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name.partition('-')[0]}.*{words}"):
        load("fashion-mnist", root=root)


def test_a_missing_or_broken_gzip_file_is_named(root):
    write_idx(root, zipped=True)
    file = root / "train-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    for content in (b"no gzip", whole[:-3], whole[:12] + b"\xff\xff" + whole[14:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz is not a whole gzip file .* get it again"):
            load("fashion-mnist", root=root)
    file.write_bytes(gzip.compress(gzip.decompress(whole) + bytes(1 << 26)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="bytes, but more follow"):
        load("fashion-mnist", root=root)
    assert tracemalloc.get_traced_memory()[1] < 1 << 25, "it is not unpacked"
    tracemalloc.stop()
    file.unlink()
    with pytest.raises(ValueError, match=r"root lacks train-labels-idx1-ubyte \(or the same with .gz\)"):
        load("fashion-mnist", root=root)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_a_damaged_idx_file_holds_it_is_read_or_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_idx(root)
        file = root / "t10k-labels-idx1-ubyte"
        content = bytearray(file.read_bytes())
        for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
            content[position] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        refused = None
        try:
            read_idx(root, folders=(), classes=tuple("0123456789"))
        except ValueError as error:
            refused = str(error)
        assert refused is None or "t10k-" in refused
