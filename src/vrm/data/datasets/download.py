"""Downloads from known public addresses: whole and right, or not at all.

A file gets its name only when its SHA-256 is the known one; for a file that is there and right no request is made. Of
an archive only the expected members are written, under names of ours.
"""

from __future__ import annotations

import socket
import tarfile
import warnings
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlretrieve

from vrm.data.formats.images import Progress
from vrm.data.formats.layout import fingerprint
from vrm.files import locked, move_into_place, replacing_folder, write_file

_TIMEOUT = 30.0
"""Seconds without an answer after which the server is given up."""


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


def download_data_set(remote: Remote, root: Path, *, progress: Progress | None = None) -> None:
    """Download a data set into ``root``, which is made if needed; its folder is there whole or not at all.

    A second process waits for the first. ``progress`` is called with (bytes, bytes in all) of each file. Raise
    ``ValueError`` if the data set cannot be had: why, and how to place it by hand.
    """
    folder = root / remote.folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
            if folder.is_dir() and any(folder.iterdir()):
                return
            if remote.members is None:
                partial = folder.with_name(f"{folder.name}.partial")
                for file in remote.files:
                    _download_file(file, partial / file.name, progress)
                move_into_place(partial, folder)
            else:
                (file,) = remote.files
                _download_file(file, root / file.name, progress)
                with replacing_folder(folder) as new, tarfile.open(root / file.name) as archive:
                    for member in remote.members:
                        content = archive.extractfile(f"{folder.name}/{member}")
                        assert content is not None  # the archive is the known one
                        write_file(new / member, content.read())
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror or error}); make room or give data.root=ANOTHER_FOLDER"
        ) from error


def _download_file(remote: RemoteFile, target: Path, progress: Progress | None) -> None:
    """Download a file to ``target``, unless it is there and right; a wrong one is replaced, with a warning."""
    if fingerprint(target)[1] == remote.sha256:
        return
    if target.exists():
        warnings.warn(f"{target} is another file than {remote.url} and will be replaced by it", stacklevel=4)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        urlretrieve(remote.url, partial, lambda number, size, _: progress and progress(number * size, remote.num_bytes))
        if (found := fingerprint(partial)[1]) != remote.sha256:
            raise HTTPException(f"the server has another file, of SHA-256 {found}")
        move_into_place(partial, target)
    except (OSError, HTTPException) as error:
        raise ValueError(
            f"{remote.url} cannot be downloaded ({error}); get it by other means (its SHA-256 is {remote.sha256}) and "
            f"put it at {target}, or give data.root=ANOTHER_FOLDER if this one is full"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        partial.unlink(missing_ok=True)
