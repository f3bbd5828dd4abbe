"""Small data sets in every layout, written for the tests."""

import gzip
import io
import json
import pickle
import random
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from vrm.data.datasets.cifar import CIFAR10_CLASSES


def sample(count, *, side=32, classes=10, seed=0):
    """Random pixels (N, H, W, 3) and labels that cover the classes in turn."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8), [i % classes for i in range(count)]


TRAIN, TEST = sample(20), sample(10, seed=1)


def encoded(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_pickles(root, *, label_key=b"labels", train=TRAIN, test=TEST, names=None):
    names = names or [f"data_batch_{i}" for i in range(1, 6)]
    root.mkdir(parents=True, exist_ok=True)
    parts = zip(np.array_split(np.arange(len(train[1])), len(names)), names, strict=True)
    batches = {name: (train[0][rows], [train[1][row] for row in rows]) for rows, name in parts}
    batches["test_batch" if len(names) > 1 else "test"] = test
    for name, (pixels, labels) in batches.items():
        rows = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(labels), -1)
        (root / name).write_bytes(pickle.dumps({b"data": rows, label_key: labels, b"filenames": ["x"]}, protocol=2))


def write_parquet(file, split, *, image="image", label="label", names=None, bare=False):
    blobs = [encoded(pixels) for pixels in split[0]]
    column = blobs if bare else [{"bytes": blob, "path": None} for blob in blobs]
    table = pa.table({image: column, label: split[1]})
    if names is not None:
        info = {"info": {"features": {label: {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def write_parquets(root, **options):
    write_parquet(root / "train-00000-of-00001.parquet", TRAIN, **options)
    write_parquet(root / "test-00000-of-00001.parquet", TEST, **options)


def write_tree(root, *, train=TRAIN, test=TEST, classes=CIFAR10_CLASSES, test_name="test", shuffle=None):
    jobs = [
        (root / split / classes[label] / f"{row:03d}.png", pixels)
        for split, (images, labels) in (("train", train), (test_name, test))
        for row, (pixels, label) in enumerate(zip(images, labels, strict=True))
    ]
    if shuffle is not None:
        random.Random(shuffle).shuffle(jobs)
    for file, pixels in jobs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels))


def idx_bytes(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(root, *, zipped=False):
    root.mkdir(parents=True, exist_ok=True)
    for split, (pixels, labels) in (("train", TRAIN), ("t10k", TEST)):
        for name, array in (("images-idx3", pixels[..., 0]), ("labels-idx1", np.array(labels, dtype=np.uint8))):
            content = idx_bytes(array)
            file = root / f"{split}-{name}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(content) if zipped else content)


def hashes(data):
    return data.train.hash, data.test.hash


def pixels_of(split):
    return torch.from_numpy(split[0]).permute(0, 3, 1, 2)


ABC = ("a", "b", "c")


def write_abc(root, *, side=6, **options):
    write_tree(
        root, train=sample(9, side=side, classes=3), test=sample(3, side=side, classes=3), classes=ABC, **options
    )
