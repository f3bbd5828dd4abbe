"""The logs of a run: files of JSON lines, appended to while it trains and cut back when it is resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from vrm.files import Damaged, explained, read_bytes, write_all

METRICS, TIMINGS = "metrics.jsonl", "timings.jsonl"

KEYS: Mapping[str, frozenset[str]] = {
    METRICS: frozenset({"step", "epoch", "split", "name", "value"}),
    TIMINGS: frozenset({"step", "epoch", "images_per_second", "seconds"}),
}
"""The keys of each line, by the name of the log."""


class Log:
    """A log, open for appending.

    Lines that the disk does not take are kept in memory and written with the next one: training goes on.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        """Open ``path``, which need not exist. ``warn`` is called once, if a line cannot be written."""
        self.path, self.warn = path, warn
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self.file: IO[bytes] = open(os.open(path, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115
        self._start_from(self.file.read(), lost=0)

    def _start_from(self, content: bytes, *, lost: int) -> None:
        self.size = len(content)
        self._lost = lost
        self._digest = hashlib.sha256(content)
        self._pending = b""
        self._warned = False

    def write(self, record: Mapping[str, object]) -> None:
        """Append one line."""
        self._pending += json.dumps(record).encode() + b"\n"
        with self._tolerant():
            self._flush()

    def sync(self) -> None:
        """Flush all lines to the disk, as far as it takes them."""
        with self._tolerant():
            if self._pending:
                self._flush()
            os.fsync(self.file.fileno())

    def _flush(self) -> None:
        os.ftruncate(self.file.fileno(), self.size)  # half a line may be there from a write that failed
        write_all(self.file.fileno(), self._pending)
        self.size += len(self._pending)
        self._digest.update(self._pending)
        self._pending = b""

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                self.warn(
                    f"{self.path} cannot be written ({error.strerror}). Training goes on: its lines are kept in "
                    "memory and written as soon as the disk takes them"
                )
            self._warned = True

    @property
    def lost_lines(self) -> int:
        """Number of lines that the disk has not taken, those of before a resume included."""
        return self._lost + self._pending.count(b"\n")

    @property
    def mark(self) -> dict[str, Any]:
        """Where the log stands, for a checkpoint: its size in bytes, the SHA-256 of its content, the lines it lacks."""
        return {"bytes": self.size, "sha256": self._digest.hexdigest(), "lost": self.lost_lines}

    def cut_back(self, size: int, *, lost: int) -> None:
        """Forget what comes after ``size`` bytes, where ``lost`` lines were lacking.

        Raise :class:`~vrm.files.NotWritten` if that fails.
        """
        with explained(self.path):
            os.ftruncate(self.file.fileno(), size)
            self._start_from(read_bytes(self.path), lost=lost)

    def close(self) -> None:
        """Flush and close the file."""
        self.sync()
        self.file.close()


def check_mark(path: Path, mark: Mapping[str, Any]) -> str:
    """Return what is wrong with a log up to where a checkpoint knew it; nothing if it begins as it did then."""
    try:
        content = read_bytes(path)
    except Damaged as error:
        return str(error)
    if len(content) < mark["bytes"]:
        return f"{path} has {len(content):,} bytes, but the checkpoint knew {mark['bytes']:,}"
    if hashlib.sha256(content[: mark["bytes"]]).hexdigest() != mark["sha256"]:
        return f"{path} was changed since the checkpoint was written"
    return ""


def read_log(path: Path) -> tuple[dict[str, Any], ...]:
    """Return the whole lines of a log; a last one that is still being written is left out.

    Raise :class:`~vrm.files.Damaged` naming the first line that is not one of this log.
    """
    if not path.exists():
        return ()
    found = []
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not KEYS[path.name] <= record.keys():
            raise Damaged(f"line {number} of {path} is damaged")
        found.append(record)
    return tuple(found)
