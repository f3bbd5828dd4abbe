"""The folder of a run: what is written while it trains, and the one reader of it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import socket
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from vrm import config, models, tasks
from vrm.config import ConfigError, Run, read_yaml, restore
from vrm.engine.devices import device_name
from vrm.files import fsync, replace_file, write_all
from vrm.runs.checkpoint import (
    CHECKPOINT,
    LOGS,
    MANIFEST,
    Damaged,
    DamagedCheckpoint,
    check_sum,
    clear,
    explained,
    make_folder,
    read_bytes,
    read_checkpoint,
    read_contents,
    read_json,
    remove_folder,
    write_checkpoint,
    write_json,
    write_text,
)
from vrm.tasks import Task

SETTINGS = "config.yaml"


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says why and what to do."""

    exit_code = 2


# ---- the lock --------------------------------------------------------------------------------------------------------


class Lock:
    """A lock on a file, held by this process alone: not by its children, and not by anyone once it is dead."""

    held: ClassVar[weakref.WeakSet[Lock]] = weakref.WeakSet()

    def __init__(self, path: Path) -> None:
        """Take the lock. ``BlockingIOError`` says who holds it; ``OSError`` if the file cannot be had."""
        self.path = path
        self._take()

    def keep(self) -> None:
        """Take it anew where someone has removed the file. ``BlockingIOError`` if another process was faster."""
        if not self._named():
            self.forget()
            self._take()

    def _take(self) -> None:
        path = self.path
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            self.file: IO[bytes] = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                self.file.close()
                raise BlockingIOError(error.errno, holder) from None
            except OSError:
                self.file.close()
                raise
            if self._named():
                break
            self.file.close()  # someone removed the file meanwhile: a lock on it would keep nobody out
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        Lock.held.add(self)

    def _named(self) -> bool:
        """Whether the file is the one that others would find."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Give the lock back."""
        with contextlib.suppress(OSError):  # who held it is told as a courtesy: a full disk may not take it
            if not self.file.closed:
                os.ftruncate(self.file.fileno(), 0)
        self.forget()

    def forget(self) -> None:
        """Let go of the file; the lock stays with whoever else has it open."""
        Lock.held.discard(self)
        self.file.close()


def _forget_locks() -> None:
    """A forked child lets go of its parent's locks: it may outlive it, as a worker that loads images does."""
    for lock in list(Lock.held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_locks)


# ---- logs ------------------------------------------------------------------------------------------------------------


class Log:
    """A file of JSON lines, and its content in memory: what the disk does not take now, it is given again later."""

    def __init__(self, path: Path) -> None:
        """Open for appending. ``OSError`` if that cannot be."""
        self.path = path
        self.tell: Callable[[str], None] = _warn
        self.warned = False
        self._open()
        self.content = bytearray(path.read_bytes())
        self.kept = len(self.content)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self.file: IO[bytes] = open(os.open(self.path, flags, 0o666), "wb", buffering=0)  # noqa: SIM115
        self.torn = False

    def write(self, record: Mapping[str, object]) -> None:
        """Append one line. If the disk does not take it, it is tried again with the next one, after one warning."""
        line = json.dumps(record).encode() + b"\n"
        self.content += line
        with self._tolerant():
            if self.torn:
                self._write_again()
            else:
                write_all(self.file.fileno(), line)

    def sync(self) -> None:
        """Flush all lines to the disk, as far as it takes them."""
        with self._tolerant():
            if self.torn:
                self._write_again()
            os.fsync(self.file.fileno())
            self.kept = len(self.content)

    def _write_again(self) -> None:
        """What was written since the last flush may be half there or, after a flush that failed, not at all."""
        os.ftruncate(self.file.fileno(), self.kept)
        write_all(self.file.fileno(), bytes(self.content[self.kept :]))
        self.torn = False

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.torn = True
            if not self.warned:
                self.tell(
                    f"{self.path} cannot be written ({error.strerror}). Training goes on: its lines are kept in memory "
                    "and in the checkpoints, and written as soon as the disk takes them"
                )
            self.warned = True

    @property
    def missing(self) -> int:
        """Lines that the disk did not take yet."""
        return self.content.count(b"\n", self.kept) if self.torn else 0

    def rewind(self, content: bytes) -> str:
        """Make the log what it was. ``NotWritten`` if that fails; returns what was wrong, if it did not begin so."""
        self.content = bytearray(content)
        try:
            found = self.path.read_bytes()
        except OSError as error:
            found, wrong = b"", f"cannot be read ({error.strerror})"
        else:
            wrong = f"has {len(found):,} bytes" if len(found) < len(content) else "was changed"
        with explained(self.path):
            if found[: len(content)] == content:
                os.ftruncate(self.file.fileno(), len(content))
                wrong = ""
            else:
                self.replace()
        self.kept, self.torn = len(content), False
        return wrong and f"{self.path} {wrong}; the checkpoint knew {len(content):,}: written again from there"

    def replace(self) -> None:
        """Write the whole file anew, at once."""
        replace_file(self.path, bytes(self.content))
        self.file.close()
        self._open()
        self.kept = len(self.content)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)


