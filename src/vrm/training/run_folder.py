"""The folder of a run: what is written while it trains, and the one reader of it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml

from vrm.config import Run, restore
from vrm.training import device_name
from vrm.training.files import DamagedCheckpoint, read_checkpoint, write_text


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says why and what to do."""


class Log:
    """A file of JSON lines that can be cut back to where a checkpoint knew it."""

    def __init__(self, path: Path) -> None:
        """Open for appending."""
        self.path = path
        self.file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, object]) -> None:
        """Append one line."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def offset(self) -> int:
        """The length in bytes, once it is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def cut(self, offset: int) -> None:
        """Forget everything behind ``offset``; refused if the file is shorter."""
        size = self.path.stat().st_size
        if size < offset:
            raise RunError(
                f"{self.path} has {size} bytes, its checkpoint knew {offset}: the log was cut by someone else"
            )
        self.file.truncate(offset)
        self.file.seek(offset)


class RunFolder:
    """A run's folder, open for writing, locked against a second writer."""

    def __init__(self, path: Path) -> None:
        """Make or open ``path`` and lock it. ``RunError`` if another process holds it, or it cannot be written."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = (path / "lock").open("w")
        except OSError as error:
            raise RunError(f"run={path} cannot be written ({error.strerror}); give run=ANOTHER_FOLDER") from None
        self.path = path
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise RunError(f"{path} is in use by another process; wait for it, or give run=ANOTHER_FOLDER") from None
        self.checkpoints = path / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        self._sweep()
        self.metrics = Log(path / "metrics.jsonl")
        self.timings = Log(path / "timings.jsonl")

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

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Replace a JSON file of the folder at once."""
        write_text(self.path / name, json.dumps(content, indent=1) + "\n")


def check_settings(run: Run) -> None:
    """``RunError`` naming the keys if the folder of ``run`` holds one with other settings."""
    path = run.run / "config.yaml"
    if not path.is_file():
        return
    then, now = (_flat(settings.model_dump(mode="json")) for settings in (restore(path), run))
    other = [f"{key}={then.get(key)}" for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if other:
        raise RunError(
            f"{run.run} holds a run with other settings: {', '.join(other)}; give run=ANOTHER_FOLDER, or these settings"
        )


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
