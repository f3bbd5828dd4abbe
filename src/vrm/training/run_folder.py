"""The folder of a run: what is written while it trains, and the one reader of it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from vrm import models
from vrm.config import Run, restore
from vrm.training import device_name
from vrm.training.files import DamagedCheckpoint, read_checkpoint, write_text, writing


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says why and what to do."""


class Log:
    """A file of JSON lines that can be cut back to where a checkpoint knew it.

    Training does not stop for a line that cannot be written: it is told once, lost lines are counted, and the next one
    that can be written is preceded by a line that says how many are missing (``split`` is ``"log"``).
    """

    def __init__(self, path: Path) -> None:
        """Open for appending."""
        self.path = path
        self.tell: Callable[[str], None] = _warn
        self.lost = 0
        self.file: IO[bytes] = path.open("ab", buffering=0)
        self.sum = hashlib.sha256(path.read_bytes())

    def write(self, record: Mapping[str, object]) -> None:
        """Append one line."""
        lines = [record]
        if self.lost:
            place = {key: record[key] for key in ("step", "epoch") if key in record}
            lines.insert(0, place | {"split": "log", "name": "lost_lines", "value": self.lost})
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        size = self.file.tell()
        try:
            if self.file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(size)  # no half line
            self.file.seek(size)
            self.lost += 1
            if self.lost == 1:
                self.tell(f"{self.path} cannot be written ({error.strerror}); training goes on without its lines")
            return
        self.sum.update(content)
        if self.lost:
            self.tell(f"{self.path} can be written again; {self.lost} lines are lost")
            self.lost = 0

    def mark(self) -> dict[str, Any]:
        """Where the log stands, once that is on the disk: its length in bytes, and their SHA-256."""
        os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "sha256": self.sum.hexdigest()}

    def cut(self, mark: Mapping[str, Any] | None) -> None:
        """Forget everything behind a mark, or (``None``) everything. ``RunError`` if what is before it was changed."""
        size, known = self.path.stat().st_size, 0 if mark is None else int(mark["bytes"])
        if size < known:
            raise RunError(
                f"{self.path} has {size} bytes, its checkpoint knew {known}: it was cut by someone else; restore it"
            )
        with self.path.open("rb") as file:
            self.sum = hashlib.sha256(file.read(known))
        if mark is not None and self.sum.hexdigest() != mark["sha256"]:
            raise RunError(f"{self.path} was changed since its checkpoint was written; restore it, or start a new run")
        self.file.truncate(known)
        self.file.seek(known)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


class RunFolder:
    """A run's folder, open for writing, locked against a second writer."""

    def __init__(self, path: Path) -> None:
        """Make or open ``path`` and lock it. ``RunError`` if another process holds it, or it cannot be written."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = _lock(path / "lock")
            self.checkpoints.mkdir(exist_ok=True)
            self._sweep()
            self.metrics = Log(path / "metrics.jsonl")
            self.timings = Log(path / "timings.jsonl")
        except OSError as error:
            raise RunError(
                f"run={path} cannot be written ({error.strerror or error}); give run=ANOTHER_FOLDER"
            ) from None

    def _sweep(self) -> None:
        """Remove what a writer that was killed left half-written."""
        for folder in (self.path, self.checkpoints):
            for pattern in (".*.new", ".*.tmp"):
                for left in folder.glob(pattern):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def close(self) -> None:
        """Close the logs and give the lock back."""
        for file in (self.metrics.file, self.timings.file, self.lock):
            file.close()

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` steps lies."""
        return self.checkpoints / f"step-{step:09d}"

    def saved(self) -> list[Path]:
        """All checkpoints, the newest first."""
        return sorted((p for p in self.checkpoints.glob("step-*") if p.is_dir()), reverse=True)

    def newest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]] | None:
        """The newest checkpoint that is whole, and what was wrong with newer ones. ``RunError`` if all are damaged."""
        complaints: list[str] = []
        for folder in self.saved():
            try:
                return (*read_checkpoint(folder), complaints)
            except DamagedCheckpoint as error:
                complaints.append(str(error))
        if complaints:
            raise RunError("no checkpoint of this run is whole: " + "; ".join(complaints))
        return None

    def write_weights(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace a file of weights at once."""
        with writing(self.path / name):
            models.save_tensors(tensors, self.path / name)

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Replace a JSON file of the folder at once."""
        write_text(self.path / name, json.dumps(content, indent=1) + "\n")


def _lock(path: Path) -> IO[str]:
    """The lock file, locked, with this process's name in it. ``RunError`` tells who else holds it.

    A process that ends, however it ends, gives its lock back; its children let go of it at once.
    """
    lock = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise RunError(
            f"{path.parent} is in use by another process ({holder}); wait for it, or give run=ANOTHER_FOLDER"
        ) from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {platform.node()}\n")
    lock.flush()
    _HELD.add(lock)
    return lock


_HELD: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child: a lock belongs to all processes that have it open, and would outlive its run."""
    for lock in _HELD:
        lock.close()


os.register_at_fork(after_in_child=_let_go)


def check_settings(run: Run) -> None:
    """``RunError`` naming the keys if the folder of ``run`` holds one with other settings."""
    path = run.run / "config.yaml"
    if not path.is_file():
        return
    then, now = (settings.model_dump(mode="json") for settings in (restore(path), run))
    if other := [f"{key}={value}" for key, value, _ in differences(then, now)]:
        raise RunError(
            f"{run.run} holds a run with other settings: {', '.join(other)}; give run=ANOTHER_FOLDER, or these settings"
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys, dotted, in which two settings differ, with both values."""
    a, b = _flat(then), _flat(now)
    return [(key, a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


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
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.model is not None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a log; a last one still being written is left out."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def read_run(path: Path) -> Record:
    """Read a run folder, finished or still running. ``RunError`` if it is none."""
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path} is not a run folder (it has no config.yaml)")
    read = {
        name: json.loads((path / name).read_text(encoding="utf-8")) if (path / name).is_file() else None
        for name in ("environment.json", "model.json")
    }
    return Record(
        path,
        yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")),
        read["environment.json"] or {},
        read["model.json"],
        tuple(_lines(path / "metrics.jsonl")),
        tuple(_lines(path / "timings.jsonl")),
    )
