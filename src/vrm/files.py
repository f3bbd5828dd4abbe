"""Paths as users write them, and files that a crash cannot tear: written beside, flushed to the disk, renamed.

Nothing else in the package renames. Needs the standard library and filelock alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from vrm.wording import bytes_in_words

LARGEST_JSON = 64 * 2**20
"""Bytes beyond which a JSON file is not read."""

_ASIDE = re.compile(r"\..+\.(\d+\.tmp|new|old|gone)")
"""Names that writers use before, and while, they rename; see :func:`remove_remains`."""


class Damaged(ValueError):
    """A file that is not what was written. The message names it and says what is wrong with it."""

    exit_code = 1


class NoHome(ValueError):
    """A path that begins with ``~USER`` for a user without a home folder."""

    exit_code = 2


class NotWritten(OSError):
    """Something that could not be written, for example on a full disk; what lay there before still does.

    ``errno`` is that of the failure beneath. The message names the file and the reason.
    """

    exit_code = 1


@contextlib.contextmanager
def explained(path: Path, what: str = "could not be written") -> Iterator[None]:
    """Raise :class:`NotWritten`, with ``path`` and the room on its disk, in place of any other ``OSError``."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        text = f"{path} {what}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                text += f" ({bytes_in_words(free_bytes(path))} are free)"
        failure = NotWritten(f"{text}; what lay there before is as it was")
        failure.errno = error.errno
        raise failure from error


def user_path(text: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave, with ``~`` or ``~USER`` at its start replaced by the home folder.

    Raise :class:`NoHome` for a user without one.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise NoHome(
            f"{text} begins with {Path(text).parts[0]}, a user with no known home folder; give the whole path"
        ) from None


# ---- replacing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside ``path`` to write a file to; at the end flush it and rename it to ``path``.

    If anything fails inside, or on the way, ``path`` is as it was and nothing is left beside it.
    """
    file = Path(path)
    beside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield beside
        fsync(beside)
        os.replace(beside, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    fsync(file.parent)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside ``path`` to fill with flushed files; at the end rename it to ``path``.

    A folder of that name stays until the new one is whole. If anything fails, ``path`` is as it was.
    """
    beside, before = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    try:
        for left in (beside, before):
            if left.exists():
                shutil.rmtree(left)
        make_folder(path.parent)
        os.mkdir(beside)
        yield beside
        fsync(beside)
        if path.exists():
            os.rename(path, before)
        os.rename(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if before.exists() and not path.exists():
            os.rename(before, path)
        raise
    fsync(path.parent)
    if before.exists():
        shutil.rmtree(before)


def move_into_place(source: Path, target: Path) -> None:
    """Flush a file or folder that is finished and give it its name; ``target`` is replaced at once if it exists."""
    fsync(source)
    os.replace(source, target)
    fsync(target.parent)


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file by ``content`` at once. Raise ``OSError`` if that fails; then ``path`` is as it was."""
    with replacing(path) as beside:
        write_file(beside, content)


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) at once. Raise :class:`NotWritten` if that fails."""
    with explained(path):
        replace_file(path, text.encode())


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Replace a JSON file at once. Raise :class:`NotWritten` if that fails."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_file(path: Path, content: bytes) -> None:
    """Write a file in place and flush it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _CLOSED_ON_EXEC, 0o666)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of ``content``, however little the system takes at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders; its file system keeps names by itself
    descriptor = os.open(path, (os.O_RDWR if os.name == "nt" else os.O_RDONLY) | _CLOSED_ON_EXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no flushing of folders: there, names are kept as far as the server keeps them.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


_CLOSED_ON_EXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, *, largest: int | None = None) -> bytes:
    """Return all of a regular file; follow no link, wait for no pipe. Raise :class:`Damaged` if it cannot be read."""
    flags = os.O_RDONLY | _CLOSED_ON_EXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        link = isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.EMLINK)
        raise Damaged(f"{path} " + ("is a link" if link else f"cannot be read ({error})")) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path} is no plain file")
        if largest is not None and status.st_size > largest:
            raise Damaged(f"{path} has {status.st_size:,} bytes, at most {largest:,} are read")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error})") from None
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Return the keys and values of a JSON file. Raise :class:`Damaged` if it holds anything else."""
    return parse_json(read_bytes(path, largest=LARGEST_JSON), path)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Return the keys and values of a JSON text read from ``path``. Raise :class:`Damaged` for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path} holds no keys and values")
    return content


# ---- folders ---------------------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and flush each one's name to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):  # of another process
            os.mkdir(path)
        fsync(path.parent)


def remove_folder(folder: Path) -> None:
    """Take a folder's name away at once, then remove its content."""
    aside = folder.with_name(f".{folder.name}.gone")
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def remove_remains(folder: Path) -> None:
    """Remove what killed writers left beside their files; bring back a folder that one had put aside.

    Call it while no other process writes in ``folder``.
    """
    for path in sorted(folder.glob(".*")):
        if not _ASIDE.fullmatch(path.name):
            continue
        original = folder / path.name[1:].rpartition(".")[0]
        if path.name.endswith(".old") and not original.exists():
            os.rename(path, original)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def existing_folder(path: Path) -> Path:
    """Return the nearest folder at or above ``path`` that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def free_bytes(path: Path) -> int:
    """Return the bytes free on the disk where ``path`` is, or will be made."""
    return shutil.disk_usage(existing_folder(path)).free


# ---- locks -----------------------------------------------------------------------------------------------------------


class Locked(OSError):
    """Another process holds a lock; the message says which, as far as it has told."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False, announce: bool = True) -> Iterator[BaseFileLock]:
    """Hold the lock file ``path`` for this process; it is given back with the process, however that ends.

    Raise :class:`Locked` if another process has it, unless ``wait`` is true; ``OSError`` if it cannot be made. Unless
    ``announce`` is false the file says which process has it.
    """
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        holder = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):
            holder = path.read_text(encoding="utf-8").strip()
        raise Locked(f"held by {holder or 'another process, which has not said which it is'}") from None
    try:
        if announce:
            with contextlib.suppress(OSError):  # a courtesy: a full disk may not take it
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield lock
    finally:
        if announce:
            with contextlib.suppress(OSError):
                os.truncate(path, 0)
        lock.release()
