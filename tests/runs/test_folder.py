"""A run's folder through kills, full disks and damage: nothing is lost, and what was changed is named."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vrm.files import NotWritten
from vrm.runs.checkpoint import Checkpoint, checkpoint_path, list_checkpoints
from vrm.runs.errors import RunError
from vrm.runs.folder import RunFolder, open_folder, read_run
from vrm.runs.resumption import newest_checkpoint

from .faults import DAMAGES, every_error, every_kill, failing, files, flip, operations
from .small import STATE

NAMES = ("manifest.json", "state.json", "tensors.safetensors")
"""The files of a checkpoint."""
CARD = {"format": 3, "architecture": "resnet8", "steps": 2, "last": {"top1": 1.0}}


def opened(path: Path, warn: Callable[[str], None] = pytest.fail) -> RunFolder:
    """A folder in which a run has begun."""
    folder = open_folder(path, warn)
    (path / "config.yaml").write_text("seed: 1\n")
    return folder


def line(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "split": "train", "name": "loss", "value": 1 / step}


def save(folder: RunFolder, step: int, *, keep: int = 2) -> None:
    """One step: a line in each log, and a checkpoint."""
    folder.metrics.write(line(step))
    folder.timings.write({"step": step, "epoch": 1, "images_per_second": 1.0, "seconds": 1.0})
    folder.save({"x": torch.full((3,), float(step))}, STATE | {"step": step}, keep=keep)


def log(steps: int) -> bytes:
    return b"".join(json.dumps(line(step)).encode() + b"\n" for step in range(1, steps + 1))


def newest(folder: RunFolder) -> Checkpoint:
    """The newest checkpoint, with its content checked; no newer one is damaged."""
    found, damaged = newest_checkpoint(folder.checkpoints)
    assert found is not None
    assert damaged == []
    assert found.tensors["x"].tolist() == [found.step] * 3
    return found


# ---- the lock --------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    holder = rf"run is in use \(held by process {os.getpid()} on .+\); wait for it, or give run="
    with pytest.raises(RunError, match=holder):
        open_folder(tmp_path / "run", print)
    folder.close()
    open_folder(tmp_path / "run", print).close()
    assert (tmp_path / "run" / "lock").read_text() == ""


def holding(path: Path, *, then: Callable[[], None] = lambda: None) -> int:
    """A forked process that holds the lock of ``path``, and does ``then``; its id, once it holds it."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            folder = open_folder(path, print)
            then()
            os.write(writes, b"x")
            time.sleep(60)
            folder.close()
        finally:
            os._exit(1)
    os.close(writes)
    assert os.read(reads, 1) == b"x"
    os.close(reads)
    return pid


