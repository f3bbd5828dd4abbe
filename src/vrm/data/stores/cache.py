"""What was made of data sets on disk, named by the content of the files it was made of.

The folder is ``VRM_CACHE``, or ``~/.cache/vrm``. Anything in it may be deleted at any time. A file bears the SHA-256 of
what it holds, is written beside, flushed and renamed, and is made by one process at a time: others wait for it. What a
killed process leaves is removed by the next that writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vrm.data.stores.store import ImageStore, Stores

T = TypeVar("T")
Table = tuple[dict[int, str], dict[int, str]]
"""A reason for each of some rows, of train and test."""

_VERSION = 2  # counted up whenever the same files decode to other pixels or another order


def cache_folder() -> Path:
    """Where it is kept."""
    return Path(os.environ.get("VRM_CACHE") or Path.home() / ".cache" / "vrm").expanduser()


def content_key(folder: Path, files: Iterable[Path], **settings: object) -> str:
    """SHA-256 of the names (within ``folder``), sizes and contents of ``files``, and of ``settings``.

    A label is part of it: of the name in class folders, of the content elsewhere. A file that cannot be read counts as
    such.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, settings], sort_keys=True).encode())
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        digest.update(json.dumps([name, *fingerprint(file)]).encode())
    return digest.hexdigest()


def fingerprint(file: Path) -> tuple[int, str]:
    """Size and SHA-256 (hexadecimal) of a file; -1 and why for one that cannot be read."""
    try:
        if not file.is_file():  # reading a pipe would wait forever
            return -1, "no file"
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
            return stream.tell(), content
    except OSError as error:
        return -1, type(error).__name__


def cached(name: str, key: str, build: Callable[[], Stores]) -> Stores:
    """The stores kept under ``key``, or built now and kept.

    A damaged file is built again, and a folder that cannot be written is done without; both with a warning.
    """
    return _kept(cache_folder() / f"{name}-{key[:32]}.safetensors", _read_stores, _write_stores, build)


def cached_table(name: str, key: str, build: Callable[[], Table]) -> Table:
    """As :func:`cached`, of a table."""
    return _kept(cache_folder() / f"{name}-{key[:32]}.json", _read_table, _write_table, build)


def _kept(file: Path, read: Callable[[Path], T], write: Callable[[T, Path], None], build: Callable[[], T]) -> T:
    seen = _state(file)
    found = _read(file, read)
    if found is not None:
        return found
    with ExitStack() as stack:
        partial = file.with_name(f".{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _remove_remains(file.parent)
            stack.enter_context(claimed(partial, keep=False))
        except OSError as error:
            _warn_unkept(file, error)
            return build()
        if _state(file) != seen:  # another process has made it
            found = _read(file, read)
        if found is None:
            found = build()
            try:
                write(found, partial)
                flush(partial)
                os.replace(partial, file)
                flush(file.parent)
            except (SafetensorError, OSError) as error:
                _warn_unkept(file, error)
        return found


def _state(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:  # not there, or out of reach, which writing will tell
        return None
    return status.st_ino, status.st_mtime_ns


def _read(file: Path, read: Callable[[Path], T]) -> T | None:
    if _state(file) is None:
        return None
    try:
        return read(file)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"the cached data in {file} cannot be used ({error}) and are made again", stacklevel=4)
        return None


def _warn_unkept(file: Path, error: Exception) -> None:
    warnings.warn(
        f"decoded data cannot be kept in {file.parent} ({error}), they will be decoded again at the next start; "
        "name another folder in VRM_CACHE",
        stacklevel=4,
    )


@contextmanager
def claimed(path: Path, *, keep: bool) -> Iterator[BinaryIO]:
    """A file to write under a provisional name, this process's alone; waits for the process that has it.

    It is made if it is not there, else open behind what it holds. The claim of a process that dies ends with it. At
    the end the file is renamed already, or left (``keep``), or removed. ``OSError`` if it cannot be written or locked.
    """
    while True:
        with path.open("a+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                warnings.warn(f"another process is writing {path}; waiting for it", stacklevel=4)
                fcntl.flock(stream, fcntl.LOCK_EX)
            if _is(stream, path):  # else it was renamed or removed by the other
                try:
                    yield stream
                finally:
                    if not keep and _is(stream, path):
                        path.unlink()
                return


def _is(stream: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_remains(folder: Path) -> None:
    """Remove what processes that were killed left half written."""
    for path in folder.glob(".*.partial"):
        try:
            with path.open("r+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(stream, path):
                    path.unlink()
        except OSError:  # in work, gone meanwhile, or another user's
            continue


def _read_stores(file: Path) -> Stores:
    with safe_open(file, framework="pt") as tensors:
        told = json.loads(tensors.metadata()["vrm"])
        # Copies: what safetensors gives may be the mapped file itself.
        train, test = (
            ImageStore(
                tensors.get_tensor(f"{split}.images").clone(),
                tensors.get_tensor(f"{split}.targets").clone(),
                tuple(told["classes"]),
                tuple(told["skipped"][split]),
            )
            for split in ("train", "test")
        )
    if _checksum(train, test) != told["sha256"]:
        raise ValueError("their checksum differs")
    return train, test


def _write_stores(stores: Stores, file: Path) -> None:
    splits = dict(zip(("train", "test"), stores, strict=True))
    told = {
        "classes": stores[0].classes,
        "skipped": {split: store.skipped for split, store in splits.items()},
        "sha256": _checksum(*stores),
    }
    tensors = {
        f"{split}.{part}": getattr(store, part) for split, store in splits.items() for part in ("images", "targets")
    }
    save_file(tensors, file, metadata={"vrm": json.dumps(told, sort_keys=True)})


def _checksum(*stores: ImageStore) -> str:
    content = [[store.hash, store.skipped] for store in stores]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read_table(file: Path) -> Table:
    told = json.loads(file.read_bytes())
    if hashlib.sha256(told["table"].encode()).hexdigest() != told["sha256"]:
        raise ValueError("its checksum differs")
    train, test = ({int(row): reason for row, reason in rows.items()} for rows in json.loads(told["table"]))
    return train, test


def _write_table(table: Table, file: Path) -> None:
    text = json.dumps(table)
    file.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "table": text}))


def flush(path: Path) -> None:
    """See to it that a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