# ---- the folder ------------------------------------------------------------------------------------------------------


class RunFolder:
    """A run's folder, open for writing, locked against a second writer."""

    def __init__(self, path: Path) -> None:
        """Make or open ``path`` and lock it. ``RunError`` if another process holds it, or it cannot be written."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        with contextlib.ExitStack() as opened:
            try:
                make_folder(path)
                self.lock = Lock(path / "lock")
                opened.callback(self.lock.close)
                make_folder(self.checkpoints)
                for folder in (path, self.checkpoints):
                    clear(folder)
                self.metrics, self.timings = (Log(path / name) for name in LOGS)
                fsync(path)
            except BlockingIOError as error:
                raise RunError(
                    f"{path} is in use by another process ({error.strerror or 'it has not said which'}); wait for it, "
                    "or give run=ANOTHER_FOLDER"
                ) from None
            except OSError as error:
                raise RunError(f"run={path} cannot be written ({error.strerror}); give run=ANOTHER_FOLDER") from None
            opened.pop_all()

    @property
    def logs(self) -> tuple[Log, Log]:
        """Both logs."""
        return self.metrics, self.timings

    def close(self) -> None:
        """Close the logs and give the lock back."""
        for log in self.logs:
            log.sync()
            log.file.close()
        self.lock.close()

    def _keep_lock(self) -> None:
        try:
            self.lock.keep()
        except BlockingIOError as error:
            raise RunError(
                f"{self.lock.path} was removed, and the run taken over by another process ({error.strerror})"
            ) from None
        except OSError:
            with explained(self.lock.path):
                raise

    # ---- checkpoints

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` steps lies."""
        return self.checkpoints / f"step-{step:09d}"

    def saved(self) -> list[Path]:
        """All checkpoints, the newest first."""
        return saved(self.checkpoints)

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int) -> None:
        """Write the checkpoint of ``state["step"]`` and leave the ``keep`` newest up to it.

        The settings and the logs up to here, which are flushed before, are kept in it. Checkpoints of later steps,
        passed over when the run was resumed, are removed. ``NotWritten`` if the disk does not take it: those before
        are as they were.
        """
        self._keep_lock()
        for log in self.logs:
            log.sync()
        logs = {log.path.name: bytes(log.content) for log in self.logs}
        marks = {Path(name).stem: {"bytes": len(log), "sha256": _sha256(log)} for name, log in logs.items()}
        more = {"settings": self._settings(), "logs": marks}
        path = self.checkpoint_path(state["step"])
        write_checkpoint(path, tensors, {**state, **more}, logs)
        found = self.saved()
        place = found.index(path)
        for old in (*found[:place], *found[place + keep :]):
            with explained(old, "could not be removed"):
                remove_folder(old)

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
        """The newest checkpoint that is whole and of this run, and what was wrong with newer ones.

        ``RunError`` if none is.
        """
        complaints: list[str] = []
        for folder in self.saved():
            try:
                tensors, state = read_checkpoint(folder)
                self._check_settings(folder, state)
                return tensors, state, complaints
            except DamagedCheckpoint as error:
                complaints.append(str(error))
        if complaints:
            raise RunError(f"no checkpoint of {self.path} can be used: {'; '.join(complaints)}")
        return None

    def _settings(self) -> dict[str, Any] | None:
        """What ``config.yaml`` says; ``None`` without one."""
        path = self.path / SETTINGS
        return config.flat(read_yaml(read_bytes(path), str(path))) if path.is_file() else None

    def _check_settings(self, folder: Path, state: Mapping[str, Any]) -> None:
        """``DamagedCheckpoint`` if it was written under other settings."""
        then, now = state.get("settings"), self._settings()
        if now is None or then is None:
            return
        if not isinstance(then, dict):
            raise DamagedCheckpoint(f"{folder / 'state.json'} holds no settings")
        if other := config.differing(then, now):
            there, here = (", ".join(f"{key}={side.get(key)}" for key in other) for side in (then, now))
            raise DamagedCheckpoint(
                f"{folder}: it was written with {there}, but {self.path / SETTINGS} says {here}; put that back, or "
                "give run=ANOTHER_FOLDER for a run with other settings"
            )

    def card(self) -> dict[str, Any] | None:
        """What is told of the finished run; ``None`` before its end. ``Damaged`` if that was changed."""
        path = self.path / "model.json"
        return read_json(path) if path.exists() else None

    def begin(self) -> None:
        """Start from nothing, with empty logs."""
        for log in self.logs:
            log.rewind(b"")

    def rewind(self, step: int) -> list[str]:
        """Take the logs back to the checkpoint of ``step``; says which of them had to be written again, and why."""
        content = read_contents(self.checkpoint_path(step))
        self._withdraw(step)
        told = [log.rewind(content.get(log.path.name, b"")) for log in self.logs]
        return [text for text in told if text]

    def _withdraw(self, step: int) -> None:
        """Remove a card of more steps: what it tells of is trained again."""
        card = self.path / "model.json"
        if card.exists() and _steps(card) != step:
            with explained(card, "could not be removed"):
                os.unlink(card)
                fsync(self.path)

    # ---- other files

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Replace a JSON file of the folder at once."""
        write_json(self.path / name, content)

    def write_once(self, name: str, content: Mapping[str, object], *, keep: bool) -> list[str]:
        """Write a JSON file; with ``keep``, only if no whole one is there. Says what was wrong with the one there."""
        wrong = []
        if keep:
            try:
                read_json(self.path / name)
                return []
            except Damaged as error:
                wrong = [f"{error}: written again"]
        self.write_json(name, content)
        return wrong

    def write_weights(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace a file of weights at once. ``NotWritten`` if that fails."""
        with explained(self.path / name):
            models.save_tensors(tensors, self.path / name)

    def finish(self, card: Mapping[str, object], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the files of weights, a manifest of the folder, and then, the last of all, their card ``model.json``.

        With it the run is finished. If the disk takes lines of a log even now not, the card says how many are missing.
        """
        for name, tensors in weights.items():
            self.write_weights(name, tensors)
        for log in self.logs:
            log.sync()
            if not log.torn and not _holds(log.path, log.content):
                log.replace()
        lost = {log.path.name: log.missing for log in self.logs if log.missing}
        text = json.dumps({**card, "lost_lines": lost} if lost else card, indent=1) + "\n"
        names = (SETTINGS, "environment.json", "taps.json", "teacher.json", "skipped.json", *weights)
        sums = {name: _sha256(read_bytes(self.path / name)) for name in names if (self.path / name).is_file()}
        sums |= {log.path.name: _sha256(log.content) for log in self.logs if log.path.name not in lost}
        self.write_json(MANIFEST, {"sha256": sums | {"model.json": _sha256(text.encode())}})
        write_text(self.path / "model.json", text)


def _steps(card: Path) -> object:
    """How many steps a card tells of; ``None`` if it is damaged or not there."""
    try:
        return read_json(card).get("steps")
    except Damaged:
        return None


def _sha256(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()


def _holds(path: Path, content: bytearray) -> bool:
    return path.is_file() and path.read_bytes() == content


def saved(checkpoints: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    found = (path for path in checkpoints.glob("step-*") if CHECKPOINT.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def check_settings(run: Run) -> None:
    """``RunError`` naming the keys if the folder of ``run`` holds one with other settings."""
    path = run.run / SETTINGS
    if not path.is_file():
        return
    then = restore(path)
    if other := [f"{key}={config.flat(then).get(key)}" for key in config.differing(then, run)]:
        raise RunError(
            f"{run.run} holds a run with other settings: {', '.join(other)}; give run=ANOTHER_FOLDER, or these settings"
        )


def environment(device: torch.device) -> dict[str, object]:
    """What a run's numbers may depend on beside its settings."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "numpy", "pillow", "vrm")},
    }


