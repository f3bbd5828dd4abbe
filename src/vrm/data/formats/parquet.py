"""Parquet files as Hugging Face publishes data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from vrm.data.formats.layout import EncodedFiles, EncodedSplit, check_labels, names_in_words, shown, to_label, visible

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


def find_parquet(root: Path, *, label_columns: Sequence[str], classes: tuple[str, ...]) -> EncodedFiles | None:
    """Find parquet files in ``root`` or in one folder below it.

    A file's split is a word in its name (``train-00000-of-00002.parquet``, ``test..``; ``validation..`` or ``val..``
    if there is no ``test..``); other files are ignored. Images are in the column ``image`` or ``img``, as bytes or as a
    struct with ``bytes``; labels are in the first of ``label_columns`` that exists.
    """
    found = [
        (folder, parquet)
        for folder in (root, *(path for path in visible(root) if path.is_dir()))
        if (parquet := [path for path in visible(folder) if path.suffix == ".parquet" and path.is_file()])
    ]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"parquet files lie in several folders ({', '.join(str(f) for f, _ in found)}); name one of them"
        )
    folder, parquet = found[0]
    train, test = _files_of_split(parquet, ("train",)), _files_of_split(parquet, ("test",))
    test = test or _files_of_split(parquet, ("validation", "valid", "val"))
    for split, files in (("train", train), ("test", test)):
        if not files:
            raise ValueError(
                f"{folder} has no parquet file of the {split} split; it holds {', '.join(p.name for p in parquet)}, "
                f"expected {split}*.parquet"
            )
        _check_shards(folder, files)

    def read() -> tuple[EncodedSplit, EncodedSplit]:
        return _read_parquet(train, label_columns, classes), _read_parquet(test, label_columns, classes)

    return EncodedFiles(folder, (*train, *test), read)


def _files_of_split(files: Sequence[Path], words: Sequence[str]) -> list[Path]:
    return [file for file in files if set(words) & set(re.split("[^a-z]+", file.stem.lower()))]


def _check_shards(folder: Path, files: Sequence[Path]) -> None:
    shards = {(int(m[1]), int(m[2])) for file in files if (m := _SHARD.search(file.name))}
    totals = {total for _, total in shards}
    if totals and (
        len(totals) > 1 or len(shards) != len(files) or shards != {(i, max(totals)) for i in range(max(totals))}
    ):
        raise ValueError(
            f"{folder} holds {', '.join(file.name for file in files)}: not the whole of one set of files; "
            f"expected numbers 00000 to {max(totals) - 1:05d} of {max(totals):05d}, each once"
        )


def _read_parquet(files: Sequence[Path], label_columns: Sequence[str], classes: tuple[str, ...]) -> EncodedSplit:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {files[0]} needs pyarrow: pip install 'vrm[parquet]'") from error
    images: list[bytes] = []
    origins: list[str] = []
    targets: list[int] = []
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                table = parquet.read()
            metadata = table.schema.metadata or {}
            features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
            named = {column: feature.get("names") for column, feature in features.items()}
        except Exception as error:  # a broken file may raise anything
            raise ValueError(f"{file} is not a readable parquet file ({str(error).strip()}); get it again") from error
        image = _column(file, table.column_names, ("image", "img"))
        label = _column(file, table.column_names, label_columns)
        if named.get(label) and tuple(named[label]) != classes:
            raise ValueError(
                f"{file}: column {label!r} has {len(named[label])} classes ({names_in_words(named[label])}), expected "
                f"{len(classes)} ({names_in_words(classes)}); is this another data set?"
            )
        kind = table.schema.field(image).type
        if pyarrow.types.is_struct(kind) and (child := kind.get_field_index("bytes")) >= 0:
            chunks = [chunk.flatten()[child] for chunk in table[image].chunks]
        else:
            chunks = table[image].chunks
        encoded = [item for chunk in chunks for item in chunk.to_pylist()]
        type_of_labels = table.schema.field(label).type
        if not pyarrow.types.is_integer(getattr(type_of_labels, "value_type", type_of_labels)):
            raise ValueError(f"{file}: column {label!r} holds {type_of_labels}, expected integers")
        for row, item in enumerate(encoded):
            if not isinstance(item, bytes):
                raise ValueError(
                    f"{file}, row {row}: column {image!r} holds {kind} without image bytes; expected the encoded "
                    "image itself, not a path to it"
                )
        labels = table[label].to_pylist()
        if not pyarrow.types.is_integer(type_of_labels):  # lists
            labels = [_only(file, row, item) for row, item in enumerate(labels)]
        check_labels(labels, len(classes), file)
        images += encoded
        targets += labels
        origins += [f"{shown(file)}, row {row}" for row in range(len(encoded))]
    if not images:
        raise ValueError(f"{', '.join(map(str, files))}: no rows, expected images")
    return EncodedSplit(images, origins, targets, classes)


def _only(file: Path, row: int, item: object) -> int:
    try:
        return to_label(item)
    except ValueError as error:
        raise ValueError(f"{file}, row {row}: {error}") from None


def _column(file: Path, columns: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in columns:
            return name
    raise ValueError(f"{file} has no column {' or '.join(map(repr, wanted))}; its columns are {', '.join(columns)}")