def gone(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("child", ["none", "forked", "started"])
def test_a_dead_process_holds_nothing_whatever_outlives_it(tmp_path: Path, child: str) -> None:
    """A worker that decodes images, a program that was started: both have the parent's files, neither has its lock."""

    def bear() -> None:
        if child == "none":
            return
        if child == "started":
            born = subprocess.Popen(["sleep", "60"], close_fds=False).pid
        elif (born := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        (tmp_path / "child").write_text(str(born))

    pid = holding(tmp_path, then=bear)
    with pytest.raises(RunError, match=f"process {pid} on"):
        open_folder(tmp_path, print)
    gone(pid)
    assert f"process {pid} on" in (tmp_path / "lock").read_text()
    outlived = int((tmp_path / "child").read_text()) if child != "none" else None
    if outlived is not None:
        os.kill(outlived, 0)  # it is there
    try:
        open_folder(tmp_path, print).close()
    finally:
        if outlived is not None:
            os.kill(outlived, signal.SIGKILL)


def test_the_lock_is_no_way_to_overwrite_a_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match="cannot be written"):
        open_folder(tmp_path / "run", print)
    assert (tmp_path / "precious").read_text() == "mine"


def test_whatever_stands_in_a_lock_of_nobody_does_not_matter(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 1000, b"process 1 on here"):
        (tmp_path / "lock").write_bytes(content)
        open_folder(tmp_path, print).close()


# ---- kills -----------------------------------------------------------------------------------------------------------


def test_killed_anywhere_in_a_step_and_its_checkpoint(tmp_path: Path) -> None:
    """A whole checkpoint is found, with its part of the logs; nothing lies about; the step can be taken."""

    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        here: list[RunFolder] = []

        def before() -> None:
            here.append(opened(tmp_path / str(at)))
            for step in (1, 2):
                save(here[0], step, keep=1)

        return before, lambda: save(here[0], 3, keep=1)

    found = []
    for at in every_kill(make):
        folder = opened(tmp_path / str(at))
        checkpoint = newest(folder)
        found.append(checkpoint.step)
        assert folder.metrics.path.read_bytes().startswith(log(checkpoint.step)), "it is on the disk before"
        assert folder.rewind(checkpoint, last_step=9) == []
        assert folder.metrics.path.read_bytes() == log(checkpoint.step)
        for more in range(checkpoint.step + 1, 5):
            save(folder, more, keep=1)
        folder.close()
        kept = [f"checkpoints/step-000000004/{name}" for name in NAMES]
        assert sorted(files(folder.path)) == sorted([*kept, "config.yaml", "lock", "metrics.jsonl", "timings.jsonl"])
        assert folder.metrics.path.read_bytes() == log(4)
    assert at > 20
    assert found == sorted(found)
    assert {*found} == {2, 3}


def test_killed_anywhere_while_a_folder_is_opened_and_taken_back(tmp_path: Path) -> None:
    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        path = tmp_path / str(at)

        def before() -> None:
            folder = opened(path)
            for step in (1, 2, 3):
                save(folder, step)
            folder.metrics.write(line(4))
            folder.close()
            checkpoint_path(folder.checkpoints, 3).rename(folder.checkpoints / ".step-000000003.old")
            for name in (".step-000000009.new", ".step-000000001.gone"):
                shutil.copytree(checkpoint_path(folder.checkpoints, 2), folder.checkpoints / name)
            (path / ".model.json.77.tmp").touch()

        def call() -> None:
            folder = open_folder(path, print)
            folder.rewind(newest(folder), last_step=2)
            folder.close()

        return before, call

    for at in every_kill(make):
        folder = opened(tmp_path / str(at))
        assert folder.rewind(newest(folder), last_step=2) == []
        assert newest(folder).step == 3
        assert folder.metrics.path.read_bytes() == log(3)
        folder.close()
        assert sorted(os.listdir(folder.checkpoints)) == ["step-000000002", "step-000000003"]
        assert list(folder.path.glob(".*")) == []
    assert at > 15


def test_killed_anywhere_while_it_finishes(tmp_path: Path) -> None:
    """With its card all of a run is there; without, it is not finished, and finishing again gives the same."""
    weights = {"best.safetensors": {"x": torch.ones(3)}, "model.safetensors": {"x": torch.zeros(3)}}

    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        here: list[RunFolder] = []

        def before() -> None:
            here.append(opened(tmp_path / str(at)))
            save(here[0], 2)
            here[0].write_weights("best.safetensors", {"x": torch.full((3,), 9.0)})  # of an earlier evaluation

        return before, lambda: here[0].finish(CARD, weights)

    unfinished = 0
    for at in every_kill(make):
        path = tmp_path / str(at)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            finished = read_run(path).finished
        after = files(path)
        unfinished += not finished
        folder = opened(path)
        assert folder.rewind(newest(folder), last_step=2) == []
        folder.finish(CARD, weights)
        folder.close()
        if finished:
            assert {**after, "lock": b""} == {**files(path), "lock": b""}
    assert unfinished > 12
    assert at - unfinished <= 2, "the card is the last"


# ---- which checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    folder = opened(tmp_path / "run")
    for step in (1, 2, 30, 400):
        save(folder, step, keep=keep)
    assert [int(path.name[5:]) for path in list_checkpoints(folder.checkpoints)] == [400, 30, 2, 1][:keep]
    save(folder, 10**9, keep=keep)  # ten digits come after nine
    assert newest(folder).step == 10**9
    assert len(list_checkpoints(folder.checkpoints)) == keep
    folder.close()


def test_damaged_ones_that_were_passed_over_do_not_push_whole_ones_out(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    for step in (2, 4, 6):
        save(folder, step, keep=3)
    for step in (4, 6):
        flip(checkpoint_path(folder.checkpoints, step) / "tensors.safetensors")
    found, damaged = newest_checkpoint(folder.checkpoints)
    assert found is not None
    assert found.step == 2
    for step, text in zip((6, 4), damaged, strict=True):
        assert str(checkpoint_path(folder.checkpoints, step)) in text
    folder.rewind(found, last_step=9)
    save(folder, 3, keep=1)
    assert newest(folder).step == 3
    assert len(list_checkpoints(folder.checkpoints)) == 1
    folder.close()


# ---- logs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [*DAMAGES, "lines behind", "half a line behind"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
def test_a_log_is_cut_back_to_where_the_checkpoint_knew_it(tmp_path: Path, name: str, damage: str) -> None:
    """What is behind is cut off. What is not as it was is kept, and named."""
    folder = opened(tmp_path / "run")
    for step in (1, 2):
        save(folder, step)
    folder.close()
    path = folder.path / name
    before = path.read_bytes()
    behind = {"lines behind": b'{"step": 3}\n' * 3, "half a line behind": b'{"st', "longer": b" x"}.get(damage)
    if behind is None:
        DAMAGES[damage](path)
    else:
        path.write_bytes(before + behind)
    left = path.read_bytes() if path.exists() else b""
    folder = opened(tmp_path / "run")
    told = folder.rewind(newest(folder), last_step=2)
    if behind is not None:
        assert told == []
        assert path.read_bytes() == before
    else:
        assert len(told) == 1
        assert re.fullmatch(
            rf"{re.escape(str(path))} (has [\d,]+ bytes, but the checkpoint knew {len(before):,}|was changed since the "
            "checkpoint was written); it is kept as it is",
            told[0],
        )
        assert path.read_bytes() == left
    save(folder, 3)
    assert folder.metrics.path.read_bytes().endswith(log(3).splitlines(keepends=True)[-1])
    folder.close()


def broken(folder: RunFolder, reason: int) -> contextlib.AbstractContextManager[list[str]]:
    """A disk that takes nothing more of a run's metrics."""
    fail, descriptor = failing(reason), folder.metrics.file.fileno()

    def act(name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if arguments[0] == descriptor:
            fail(name, original, arguments)

    return operations(act, lambda number: True)


def test_lines_that_the_disk_does_not_take_are_written_later(tmp_path: Path) -> None:
    told: list[str] = []
    folder = opened(tmp_path / "run", told.append)
    save(folder, 1)
    with broken(folder, errno.ENOSPC):
        save(folder, 2)
        save(folder, 3)
        assert folder.metrics.path.read_bytes().startswith(log(1))
        assert folder.metrics.lost_lines == 2
    text = "metrics.jsonl cannot be written (No space left on device). Training goes on: its lines are kept in memory"
    assert len(told) == 1, "once"
    assert text in told[0]
    folder.metrics.write(line(4))
    assert folder.metrics.lost_lines == 0
    assert folder.metrics.path.read_bytes() == log(4)
    folder.close()


@pytest.mark.parametrize("resumed", [False, True])
def test_lines_that_the_disk_never_took_are_counted(tmp_path: Path, resumed: bool) -> None:
    """Also by a process that went on after the one that had them in memory."""
    folder = opened(tmp_path / "run", print)
    save(folder, 1)
    with broken(folder, errno.EIO):
        save(folder, 2)
        save(folder, 3)
        if not resumed:
            folder.finish(CARD, {})
        folder.metrics._pending = b"" if resumed else folder.metrics._pending  # as if killed
        folder.close()
    if resumed:
        folder = opened(tmp_path / "run")
        assert folder.rewind(newest(folder), last_step=2) == []
        save(folder, 4)
        folder.finish(CARD, {})
        folder.close()
    record = read_run(tmp_path / "run")
    assert [each["step"] for each in record.metrics] == ([1, 4] if resumed else [1])
    assert record.lost_lines == 2


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_operation_on_a_log_loses_no_line(tmp_path: Path, reason: int) -> None:
    folders: list[RunFolder] = []

    def make(at: int) -> Callable[[], object]:
        folders.append(opened(tmp_path / str(at), print))
        metrics = folders[-1].metrics
        return lambda: [(metrics.write(line(step)), metrics.sync()) for step in (1, 2, 3)]

    for at, error in every_error(reason, make):
        assert error is None, at
        folders[-1].metrics.sync()
        assert folders[-1].metrics.path.read_bytes() == log(3)
        folders[-1].close()
    assert at == 9


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
def test_an_error_at_any_operation_of_a_checkpoint_leaves_the_one_before(tmp_path: Path, reason: int) -> None:
    folders: list[RunFolder] = []

    def make(at: int) -> Callable[[], object]:
        folders.append(opened(tmp_path / str(at), print))
        save(folders[-1], 1, keep=1)
        return lambda: save(folders[-1], 2, keep=1)

    for at, error in every_error(reason, make):
        assert error is None or isinstance(error, NotWritten)
        folder = folders[-1]
        step = newest(folder).step
        assert list(folder.checkpoints.glob(".*.new")) == []
        folder.close()
        folder = opened(tmp_path / str(at))
        found = newest(folder)
        assert found.step == step
        assert folder.rewind(found, last_step=9) == []
        assert folder.metrics.path.read_bytes() == log(step)
        save(folder, step + 1, keep=1)
        assert newest(folder).step == step + 1
        folder.close()
    assert at > 20


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_made_or_written_is_told(tmp_path: Path, reason: int) -> None:
    def make(at: int) -> Callable[[], object]:
        return lambda: open_folder(tmp_path / str(at) / "run", print).close()

    refused = 0
    for at, error in every_error(reason, make):
        if error is not None:
            refused += 1
            assert isinstance(error, RunError)
            assert f"run={tmp_path / str(at) / 'run'} cannot be written ({os.strerror(reason)})" in str(error)
        make(at)()
    assert refused > 6


# ---- the order on the disk -------------------------------------------------------------------------------------------


def traced(call: Callable[[], None]) -> list[tuple[str, str]]:
    """(operation, path) of all by which a call changes the disk, in their order; of a rename the new path."""
    found = []

    def act(name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        path = arguments[1] if name in ("rename", "replace") else arguments[0]
        path = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        found.append(("rename" if name == "replace" else name, path))

    with operations(act, lambda number: True):
        call()
    return found


def test_the_order_on_the_disk(tmp_path: Path) -> None:
    """Data before the manifest, the manifest before the folder's name, that before anything older goes."""
    run = tmp_path / "run"

    def work() -> None:
        folder = open_folder(run, print)
        for step in (1, 2, 3):
            folder.write_weights("best.safetensors", {"x": torch.ones(3)})
            save(folder, step)
        folder.finish(CARD, {"model.safetensors": {"x": torch.ones(3)}})
        folder.close()

    calls = traced(work)

    def at(call: str, path: Path) -> int:
        return calls.index((call, str(path)))

    for step in (1, 2, 3):
        final = run / "checkpoints" / f"step-{step:09d}"
        beside = final.with_name(f".{final.name}.new")
        logs = [run / "metrics.jsonl", run / "timings.jsonl"]
        named = at("rename", final)
        data = [beside / name for name in ("tensors.safetensors", "state.json")]
        for path in data:
            assert at("open", path) < at("write", path) < at("fsync", path) < at("open", beside / "manifest.json")
        assert (
            at("write", beside / "manifest.json") < at("fsync", beside / "manifest.json") < at("fsync", beside) < named
        )
        assert ("fsync", str(final.parent)) in calls[named:]
        for path in logs:
            writes = [i for i, call in enumerate(calls) if call == ("write", str(path))]
            flushes = [i for i, call in enumerate(calls) if call == ("fsync", str(path))]
            flushed = [i for i in flushes if writes[step - 1] < i < at("open", beside / "tensors.safetensors")]
            assert flushed, f"{path} is on the disk before the checkpoint that knows it is begun"
            assert at("open", path) < flushed[0] < named
    gone = at("rename", run / "checkpoints" / ".step-000000001.gone")
    newer = at("rename", run / "checkpoints" / "step-000000003")
    assert ("fsync", str(run / "checkpoints")) in calls[newer:gone], "the new one is there before the oldest goes"
    for i, (call, path) in enumerate(calls):
        if call == "rename" and ".gone" not in path:  # whatever gets its name was flushed, and its folder is after it
            before = next(c for c in reversed(calls[:i]) if c[0] in ("fsync", "write"))
            assert before[0] == "fsync"
            assert ("fsync", str(Path(path).parent)) in calls[i:]
    order = [at("rename", run / name) for name in ("model.safetensors", "manifest.json", "model.json")]
    assert order == sorted(order)
    assert order[-1] == max(i for i, (call, _) in enumerate(calls) if call == "rename"), "the card is the last"
    assert at("fsync", run) < at("open", run / "checkpoints" / ".step-000000001.new" / "tensors.safetensors")
