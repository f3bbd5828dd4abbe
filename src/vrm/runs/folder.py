"""The folder of a run: what is written while it trains, and the one reader of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrm import config, models, tasks
from vrm.config import ConfigError, Resolved, Run, read_yaml
from vrm.files import (
    Damaged,
    Locked,
    explained,
    fsync,
    locked,
    make_folder,
    read_bytes,
    read_json,
    remove_remains,
    user_path,
    write_json,
    write_text,
)
from vrm.models.card import FORMAT
from vrm.runs.checkpoint import Checkpoint, checkpoint_path, list_checkpoints, remove_checkpoints, write_checkpoint
from vrm.runs.errors import RunError
from vrm.runs.logs import METRICS, TIMINGS, Log, check_mark, read_log
from vrm.tasks import Task

SETTINGS, SOURCES, ENVIRONMENT, TAPS = "config.yaml", "sources.json", "environment.json", "taps.json"
TEACHER, SKIPPED, CARD, MANIFEST = "teacher.json", "skipped.json", "model.json", "manifest.json"
NONFINITE = "nonfinite.json"


class RunFolder:
    """A run's folder, open for writing and locked against a second writer."""

    def __init__(self, path: Path, lock: contextlib.ExitStack, warn: Callable[[str], None]) -> None:
        """Use :func:`open_folder`, which takes the lock."""
        self.path, self._lock = path, lock
        self.checkpoints = path / "checkpoints"
        make_folder(self.checkpoints)
        for folder in (path, self.checkpoints):
            remove_remains(folder)
        self.metrics, self.timings = (Log(path / name, warn) for name in (METRICS, TIMINGS))
        fsync(path)

    @property
    def logs(self) -> tuple[Log, Log]:
        """Both logs."""
        return self.metrics, self.timings

    def close(self) -> None:
        """Close the logs and give the lock back."""
        for log in self.logs:
            log.close()
        self._lock.close()

    @property
    def is_new(self) -> bool:
        """Whether no run has begun here."""
        return not (self.path / SETTINGS).exists()

    def write_settings(self, resolved: Resolved) -> None:
        """Write all settings, and where each that was given or applied came from."""
        write_json(self.path / SOURCES, resolved.sources)
        write_text(self.path / SETTINGS, config.dump(resolved.run))

    def forget_settings(self) -> None:
        """Leave the folder free for another run, if nothing was trained here."""
        if not list_checkpoints(self.checkpoints):
            (self.path / SETTINGS).unlink(missing_ok=True)

    # ---- checkpoints

    def save(self, tensors: Mapping[str, Any], state: Mapping[str, Any], *, keep: int) -> None:
        """Flush the logs, write the checkpoint of ``state["step"]``, and leave the ``keep`` newest.

        Raise :class:`~vrm.files.NotWritten` if the disk does not take it; the checkpoints before are as they were.
        """
        for log in self.logs:
            log.sync()
        marks = {"logs": {log.path.name: log.mark for log in self.logs}}
        write_checkpoint(checkpoint_path(self.checkpoints, state["step"]), tensors, {**state, **marks})
        remove_checkpoints(self.checkpoints, step=state["step"], keep=keep)

    def rewind(self, checkpoint: Checkpoint | None, *, last_step: int) -> list[str]:
        """Take the logs back to a checkpoint, or to nothing; return what is wrong with them up to there.

        The card of a finished run is removed, unless the checkpoint is that of its end and the run ends there.
        """
        if checkpoint is None or not checkpoint.step == last_step == (read_card(self.path) or {}).get("steps"):
            self._withdraw_card()
        problems = []
        for log in self.logs:
            mark: dict[str, Any] = {"bytes": 0, "lost": 0}
            if checkpoint is not None:
                mark = checkpoint.state["logs"][log.path.name]
            if checkpoint is not None and (problem := check_mark(log.path, mark)):
                problems.append(f"{problem}; it is kept as it is")
            log.cut_back(min(mark["bytes"], log.size), lost=mark["lost"])
        return problems

    def _withdraw_card(self) -> None:
        card = self.path / CARD
        if card.exists():
            with explained(card, "could not be removed"):
                os.unlink(card)
                fsync(self.path)

    # ---- other files

    def write_once(self, name: str, content: Mapping[str, object], *, keep: bool) -> list[str]:
        """Write a JSON file; with ``keep``, only if there is no readable one. Return what was wrong with it."""
        wrong = []
        if keep:
            try:
                read_json(self.path / name)
                return []
            except Damaged as error:
                wrong = [f"{error}: written again"]
        write_json(self.path / name, content)
        return wrong

    def write_weights(self, name: str, tensors: Mapping[str, Any]) -> None:
        """Replace a file of weights at once. Raise :class:`~vrm.files.NotWritten` if that fails."""
        with explained(self.path / name):
            models.save_tensors(tensors, self.path / name)

    def finish(self, card: Mapping[str, object], weights: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the weights, a manifest of all files, and last of all ``model.json``: with it the run is finished.

        If the disk still does not take lines of a log, the card says how many are lost.
        """
        for name, tensors in weights.items():
            self.write_weights(name, tensors)
        for log in self.logs:
            log.sync()
        lost = {log.path.name: log.lost_lines for log in self.logs if log.lost_lines}
        text = json.dumps({**card, "lost_lines": lost} if lost else card, indent=1) + "\n"
        names = (SETTINGS, SOURCES, ENVIRONMENT, TAPS, TEACHER, SKIPPED, METRICS, TIMINGS, *weights)
        sums = {name: _sha256(read_bytes(self.path / name)) for name in names if (self.path / name).is_file()}
        write_json(self.path / MANIFEST, {"sha256": sums | {CARD: _sha256(text.encode())}})
        write_text(self.path / CARD, text)


def open_folder(path: Path, warn: Callable[[str], None]) -> RunFolder:
    """Make or open a run's folder and lock it. Raise ``RunError`` if it is in use or cannot be written.

    ``warn`` is called when a log cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            make_folder(path)
            stack.enter_context(locked(path / "lock"))
            folder = RunFolder(path, stack, warn)
        except Locked as error:
            raise RunError(f"{path} is in use ({error}); wait for it, or give run=ANOTHER_FOLDER") from None
        except OSError as error:
            where = f" at {error.filename}" if error.filename else ""
            text = f"run={path} cannot be written ({error.strerror}){where}"
            raise RunError(f"{text}; give run=ANOTHER_FOLDER") from None
        folder._lock = stack.pop_all()
        return folder


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """A run as checks, tables and figures read it. A file that is not there yet is None, or empty."""

    path: Path
    config: dict[str, Any]
    sources: dict[str, str]
    environment: dict[str, Any]
    taps: dict[str, Any]
    teacher: dict[str, Any] | None
    """What was measured of the teacher on the test images."""
    model: dict[str, Any] | None
    """The card of the finished run."""
    metrics: tuple[dict[str, Any], ...]
    timings: tuple[dict[str, Any], ...]

    def curve(self, split: str, name: str) -> list[tuple[int, float]]:
        """Return ``(epoch, value)`` of one metric, at each epoch's last reading."""
        found = {
            line["epoch"]: line["value"] for line in self.metrics if (line["split"], line["name"]) == (split, name)
        }
        return sorted(found.items())

    @property
    def task(self) -> Task | None:
        """What the networks of the run are trained for; None before training began."""
        return tasks.load(self.environment["task"]) if "task" in self.environment else None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.model is not None

    @property
    def lost_lines(self) -> int:
        """Number of lines of ``metrics.jsonl`` that the disk did not take; 0 of a run that is not finished."""
        return int(((self.model or {}).get("lost_lines") or {}).get(METRICS, 0))


def is_run(path: Path) -> bool:
    """Return whether a run has begun in this folder."""
    return (path / SETTINGS).is_file()


def require_run(path: Path) -> None:
    """Raise ``RunError`` unless the folder holds a run of this version's format."""
    if not is_run(path):
        raise RunError(f"{path} is not a run folder (it has no {SETTINGS}); give the folder of a run, like runs/NAME")
    try:
        found = read_json(path / ENVIRONMENT)
    except Damaged:
        return  # missing or damaged: its checkpoints and its card tell their format too
    if found.get("format") != FORMAT:
        raise RunError(
            f"{path} was written by vrm {found.get('vrm', '(unknown)')} in format {found.get('format', 2)}; this "
            f"version reads format {FORMAT} alone. Use that version for it, or give run=ANOTHER_FOLDER"
        )


def read_settings(path: Path) -> Run:
    """Return the settings of the run in a folder. Raise ``RunError`` or ``ConfigError`` if they cannot be read."""
    require_run(path)
    return config.restore(path / SETTINGS).model_copy(update={"run": path})


def read_sources(path: Path) -> dict[str, str]:
    """Return where the settings of a run came from; nothing if that is missing or damaged."""
    try:
        return read_json(path / SOURCES)
    except Damaged:
        return {}


def read_run(path: str | Path) -> Record:
    """Read a run folder, finished or still running. Raise ``RunError`` if it is none, or a file of it is damaged.

    Warn about files of a finished run that were changed afterwards.
    """
    path = user_path(path)
    require_run(path)
    try:
        names = (SOURCES, ENVIRONMENT, TAPS, TEACHER, CARD)
        read = {name: read_json(path / name) if (path / name).exists() else None for name in names}
        settings = read_yaml(read_bytes(path / SETTINGS), str(path / SETTINGS))
        metrics, timings = (read_log(path / name) for name in (METRICS, TIMINGS))
        for problem in changed_files(path, (ENVIRONMENT, CARD, SETTINGS, METRICS, TIMINGS)):
            warnings.warn(problem, stacklevel=2)
    except (Damaged, ConfigError) as error:
        raise RunError(str(error)) from None
    found = {name: read[name] or {} for name in (SOURCES, ENVIRONMENT, TAPS)}
    teacher = read[TEACHER] if is_teacher_record(read[TEACHER] or {}) else None
    return Record(
        path, settings, found[SOURCES], found[ENVIRONMENT], found[TAPS], teacher, read[CARD], metrics, timings
    )


def read_card(path: Path) -> dict[str, Any] | None:
    """Return the content of ``model.json`` of a finished run; None if it is missing or damaged."""
    try:
        return read_json(path / CARD)
    except Damaged:
        return None


def is_teacher_record(record: Mapping[str, Any]) -> bool:
    """Return whether ``teacher.json`` holds a measurement: a key, a number of images, and the task's finite scores."""
    scores = record.get("scores")
    try:
        primary = tasks.load(str(record.get("task"))).primary.key
    except ValueError:
        return False
    return (
        isinstance(record.get("key"), str)
        and isinstance(record.get("images"), int)
        and isinstance(scores, dict)
        and primary in scores
        and all(isinstance(value, float | int) and math.isfinite(value) for value in scores.values())
    )


def read_teacher_record(path: Path) -> dict[str, Any] | None:
    """Return what an earlier start measured of the teacher; None if that is missing or damaged."""
    try:
        record = read_json(path / TEACHER)
    except Damaged:
        return None
    return record if is_teacher_record(record) else None


def changed_files(path: Path, names: tuple[str, ...] | None = None) -> Iterator[str]:
    """Yield what is wrong with the files of a finished run, by its manifest: of these names, or of all.

    Raise :class:`~vrm.files.Damaged` if the manifest cannot be read.
    """
    if not (path / CARD).exists() or not (path / MANIFEST).exists():
        return
    sums = read_json(path / MANIFEST).get("sha256")
    for name, expected in sorted(sums.items()) if isinstance(sums, dict) else ():
        file = path / Path(name).name
        if names is not None and (name not in names or not file.exists()):
            continue
        try:
            found = _sha256(read_bytes(file))
        except Damaged as error:
            yield str(error)
        else:
            if found != expected:
                yield f"{file} was changed after the run had ended: it does not have its SHA-256 in {MANIFEST}"