@dataclass(frozen=True)
class Record:
    """A run as tables and figures read it."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any] | None
    metrics: tuple[dict[str, Any], ...]
    timings: tuple[dict[str, Any], ...]

    def curve(self, split: str, name: str) -> list[tuple[int, float]]:
        """``(epoch, value)`` of one metric, at each epoch's last reading."""
        found = {
            line["epoch"]: line["value"] for line in self.metrics if (line["split"], line["name"]) == (split, name)
        }
        return sorted(found.items())

    @property
    def task(self) -> Task | None:
        """What the networks of the run are trained for; ``None`` before training began."""
        return tasks.load(self.environment["task"]) if self.environment else None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.model is not None

    @property
    def lost_lines(self) -> int:
        """Lines of ``metrics.jsonl`` that the disk did not take; 0 of a run that is not finished."""
        return int(((self.model or {}).get("lost_lines") or {}).get(LOGS[0], 0))


def read_run(path: Path) -> Record:
    """Read a run folder, finished or still running. ``RunError`` if it is none, or a file of it is damaged."""
    if not (path / SETTINGS).is_file():
        raise RunError(f"{path} is not a run folder (it has no config.yaml)")
    try:
        read = {
            name: read_json(path / name) if (path / name).exists() else None
            for name in ("environment.json", "model.json")
        }
        settings = read_yaml(read_bytes(path / SETTINGS), str(path / SETTINGS))
        metrics, timings = (_lines(path / name) for name in LOGS)
        if read["model.json"] is not None:
            for name in ("environment.json", "model.json", SETTINGS, *LOGS):
                if (path / name).exists():
                    check_sum(path / name)
    except (Damaged, ConfigError) as error:
        raise RunError(str(error)) from None
    return Record(path, settings, read["environment.json"] or {}, read["model.json"], metrics, timings)


KEYS: Mapping[str, frozenset[str]] = {
    "metrics.jsonl": frozenset({"step", "epoch", "split", "name", "value"}),
    "timings.jsonl": frozenset({"step", "epoch", "images_per_second", "seconds"}),
}
"""Of each line of a log."""


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    """Whole lines of a log; a last one still being written is left out. ``Damaged`` names a line that is none."""
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
