"""Downloads from known public addresses: whole and right, or not at all.

A file gets its name only when its SHA-256 is the known one. Until then it is called ``NAME.partial``: the next attempt
continues it, or starts anew if the server cannot continue or what was there proves wrong. For a file that is there and
right no request is made. Archives are read member by member, and only the expected members are written, under names of
our own.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from vrm.data.formats.images import Progress
from vrm.files import fsync, locked, move_into_place, replacing_folder

_TIMEOUT = 30.0
"""Seconds without an answer after which the server is given up."""

_ATTEMPTS = 5
"""Requests for one file at most; none follows one that brought nothing."""

_BLOCK = 1 << 20
"""Bytes read at once."""

_MOST_MEMBERS = 1000
"""Members of an archive at most: tarfile remembers each, and no known data set has more than ten."""


@dataclass(frozen=True)
class RemoteFile:
    """The file at ``url``, with ``num_bytes`` and this ``sha256`` (hexadecimal)."""

    url: str
    sha256: str
    num_bytes: int

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Remote:
    """The ``files`` of a data set, and the ``folder`` below its root that they become.

    ``members``: the files to take from a single archive, which holds them in a folder of the same name; ``None``: the
    files are kept as they are.
    """

    folder: str
    files: tuple[RemoteFile, ...]
    members: tuple[str, ...] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)


def download_data_set(
    remote: Remote, root: Path, *, progress: Progress | None = None, timeout: float = _TIMEOUT
) -> None:
    """Download a data set into ``root``, which is made if needed; its folder is there whole or not at all.

    A second process waits for the first. Raise ``ValueError`` if it cannot be had: why, and how to place it by hand.
    """
    folder = root / remote.folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
            if folder.is_dir() and any(folder.iterdir()):
                return
            if remote.members is not None:
                (file,) = remote.files
                archive = download_file(file, root / file.name, progress=progress, timeout=timeout)
                unpack(archive, folder, members=remote.members)
            else:
                partial = folder.with_name(f"{folder.name}.partial")
                for file in remote.files:
                    download_file(file, partial / file.name, progress=progress, timeout=timeout)
                move_into_place(partial, folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def download_file(
    remote: RemoteFile, target: Path, *, progress: Progress | None = None, timeout: float = _TIMEOUT
) -> Path:
    """Download a file to ``target`` and return it.

    Args:
        remote: address, SHA-256 and size.
        target: the file; no request is made if it is right already. Another content is replaced, with a warning, once
            the right one is there.
        progress: called with (bytes that are there, bytes in all).
        timeout: seconds to wait for an answer, and for each further piece.

    Raises:
        ValueError: the server does not answer, or has another file; or the disk refuses. The message says how to place
            the file by hand.
    """
    if _is_right(remote, target):
        return target
    if target.exists():
        warnings.warn(f"{target} is another file than {remote.url} and will be replaced by it", stacklevel=2)
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("a+b") as stream:
                _complete(stream, remote, target, progress, timeout)
            move_into_place(partial, target)
        finally:
            if partial.exists() and partial.stat().st_size == 0:
                partial.unlink()
    except OSError as error:
        raise _cannot_write(target, error) from error
    return target


def _is_right(remote: RemoteFile, file: Path) -> bool:
    if not file.is_file() or file.stat().st_size != remote.num_bytes:
        return False
    with file.open("rb") as stream:
        return _sha256(stream) == remote.sha256


def _sha256(stream: BinaryIO) -> str:
    stream.seek(0)
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def _length(stream: BinaryIO) -> int:
    return stream.seek(0, os.SEEK_END)


def _complete(stream: BinaryIO, remote: RemoteFile, target: Path, progress: Progress | None, timeout: float) -> None:
    """Request what is missing until the whole file is there and right. Raise ``ValueError`` if that cannot be."""
    by_hand = f"get {remote.url} (SHA-256 {remote.sha256}) by other means and put it at {target}"
    if _length(stream) > remote.num_bytes:
        stream.truncate(0)
    for _ in range(_ATTEMPTS):
        before = start = _length(stream)
        trouble = "the connection ended early"
        try:
            if start < remote.num_bytes:
                start = _append(stream, remote, progress, timeout)
        except _ConnectionLost as error:
            trouble = str(error)
        except _WrongFile as error:
            raise ValueError(f"{remote.url}: {error}, another file; it was not kept; {by_hand}") from None
        length = _length(stream)
        if length == remote.num_bytes:
            found = _sha256(stream)
            if found == remote.sha256:
                return
            stream.truncate(0)
            trouble = f"its SHA-256 is {found}, expected {remote.sha256}: another file; it was not kept"
            if start == 0:  # it came in one piece: the server has nothing else
                break
        elif length == before:
            break
    length = _length(stream)
    kept = (
        f"{length:,} of {remote.num_bytes:,} bytes are kept, the next start continues from there; or " if length else ""
    )
    raise ValueError(f"{remote.url} cannot be downloaded ({trouble}); {kept}{by_hand}")


class _ConnectionLost(Exception):
    """The network or the server fails."""


class _WrongFile(Exception):
    """The server has another file."""


def _append(stream: BinaryIO, remote: RemoteFile, progress: Progress | None, timeout: float) -> int:
    """Append what the server sends, as far as it comes, and return the position at which that began."""
    start = _length(stream)
    with _request(remote, start, timeout) as response:
        sent = response.headers.get("Content-Range", "")
        if response.status == 200:  # the whole file, whatever was asked for
            start = 0
        elif response.status != 206 or not sent.startswith(f"bytes {start}-"):
            raise _WrongFile(f"the server answers with status {response.status}, {sent or 'no range'}")
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and start + int(length) != remote.num_bytes:
            raise _WrongFile(f"the server has {start + int(length):,} bytes, expected {remote.num_bytes:,}")
        stream.truncate(start)
        done = start
        while block := _receive(response):
            done += len(block)
            if done > remote.num_bytes:
                stream.truncate(0)
                raise _WrongFile(f"the server has more than the expected {remote.num_bytes:,} bytes")
            stream.write(block)
            if progress:
                progress(done, remote.num_bytes)
    return start


def _request(remote: RemoteFile, start: int, timeout: float) -> HTTPResponse:
    headers = {"User-Agent": "vrm", "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response: HTTPResponse = urlopen(Request(remote.url, headers=headers), timeout=timeout)
    except HTTPError as error:
        error.close()
        if error.code == 416 and start:  # the server has nothing beyond what is here
            return _request(remote, 0, timeout)
        raise _ConnectionLost(f"status {error.code}, {error.reason}") from None
    except (OSError, HTTPException) as error:
        raise _ConnectionLost(str(getattr(error, "reason", error)) or type(error).__name__) from None
    return response


def _receive(response: HTTPResponse) -> bytes:
    try:
        return response.read1(_BLOCK)
    except (OSError, HTTPException) as error:
        raise _ConnectionLost(str(error) or type(error).__name__) from None


def unpack(archive: Path, folder: Path, *, members: Sequence[str], limit: int = 1 << 30) -> None:
    """Unpack ``members`` of a gzipped tar archive, which holds them in a folder named like ``folder``, into that.

    ``folder`` appears when all are on the disk, or not at all. Nothing else is written, whatever the archive holds, and
    none of its names is used: each member is read as a stream into a file of our own.

    Raises:
        ValueError: the archive is damaged, lacks a member or has it twice, is larger than ``limit`` bytes unpacked, or
            holds what no data set needs: absolute names, names that lead out, links, devices, sparse files, thousands
            of members.
    """
    wanted = {f"{folder.name}/{member}": member for member in members}
    try:
        with (
            replacing_folder(folder) as new,
            gzip.open(archive) as content,
            tarfile.open(fileobj=_Bounded(content, limit), mode="r|") as tar,  # type: ignore[call-overload]
        ):
            for number, entry in enumerate(tar):
                _check_harmless(entry, number)
                member = wanted.get(str(PurePosixPath(entry.name)))
                if member is not None and entry.isreg():
                    with (new / member).open("xb") as target:
                        shutil.copyfileobj(tar.extractfile(entry), target, _BLOCK)
                    fsync(new / member)
            lacking = [member for member in members if not (new / member).exists()]
            if lacking:
                raise ValueError(f"it lacks {', '.join(lacking)}")
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{archive} cannot be unpacked to {folder} ({error})") from error


class _Bounded:
    """A stream that raises after ``limit`` bytes: a small file can unpack to any size."""

    def __init__(self, stream: gzip.GzipFile, limit: int) -> None:
        self.stream, self.limit, self.left = stream, limit, limit

    def read(self, size: int) -> bytes:
        content = self.stream.read(min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {self.limit:,} bytes")
        return content


def _check_harmless(entry: tarfile.TarInfo, number: int) -> None:
    """Raise ``ValueError`` for an archive member that no data set needs."""
    if number >= _MOST_MEMBERS:
        raise ValueError(f"it has more than {_MOST_MEMBERS:,} members; refused")
    path = PurePosixPath(entry.name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"its member {entry.name!r} leads out of the folder; refused")
    if entry.issparse() or not (entry.isreg() or entry.isdir()):
        raise ValueError(f"its member {entry.name!r} is a link, a device or another special file; refused")


def _cannot_write(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path} cannot be written ({error.strerror or error}); make room or give data.root=ANOTHER_FOLDER"
    )
