"""Parquet files are read, or the broken one is named."""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vrm.data import load

from ..layouts import TEST, TRAIN, encoded, pixels_of, sample, write_parquet, write_parquets


def test_shards_are_joined_in_order_and_must_be_complete(root):
    first, second = ((TRAIN[0][part], TRAIN[1][part]) for part in (slice(0, 12), slice(12, 20)))
    write_parquet(root / "train-00001-of-00002.parquet", second)
    write_parquet(root / "test-00000-of-00001.parquet", TEST)
    with pytest.raises(ValueError, match=r"holds train-00001-of-00002.parquet: not the whole .* 00000 to 00001"):
        load("cifar10", root=root)
    write_parquet(root / "train-00000-of-00002.parquet", first)
    assert torch.equal(load("cifar10", root=root).train.images, pixels_of(TRAIN))
    write_parquet(root / "train-00000-of-00001.parquet", TRAIN)
    with pytest.raises(ValueError, match="not the whole of one set of files"):
        load("cifar10", root=root)


def test_validation_stands_in_for_a_missing_test_split(root):
    write_parquet(root / "train.parquet", TRAIN)
    with pytest.raises(ValueError, match=r"no parquet file of the test split; it holds train.parquet, expected test"):
        load("cifar10", root=root)
    write_parquet(root / "validation.parquet", TEST)
    write_parquet(root / "unrelated.parquet", sample(3))
    assert torch.equal(load("cifar10", root=root).test.images, pixels_of(TEST))


def test_parquet_in_two_folders_is_ambiguous(root):
    write_parquets(root / "one")
    write_parquets(root / "two")
    with pytest.raises(ValueError, match=r"several folders \(.*one, .*two\); name one of them"):
        load("cifar10", root=root)


def test_a_file_that_is_not_parquet_is_named(root):
    write_parquets(root)
    file = root / "test-00000-of-00001.parquet"
    whole = file.read_bytes()
    for content in (b"", b"PAR1 but nothing else", whole[: len(whole) // 2], whole[:-9] + b"x" + whole[-8:]):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"test-00000-of-00001.parquet is not a readable parquet file .* get it again"
        ):
            load("cifar10", root=root)


@pytest.mark.parametrize("metadata", [b"no JSON", b"\xff", b"[]", b'{"info": 1}'])
def test_broken_metadata_are_named(root, metadata):
    write_parquets(root)
    table = pa.table({"image": [encoded(TEST[0][0])], "label": [0]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, root / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet is not a readable parquet file"):
        load("cifar10", root=root)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"picture": [b"x"], "label": [0]}, "no column 'image' or 'img'; its columns are picture, label"),
        ({"image": [b"x"], "fine_label": [0]}, "no column 'label'; its columns are image, fine_label"),
        ({"image": [b"x"], "label": ["cat"]}, "column 'label' holds string, expected integers"),
        ({"image": [b"x", b"x"], "label": [0, None]}, "row 1: label None"),
        ({"image": [b"x", b"x"], "label": [[0], [0, 1]]}, r"row 1: label \[0, 1\]; expected an integer"),
        ({"image": [b"x"], "label": [[0.5]]}, "column 'label' holds list<.*: double>, expected integers"),
        ({"image": [b"x", b"x"], "label": [9, 10]}, "row 1: label 10, but 10 classes are numbered 0 to 9"),
        ({"image": [b"x", b"x"], "label": [9, -1]}, "row 1: label -1"),
        ({"image": ["a.png"], "label": [0]}, "row 0: column 'image' holds string without image bytes"),
        ({"image": [{"path": "a.png"}], "label": [0]}, r"row 0: column 'image' holds struct<path: string> without"),
        ({"image": [{"bytes": b"x"}, {"bytes": None}], "label": [0, 0]}, "row 1: column 'image'"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "no rows, expected images"),
    ],
)
def test_a_table_of_another_form_is_refused(root, table, words):
    write_parquets(root)
    pq.write_table(pa.table(table), root / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=rf"train-00000-of-00001\.parquet.*{words}"):
        load("cifar10", root=root)


def test_labels_may_be_lists_of_one(root):
    write_parquets(root)
    expected = load("cifar10", root=root).train.hash
    write_parquet(root / "train-00000-of-00001.parquet", (TRAIN[0], [[label] for label in TRAIN[1]]))
    assert load("cifar10", root=root).train.hash == expected


def test_without_pyarrow_the_command_is_given(root, monkeypatch):
    write_parquets(root)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'vrm\[parquet\]'"):
        load("cifar10", root=root)
