"""A cache of decoded images on disk, keyed by the content of the files they were decoded from.

The folder is ``VRM_CACHE``, or ``~/.cache/vrm``. Anything in it may be deleted at any time. Files are replaced at once,
by one process at a time; decoded pixels carry their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vrm.data.formats.layout import fingerprint
from vrm.data.stores.memory import ImageStore
from vrm.files import Locked, locked, make_folder, read_json, remove_remains, replacing, write_json

T = TypeVar("T")

BadRows = tuple[dict[int, str], dict[int, str]]
"""The bad rows of train and of test, each with the reason."""

_VERSION = 3
"""Counted up whenever the same files decode to other pixels or another order."""


_UNUSABLE = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError)
"""What reading a damaged file may raise."""


def _checksum(*stores: ImageStore) -> str:
    return hashlib.sha256(json.dumps([[store.hash, store.skipped] for store in stores]).encode()).hexdigest()


def cache_folder() -> Path:
    """Return the folder of the cache."""
    return Path(os.environ.get("VRM_CACHE") or Path.home() / ".cache" / "vrm").expanduser()


def content_key(folder: Path, files: Iterable[Path], **settings: object) -> str:
    """Return the SHA-256 of the names (within ``folder``), sizes and contents of ``files``, and of ``settings``.

    Labels count too: in class folders they are part of the names, elsewhere of the contents. A file that cannot be read
    counts as such.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, settings], sort_keys=True).encode())
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        digest.update(json.dumps([name, *fingerprint(file)]).encode())
    return digest.hexdigest()


def keep_stores(
    name: str, key: str, build: Callable[[], tuple[ImageStore, ImageStore]]
) -> tuple[ImageStore, ImageStore]:
    """Return the stores kept under ``key``, or build and keep them.

    A damaged file is made again, and a cache that cannot be written is done without; both with a warning.
    """
    return _keep(f"{name}-{key[:32]}.safetensors", build, _read_stores, _write_stores)


def keep_bad_rows(name: str, key: str, build: Callable[[], BadRows]) -> BadRows:
    """Return the bad rows kept under ``key``, or build and keep them, as :func:`keep_stores`."""
    return _keep(f"{name}-{key[:32]}.json", build, _read_bad_rows, _write_bad_rows)


def _read_stores(file: Path) -> tuple[ImageStore, ImageStore]:
    with safe_open(file, framework="pt") as tensors:
        written = json.loads(tensors.metadata()["vrm"])
        # Copies: the tensors that safetensors returns may be the mapped file itself.
        train, test = (
            ImageStore(
                tensors.get_tensor(f"{split}.images").clone(),
                tensors.get_tensor(f"{split}.targets").clone(),
                tuple(written["classes"]),
                tuple(written["skipped"][split]),
            )
            for split in ("train", "test")
        )
    if _checksum(train, test) != written["sha256"]:
        raise ValueError("their checksum differs")
    return train, test


def _write_stores(stores: tuple[ImageStore, ImageStore], file: Path) -> None:
    splits = dict(zip(("train", "test"), stores, strict=True))
    metadata = {
        "classes": stores[0].classes,
        "skipped": {split: store.skipped for split, store in splits.items()},
        "sha256": _checksum(*stores),
    }
    tensors = {
        f"{split}.{part}": getattr(store, part) for split, store in splits.items() for part in ("images", "targets")
    }
    with replacing(file) as beside:
        save_file(tensors, beside, metadata={"vrm": json.dumps(metadata, sort_keys=True)})


def _read_bad_rows(file: Path) -> BadRows:
    content = read_json(file)
    train, test = ({int(row): str(reason) for row, reason in content[split].items()} for split in ("train", "test"))
    return train, test


def _write_bad_rows(rows: BadRows, file: Path) -> None:
    write_json(file, dict(zip(("train", "test"), rows, strict=True)))


def _keep(name: str, build: Callable[[], T], read: Callable[[Path], T], write: Callable[[T, Path], None]) -> T:
    file = cache_folder() / name

    def find() -> T | None:
        try:
            return read(file) if os.path.exists(file) else None
        except _UNUSABLE as error:
            warnings.warn(f"the cached data in {file} cannot be used ({error}) and are made again", stacklevel=5)
            return None

    if (found := find()) is not None:
        return found
    lock = file.parent / ".lock"
    with ExitStack() as stack:
        try:
            make_folder(file.parent)
            try:
                stack.enter_context(locked(lock))
            except Locked as error:
                warnings.warn(f"waiting for the cache {file.parent} ({error})", stacklevel=4)
                stack.enter_context(locked(lock, wait=True))
                if (found := find()) is not None:  # the other process has made it
                    return found
            remove_remains(file.parent)
        except OSError as error:
            _warn_unwritable(file, error)
            return build()
        made = build()
        try:
            write(made, file)
        except (SafetensorError, OSError) as error:
            _warn_unwritable(file, error)
        return made


def _warn_unwritable(file: Path, error: Exception) -> None:
    warnings.warn(
        f"decoded data cannot be kept in {file.parent} ({error}), they will be decoded again at the next start; "
        "name another folder in VRM_CACHE",
        stacklevel=4,
    )
