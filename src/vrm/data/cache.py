"""Decoded data sets on disk, named by the content of the files they were made of.

The folder is ``VRM_CACHE``, or ``~/.cache/vrm``. Anything in it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vrm.data.store import ImageStore, Stores

_VERSION = 1  # counted up whenever the same files decode to other pixels or another order


def cache_folder() -> Path:
    """Where decoded data sets are kept."""
    return Path(os.environ.get("VRM_CACHE") or Path.home() / ".cache" / "vrm").expanduser()


def content_key(folder: Path, files: Iterable[Path], **settings: object) -> str:
    """SHA-256 of the names (within ``folder``), sizes and contents of ``files``, and of ``settings``."""
    digest = hashlib.sha256(json.dumps([_VERSION, settings], sort_keys=True).encode())
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256")
            digest.update(json.dumps([name, stream.tell(), content.hexdigest()]).encode())
    return digest.hexdigest()


def cached(name: str, key: str, build: Callable[[], Stores]) -> Stores:
    """The stores kept under ``key``, or built now and kept.

    A damaged file is built again, and a folder that cannot be written is done without; both with a warning.
    """
    file = cache_folder() / f"{name}-{key[:32]}.safetensors"
    if file.exists():
        try:
            return _read(file)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"the cached data in {file} cannot be used ({error}) and are made again", stacklevel=2)
    stores = build()
    try:
        _write(file, *stores)
    except (SafetensorError, OSError) as error:
        warnings.warn(
            f"decoded data cannot be kept in {file.parent} ({error}), they will be decoded again at the next start; "
            "name another folder in VRM_CACHE",
            stacklevel=2,
        )
    return stores


def _read(file: Path) -> Stores:
    with safe_open(file, framework="pt") as tensors:
        told = json.loads(tensors.metadata()["vrm"])
        # Copies: what safetensors gives may be the mapped file itself.
        train, test = (
            ImageStore(
                tensors.get_tensor(f"{split}.images").clone(),
                tensors.get_tensor(f"{split}.targets").clone(),
                tuple(told["classes"]),
            )
            for split in ("train", "test")
        )
    if [train.hash, test.hash] != told["hashes"]:
        raise ValueError("their checksum differs")
    return train, test


def _write(file: Path, train: ImageStore, test: ImageStore) -> None:
    """Write beside, flush to disk, rename: the file is whole or not there."""
    told = {"classes": train.classes, "hashes": [train.hash, test.hash]}
    tensors = {
        f"{split}.{part}": getattr(store, part)
        for split, store in (("train", train), ("test", test))
        for part in ("images", "targets")
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".partial-") as partial:
        written = Path(partial) / file.name
        save_file(tensors, written, metadata={"vrm": json.dumps(told, sort_keys=True)})
        _flush(written)
        os.replace(written, file)
    _flush(file.parent)


def _flush(path: Path) -> None:
    """See to it that a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
