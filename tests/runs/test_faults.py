"""A run's folder through kills, full disks, damage and hostile files: nothing is lost, nothing is believed."""

from __future__ import annotations

import ast
import contextlib
import errno
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import vrm
from vrm.config import ConfigError, differing
from vrm.models import load_weights
from vrm.runs import api as runs
from vrm.runs.checkpoint import DamagedCheckpoint, NotWritten, read_checkpoint, read_contents, write_checkpoint
from vrm.runs.folder import Lock, RunError, RunFolder, read_run
from vrm.runs.trainer import Training

from .faults import DAMAGES, every_kill, failing, files, flip, kill, mounted, operations, remount
from .small import QUIET, assert_same, command, interrupt, make_teacher, small, train

SETTINGS = "seed: 1\nrun: runs/a\ndata:\n  root: null\n"


def opened(path: Path, text: str = SETTINGS) -> RunFolder:
    """A folder as a run has it."""
    folder = RunFolder(path)
    (path / "config.yaml").write_text(text)
    return folder


def line(step: int) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "split": "train", "name": "loss", "value": 1 / step}


def save(folder: RunFolder, step: int, *, keep: int = 2) -> None:
    """One step: a line in each log, and a checkpoint."""
    folder.metrics.write(line(step))
    folder.timings.write({"step": step, "epoch": 1, "images_per_second": 1.0, "seconds": 1.0})
    folder.save({"x": torch.full((3,), float(step))}, {"step": step}, keep=keep)


def log(steps: int) -> bytes:
    return b"".join(json.dumps(line(step)).encode() + b"\n" for step in range(1, steps + 1))


def newest(folder: RunFolder) -> tuple[int, list[str]]:
    """The step of the newest checkpoint, with its content checked, and the complaints."""
    found = folder.newest()
    assert found is not None
    tensors, state, complaints = found
    assert tensors["x"].tolist() == [state["step"]] * 3
    return state["step"], complaints


# ---- the lock --------------------------------------------------------------------------------------------------------


def test_a_second_start_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    holder = rf"in use by another process \(process {os.getpid()} on .+\); wait for it, or give run="
    with pytest.raises(RunError, match=holder):
        RunFolder(tmp_path / "run")
    refused: list[str] = []

    def start() -> None:
        with contextlib.suppress(RunError):
            RunFolder(tmp_path / "run")
            return
        refused.append("thread")

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert refused == ["thread"]
    code = f"from pathlib import Path; from vrm.runs.folder import RunFolder; RunFolder({tmp_path / 'run'!r})"
    code = code.replace("PosixPath", "Path")
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(holder, other.stderr)
    folder.close()
    RunFolder(tmp_path / "run").close()
    assert (tmp_path / "run" / "lock").read_text() == ""


def holding(path: Path, *, then: Callable[[], None] = lambda: None) -> int:
    """A forked process that holds the lock of ``path``, and does ``then``; its id, once it holds it."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            folder = RunFolder(path)
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


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    pid = holding(tmp_path)
    with pytest.raises(RunError, match=f"process {pid} on"):
        RunFolder(tmp_path)
    gone(pid)
    assert f"process {pid} on" in (tmp_path / "lock").read_text()
    RunFolder(tmp_path).close()


@pytest.mark.parametrize("kind", ["forked", "started"])
def test_children_that_outlive_a_run_do_not_hold_its_lock(tmp_path: Path, kind: str) -> None:
    """A worker that decodes images, a program that was started: both have the parent's files, neither has its lock."""

    def child() -> None:
        if kind == "started":
            process = subprocess.Popen(["sleep", "60"], close_fds=False)
            (tmp_path / "child").write_text(str(process.pid))
        elif (pid := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        else:
            (tmp_path / "child").write_text(str(pid))

    pid = holding(tmp_path, then=child)
    with pytest.raises(RunError, match=f"process {pid} on"):
        RunFolder(tmp_path)  # the parent does have it
    gone(pid)
    outlived = int((tmp_path / "child").read_text())
    os.kill(outlived, 0)  # it is there
    try:
        RunFolder(tmp_path).close()
    finally:
        os.kill(outlived, signal.SIGKILL)


def test_a_lock_that_was_removed_is_taken_again_or_lost_to_the_faster_one(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    (tmp_path / "run" / "lock").unlink()
    save(folder, 1)
    with pytest.raises(RunError, match="in use"):
        RunFolder(tmp_path / "run")
    (tmp_path / "run" / "lock").unlink()
    other = RunFolder(tmp_path / "run")
    with pytest.raises(RunError, match="lock was removed, and the run taken over by another process"):
        save(folder, 2)
    other.close()


def test_the_lock_is_no_way_to_overwrite_a_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match="cannot be written"):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "mine"


def test_whatever_stands_in_a_lock_of_nobody_does_not_matter(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 1000, b"process 1 on here"):
        (tmp_path / "lock").write_bytes(content)
        RunFolder(tmp_path).close()


def test_starts_at_the_same_time_leave_one(tmp_path: Path) -> None:
    """Locks made, removed and taken by many threads: never two hold it."""
    holders: list[int] = []
    most = []

    def work() -> None:
        for _ in range(30):
            with contextlib.suppress(BlockingIOError):
                lock = Lock(tmp_path / "lock")
                holders.append(1)
                most.append(len(holders))
                holders.pop()
                (tmp_path / "lock").unlink()
                lock.forget()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}


# ---- kills -----------------------------------------------------------------------------------------------------------


def test_killed_anywhere_in_a_step_and_its_checkpoint(tmp_path: Path) -> None:
    """A whole checkpoint is found without a complaint, with its own logs; nothing lies about; the step can be taken."""

    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        path = tmp_path / str(at)
        here: list[RunFolder] = []

        def before() -> None:
            here.append(opened(path))
            for step in (1, 2):
                save(here[0], step, keep=1)

        return before, lambda: save(here[0], 3, keep=1)

    found = []
    for at in every_kill(make):
        folder = RunFolder(tmp_path / str(at))
        step, complaints = newest(folder)
        found.append(step)
        assert complaints == []
        assert folder.metrics.path.read_bytes().startswith(log(step)), "the log is on the disk before its checkpoint"
        assert folder.rewind(step) == []
        assert folder.metrics.path.read_bytes() == log(step)
        for more in range(step + 1, 5):
            save(folder, more, keep=1)
        folder.close()
        assert sorted(files(folder.path)) == sorted(
            ["config.yaml", "lock", "metrics.jsonl", "timings.jsonl"]
            + [f"checkpoints/step-000000004/{name}" for name in
               ("manifest.json", "metrics.jsonl", "state.json", "tensors.safetensors", "timings.jsonl")]
        )  # fmt: skip
        assert folder.metrics.path.read_bytes() == log(4)
    assert at > 25
    assert found == sorted(found)
    assert set(found) == {2, 3}


def test_killed_anywhere_while_a_folder_is_opened_and_taken_back(tmp_path: Path) -> None:
    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        path = tmp_path / str(at)

        def before() -> None:
            folder = opened(path)
            for step in (1, 2, 3):
                save(folder, step)
            folder.close()
            (path / "checkpoints" / "step-000000003").rename(path / "checkpoints" / ".step-000000003.old")
            shutil.copytree(path / "checkpoints" / "step-000000002", path / "checkpoints" / ".step-000000009.new")
            flip(path / "metrics.jsonl", 5)

        def call() -> None:
            folder = RunFolder(path)
            folder.rewind(newest(folder)[0])
            folder.close()

        return before, call

    mended = []
    for at in every_kill(make):
        folder = RunFolder(tmp_path / str(at))
        assert newest(folder) == (3, [])
        told = folder.rewind(3)
        assert len(told) <= 1
        mended.append(told == [])
        assert folder.metrics.path.read_bytes() == log(3)
        folder.close()
        assert sorted(os.listdir(folder.checkpoints)) == ["step-000000002", "step-000000003"]
    assert at > 15
    assert mended == sorted(mended)


CARD = {"architecture": "resnet8", "steps": 2, "last": {"top1": 1.0}}


def test_killed_anywhere_while_it_finishes(tmp_path: Path) -> None:
    """With its card all of a run is there; without, it is not finished, and finishing again gives the same."""
    weights = {"best.safetensors": {"x": torch.ones(3)}, "model.safetensors": {"x": torch.zeros(3)}}

    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        path = tmp_path / str(at)
        here: list[RunFolder] = []

        def before() -> None:
            here.append(opened(path))
            save(here[0], 1)
            here[0].write_weights("best.safetensors", {"x": torch.full((3,), 9.0)})  # of an earlier evaluation

        return before, lambda: here[0].finish(CARD, weights)

    unfinished = 0
    for at in every_kill(make):
        path = tmp_path / str(at)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            record = read_run(path)
        if record.finished:
            after = files(path)
        else:
            unfinished += 1
        folder = RunFolder(path)
        assert newest(folder) == (1, [])
        folder.rewind(1)
        folder.finish(CARD, weights)
        folder.close()
        again = files(path)
        if record.finished:
            assert {**after, "lock": b""} == {**again, "lock": b""}
    assert unfinished > 12
    assert at - unfinished <= 2, "the card is the last"


# ---- which checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    folder = opened(tmp_path / "run")
    for step in (1, 2, 30, 400):
        save(folder, step, keep=keep)
    assert [int(path.name[5:]) for path in folder.saved()] == [400, 30, 2, 1][:keep]
    save(folder, 10**9, keep=keep)  # ten digits come after nine
    assert newest(folder)[0] == 10**9
    assert len(folder.saved()) == keep
    folder.close()


def test_damaged_ones_that_were_passed_over_do_not_push_whole_ones_out(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    for step in (2, 4, 6):
        save(folder, step, keep=3)
    for step in (4, 6):
        flip(folder.checkpoint_path(step) / "tensors.safetensors")
    step, complaints = newest(folder)
    assert step == 2
    assert [str(folder.checkpoint_path(6)) in complaints[0], str(folder.checkpoint_path(4)) in complaints[1]] == [
        True
    ] * 2
    folder.rewind(2)
    save(folder, 3, keep=1)
    assert [path.name for path in folder.saved()] == ["step-000000003"]
    assert newest(folder) == (3, [])
    folder.close()


@pytest.mark.parametrize(
    "name", ["tensors.safetensors", "state.json", "metrics.jsonl", "timings.jsonl", "manifest.json"]
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_a_checkpoint_is_passed_over_by_name(tmp_path: Path, name: str, damage: str) -> None:
    folder = opened(tmp_path / "run")
    for step in (1, 2):
        save(folder, step)
    DAMAGES[damage](folder.checkpoint_path(2) / name)
    step, complaints = newest(folder)
    assert step == 1
    assert len(complaints) == 1
    assert str(folder.checkpoint_path(2) / name) in complaints[0]
    shutil.rmtree(folder.checkpoint_path(1))
    with pytest.raises(
        RunError, match=f"no checkpoint of {re.escape(str(folder.path))} can be used: .*{re.escape(name)}"
    ):
        folder.newest()
    folder.close()


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path) -> None:
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two", SETTINGS.replace("seed: 1", "seed: 2"))
    for step in (1, 2):
        save(one, step)
        save(two, step)
    shutil.rmtree(one.checkpoint_path(2))
    shutil.copytree(two.checkpoint_path(2), one.checkpoint_path(2))
    step, complaints = newest(one)
    assert step == 1
    assert re.search(r"step-000000002: it was written with seed=2, but .*one/config\.yaml says seed=1", complaints[0])
    shutil.rmtree(one.checkpoint_path(1))
    with pytest.raises(RunError, match=r"it was written with seed=2, but .* says seed=1; put that back, or give run="):
        one.newest()


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ("seed: 1", "seed: 3", "seed=1, but .* says seed=3"),
        ("seed: 1\n", "", "seed=1, but .* says seed=None"),
        ("seed: 1", "seed: 1\nviews: 2", "views=None, but .* says views=2"),
        ("seed: 1", "seed: 1\nsteps: 5", None),
        ("seed: 1", "seed: 1 # a note", None),
        ("runs/a", "runs/moved", None),
        ("root: null", "root: /elsewhere", None),
    ],
)
def test_settings_that_decide_the_result_are_those_of_the_checkpoint(
    tmp_path: Path, before: str, after: str, refused: str | None
) -> None:
    folder = opened(tmp_path / "run")
    save(folder, 1)
    (tmp_path / "run" / "config.yaml").write_text(SETTINGS.replace(before, after))
    if refused is None:
        assert newest(folder) == (1, [])
    else:
        with pytest.raises(RunError, match=refused):
            folder.newest()


def test_a_network_may_be_moved_but_not_exchanged() -> None:
    then = {"teacher.name": "runs/t/", "student.name": "resnet8"}
    assert differing(then, {"teacher.name": "elsewhere/t/", "student.name": "resnet8"}) == []
    assert differing(then, {"teacher.name": "resnet20", "student.name": "resnet8"}) == ["teacher.name"]
    assert differing(then, {"teacher.name": "runs/t/", "student.name": "resnet20"}) == ["student.name"]


# ---- logs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [*DAMAGES, "lines behind", "half a line behind"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
def test_a_log_is_what_the_checkpoint_knew(tmp_path: Path, name: str, damage: str) -> None:
    """What is behind is cut off. What is not as it was is written again from the checkpoint, and that is told."""
    folder = opened(tmp_path / "run")
    for step in (1, 2):
        save(folder, step)
    folder.close()
    path = folder.path / name
    before = path.read_bytes()
    behind = {"lines behind": b'{"step": 3}\n' * 3, "half a line behind": b'{"st', "longer": b" x"}.get(damage)
    if behind is not None:
        path.write_bytes(before + behind)
    else:
        DAMAGES[damage](path)
    folder = RunFolder(tmp_path / "run")
    told = folder.rewind(newest(folder)[0])
    assert path.read_bytes() == before
    if behind is not None:
        assert told == []
    else:
        assert len(told) == 1
        assert re.fullmatch(
            rf"{re.escape(str(path))} (has [\d,]+ bytes|was changed); the checkpoint knew {len(before):,}: "
            "written again from there",
            told[0],
        )
    save(folder, 3)
    assert folder.metrics.path.read_bytes() == log(3)
    folder.close()


def test_a_log_whose_lines_the_disk_does_not_take(tmp_path: Path) -> None:
    """Training goes on, warned once; every line is in the checkpoint, and on the disk as soon as it takes them."""
    folder = opened(tmp_path / "run")
    save(folder, 1)
    descriptor = folder.metrics.file.fileno()

    def fail(name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if arguments[0] == descriptor:
            failing(errno.ENOSPC)(name, original, arguments)

    with operations(fail, lambda number: True):
        with pytest.warns(
            UserWarning, match=r"metrics\.jsonl cannot be written \(No space left on device\)\. Training goes on"
        ):
            save(folder, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save(folder, 3)
        assert folder.metrics.missing == 2
        assert folder.metrics.path.read_bytes().startswith(log(1))
    assert (folder.checkpoint_path(3) / "metrics.jsonl").read_bytes() == log(3)
    folder.metrics.write(line(4))
    assert folder.metrics.missing == 0
    assert folder.metrics.path.read_bytes() == log(4)
    folder.close()
    folder = RunFolder(tmp_path / "run")
    folder.rewind(newest(folder)[0])
    assert folder.metrics.path.read_bytes() == log(3)
    folder.close()


def test_lines_that_the_disk_never_took_come_from_the_checkpoint(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    descriptor = folder.metrics.file.fileno()

    def fail(name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if arguments[0] == descriptor:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with operations(fail, lambda number: True):
        with pytest.warns(UserWarning, match=r"metrics\.jsonl cannot be written \(Input/output error\)"):
            save(folder, 1)
        save(folder, 2)
        folder.finish(CARD, {})
        folder.close()
    record = read_run(tmp_path / "run")
    assert record.metrics == ()
    assert record.lost_lines == 2
    folder = RunFolder(tmp_path / "run")
    assert len(folder.rewind(newest(folder)[0])) == 1
    folder.finish(CARD, {})
    folder.close()
    record = read_run(tmp_path / "run")
    assert [each["step"] for each in record.metrics] == [1, 2]
    assert record.lost_lines == 0


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_operation_on_a_log_loses_no_line(tmp_path: Path, reason: int) -> None:
    """Also of a flush: after one that failed the system may have forgotten what it was given."""
    at = 0
    while True:
        folder = opened(tmp_path / str(at))
        with warnings.catch_warnings(), operations(failing(reason), lambda number, at=at: number == at) as done:
            warnings.simplefilter("ignore")
            for step in (1, 2, 3):
                folder.metrics.write(line(step))
                folder.metrics.sync()
        folder.metrics.sync()
        assert folder.metrics.path.read_bytes() == log(3)
        folder.close()
        if at >= len(done):
            break
        at += 1
    assert at == 6


def test_a_log_that_someone_removed_or_changed_meanwhile_is_whole_at_the_end(tmp_path: Path) -> None:
    for number, damage in enumerate(DAMAGES.values()):
        folder = opened(tmp_path / str(number))
        save(folder, 1)
        damage(folder.metrics.path)
        save(folder, 2)
        assert (folder.checkpoint_path(2) / "metrics.jsonl").read_bytes() == log(2)
        folder.finish(CARD, {})
        folder.close()
        assert folder.metrics.path.read_bytes() == log(2)


# ---- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
def test_an_error_at_any_operation_of_a_checkpoint_leaves_the_one_before(tmp_path: Path, reason: int) -> None:
    at = 0
    while True:
        folder = opened(tmp_path / str(at))
        save(folder, 1, keep=1)
        with (
            warnings.catch_warnings(),
            operations(failing(reason), lambda number, at=at: number == at) as done,
            contextlib.suppress(NotWritten),
        ):
            warnings.simplefilter("ignore")
            save(folder, 2, keep=1)
        step, complaints = newest(folder)
        assert complaints == []
        assert [path.name for path in folder.checkpoints.glob(".*.new")] == []
        folder.close()
        folder = RunFolder(tmp_path / str(at))
        assert newest(folder) == (step, [])
        assert folder.rewind(step) == []
        assert folder.metrics.path.read_bytes() == log(step)
        save(folder, step + 1, keep=1)
        assert newest(folder) == (step + 1, [])
        folder.close()
        if at >= len(done):
            break
        at += 1
    assert at > 25


@pytest.mark.filterwarnings("ignore:.*jsonl cannot be written")
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_made_or_written_is_told(tmp_path: Path, reason: int) -> None:
    at = 0
    while True:
        refused = ""
        with operations(failing(reason), lambda number, at=at: number == at) as done:
            try:
                RunFolder(tmp_path / str(at) / "run").close()
            except RunError as error:
                refused = str(error)
        if at >= len(done):
            break
        if refused:
            assert os.strerror(reason) in refused
            assert "cannot be written" in refused
        RunFolder(tmp_path / str(at) / "run").close()
        at += 1
    assert at > 8


def test_a_run_on_a_read_only_disk_is_read_and_taught_from_but_not_written(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs") as disk:
        make_teacher(disk / "teacher")
        remount(disk, "remount,ro")
        assert read_run(disk / "teacher").finished
        with pytest.raises(RunError, match=r"teacher cannot be written \(Read-only file system\); give run="):
            runs.resume(disk / "teacher", console=QUIET, quiet=True)
        train(small(tmp_path / "run", "method=kd", f"teacher={disk / 'teacher'}/"))
        process = command("distill", "digits", "method=ce", "student=resnet8", f"run={disk / 'new'}")
        _, errors = process.communicate()
        assert process.returncode == 2, errors
        assert "Read-only file system" in errors
        assert "Traceback" not in errors


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(small(run, "method=ce", "checkpoint.every=2"))
    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    interrupt(small(run, "method=ce", "checkpoint.every=2"), 6)
    return run


@contextlib.contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, when: Callable[[], bool]) -> Iterator[None]:
    """No file larger than a line of a log can be written while ``when`` holds."""
    write = os.write

    def limited(descriptor: int, content: Any) -> int:
        if len(content) > 200 and when():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        yield


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with (
        full_disk(monkeypatch, lambda: (run / "checkpoints" / "step-000000004").exists()),
        pytest.raises(NotWritten, match="step-000000006 could not be written: No space left on device"),
    ):
        train(small(run, "method=ce", "checkpoint.every=2"))
    assert sorted(os.listdir(run / "checkpoints")) == ["step-000000002", "step-000000004"]
    runs.resume(run, console=QUIET, quiet=True)
    assert_same(whole, run)


def test_a_full_disk_is_told_and_gone_on_from(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``checkpoint.on_error=continue``: the end is the same, only checkpoints are missing."""
    run, shown = tmp_path / "run", Console(file=io.StringIO(), width=200)
    step = 0
    original = Training._set_rate

    def count(self: Training, *arguments: Any) -> None:
        nonlocal step
        step = self.step
        original(self, *arguments)

    monkeypatch.setattr(Training, "_set_rate", count)
    with full_disk(monkeypatch, lambda: 3 <= step < 6):
        runs.start(small(run, "method=ce", "checkpoint.every=2", "checkpoint.on_error=continue"), console=shown)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    for name in ("step-000000004", "step-000000006", "best.safetensors"):
        assert len(re.findall(rf"{name} could not be written: No space left on device", text)) <= 1
    assert text.count("could not be written: No space left on device") >= 2
    assert "training goes on" in text
    assert sorted(os.listdir(run / "checkpoints")) == ["step-000000002", "step-000000008"]
    assert_same(whole, run)


def test_training_goes_on_without_tensorboard(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def add_scalar(self, *arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shown = Console(file=io.StringIO(), width=300)
    monkeypatch.setattr("vrm.runs.trainer.tensorboard_writer", lambda path: Full())
    runs.start(small(tmp_path / "run", "method=ce", "checkpoint.every=2", "tensorboard=true"), console=shown)
    told = "TensorBoard's files cannot be written (No space left on device); training goes on without them"
    assert shown.file.getvalue().count(told) == 1  # type: ignore[attr-defined]
    assert_same(whole, tmp_path / "run")


def test_a_full_disk_at_the_very_start_and_at_the_very_end(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with full_disk(monkeypatch, lambda: True), pytest.raises(NotWritten, match=r"config\.yaml could not be written"):
        train(small(run, "method=ce", "checkpoint.every=2"))
    with (
        full_disk(monkeypatch, lambda: (run / "checkpoints" / "step-000000008").exists()),
        pytest.raises(NotWritten, match=r"best\.safetensors could not be written|model\.safetensors could not be"),
    ):
        train(small(run, "method=ce", "checkpoint.every=2"))
    assert not (run / "model.json").exists()
    runs.resume(run, console=QUIET, quiet=True)
    assert_same(whole, run)


def test_the_command_line_tells_a_full_disk_in_a_sentence(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "-o", "size=30k") as disk:
        process = command("train", "digits", "model=resnet8", "epochs=1", "threads=1", f"run={disk / 'run'}")
        _, errors = process.communicate()
        assert process.returncode in (1, 2), errors
        assert "Traceback" not in errors
        assert "disk" in errors or "No space left" in errors


LOST_BY_NOTHING = ["metrics.jsonl", "timings.jsonl", "environment.json", "taps.json", "lock", "best.safetensors"]


@pytest.mark.parametrize("damage", ["half", "one bit", "empty", "missing", "zeros"])
@pytest.mark.parametrize("name", LOST_BY_NOTHING)
def test_damage_to_a_stopped_run_is_told_and_made_good(
    whole: Path, stopped: Path, tmp_path: Path, name: str, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    if (run / name).stat().st_size or damage == "missing":
        DAMAGES[damage](run / name)
    shown = Console(file=io.StringIO(), width=300)
    runs.resume(run, console=shown)
    assert_same(whole, run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_run(run)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert name in ("lock", "best.safetensors") or str(run / name) in text


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True))
def test_a_bit_of_the_settings(stopped: Path, tmp_path: Path, place: float) -> None:
    """Refused by name, or one that decides nothing."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run, dirs_exist_ok=True)
    config = run / "config.yaml"
    flip(config, int(place * 8 * config.stat().st_size))
    try:
        from vrm.config import restore

        restore(config)
        folder = RunFolder(run)
        try:
            folder.newest()
        finally:
            folder.close()
    except (ConfigError, RunError) as error:
        assert "config.yaml" in str(error) or "=" in str(error)  # noqa: PT017
    else:
        assert differing(restore(stopped / "config.yaml"), restore(run / "config.yaml")) == []


@pytest.mark.filterwarnings("ignore:.*was changed after the run had ended")
@pytest.mark.parametrize("name", ["model.json", "metrics.jsonl", "timings.jsonl", "config.yaml", "environment.json"])
def test_a_finished_run_that_was_changed_is_noticed_by_its_readers(whole: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    content = (run / name).read_text()
    number = re.search(r"\d(?=\D*$)", content)
    assert number is not None
    (run / name).write_text(content[: number.start()] + str(9 - int(number[0])) + content[number.end() :])
    if name == "environment.json":
        with pytest.raises(RunError, match=r"environment\.json does not have the SHA-256 in its seal"):
            read_run(run)
    else:
        with pytest.warns(UserWarning, match=rf"{re.escape(name)} was changed after the run had ended"):
            read_run(run)
    (run / name).write_text("[")
    if name.endswith(".jsonl"):  # the line may still be being written
        read_run(run)
    else:
        with pytest.raises(RunError, match=re.escape(str(run / name))):
            read_run(run)


def test_a_run_that_is_trained_again_is_not_finished(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flip(run / "checkpoints" / "step-000000008" / "tensors.safetensors")
    seen = []
    original = Training._set_rate

    def look(self: Training, *arguments: Any) -> None:
        seen.append((run / "model.json").exists())
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_set_rate", look)
        runs.resume(run, console=QUIET, quiet=True)
    assert seen == [False, False]
    assert_same(whole, run)


def test_links_that_lead_nowhere_are_passed_over(whole: Path, stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for path in (run / "best.safetensors", run / "checkpoints" / "step-000000006" / "tensors.safetensors"):
        path.unlink()
        path.symlink_to("nowhere")
    runs.resume(run, console=QUIET, quiet=True)
    assert_same(whole, run)


@pytest.mark.parametrize("at", [0.1, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.99])
def test_killed_at_an_operation_of_a_whole_run(whole: Path, tmp_path: Path, at: float) -> None:
    run = tmp_path / "run"
    resolved = small(run, "method=ce", "checkpoint.every=2")
    with operations(kill, lambda number: False) as done:
        train(small(tmp_path / "counted", "method=ce", "checkpoint.every=2"))
    place = int(at * len(done))
    pid = os.fork()
    if pid == 0:
        try:
            with operations(kill, lambda number: number == place):
                train(resolved)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    if (run / "config.yaml").is_file():
        runs.resume(run, console=QUIET, quiet=True)
    else:
        train(resolved)
    assert_same(whole, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, tensors: state.pop("phase"), "is none of a training: phase: Field required"),
        (
            lambda state, tensors: state.update(best=[1]),
            "is none of a training: best: Input should be a valid dict",
        ),
        (
            lambda state, tensors: state["best"].pop("loss"),
            "is none of a training: best: .* epoch and loss",
        ),
        (
            lambda state, tensors: state["last"].pop("epoch"),
            "is none of a training: last: .* epoch and loss",
        ),
        (lambda state, tensors: state.update(phase="x"), "and phase 'x' is of no run that has 8 "),
        (lambda state, tensors: state.update(meter={"a": "b"}), "is none of a training: meter"),
        (lambda state, tensors: state.update(rate_scale="x"), "is none of a training: rate_scale"),
        (lambda state, tensors: state.clear() or state.update(step=6), "is none of a training"),
        (
            lambda state, tensors: tensors.pop("student.fc.bias"),
            "does not fit this run's networks, as if another version",
        ),
        (lambda state, tensors: tensors.update({"student.fc.bias": torch.ones(3)}), "does not fit this run's networks"),
        (lambda state, tensors: tensors.pop("rng.0.cpu"), "does not fit this run's networks"),
        (lambda state, tensors: tensors.update({"rng.0.cpu": torch.ones(3)}), "does not fit this run's networks"),
        (lambda state, tensors: tensors.pop("optimizer.0.momentum_buffer"), "does not fit this run's networks"),
    ],
)
def test_a_checkpoint_that_is_whole_but_of_something_else_is_explained(
    stopped: Path, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any], message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    newest_one = run / "checkpoints" / "step-000000006"
    tensors, state = read_checkpoint(newest_one)
    contents = read_contents(newest_one)
    change(state, tensors)
    write_checkpoint(newest_one, tensors, state, {name: contents[name] for name in contents if name.endswith("l")})
    with pytest.raises(DamagedCheckpoint, match=f"the checkpoint of step 6 {message}"):
        runs.resume(run, console=QUIET, quiet=True)


# ---- hostile files ---------------------------------------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("form", ["archive", "pickle"])
def test_no_pickle_is_ever_run(whole: Path, tmp_path: Path, form: str) -> None:
    """As teacher, as student, as a run folder, as every single file of one: nothing is run, everything is explained."""
    sentinel = tmp_path / "executed"
    evil = tmp_path / "evil.pth"
    if form == "archive":
        torch.save({"model": Evil(sentinel)}, evil)
    else:
        evil.write_bytes(pickle.dumps(Evil(sentinel)))
    bytes_ = evil.read_bytes()
    names = [evil, *(evil.with_suffix(suffix) for suffix in (".pt", ".tar", ".safetensors", ".ckpt"))]
    for path in names:
        path.write_bytes(bytes_)
        for words in (
            ["method=kd", "teacher=resnet8", f"teacher.weights={path}"],
            ["method=ce", f"student.weights={path}"],
            ["method=kd", f"teacher={path}"],
        ):
            with pytest.raises((ConfigError, RunError), match=re.escape(str(path))):
                train(small(tmp_path / "run", *words))
        with pytest.raises(RunError, match="is not a run folder"):
            runs.resume(path, console=QUIET, quiet=True)
    shutil.copytree(whole, tmp_path / "whole")
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file():
            before = path.read_bytes()
            path.write_bytes(bytes_)
            with contextlib.suppress(ConfigError, RunError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_run(tmp_path / "whole")
                folder = RunFolder(tmp_path / "whole")
                try:
                    folder.newest()
                finally:
                    folder.close()
            with contextlib.suppress(ConfigError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                small(tmp_path / "x", "method=kd", f"teacher={tmp_path / 'whole'}/")
            with contextlib.suppress(ValueError):
                load_weights(vrm.models.create("resnet8", num_classes=10), tmp_path / "whole")  # type: ignore[attr-defined]
            path.write_bytes(before)
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(Evil(sentinel)))
    assert sentinel.exists(), "it would have worked"


def test_a_card_cannot_have_other_files_opened(whole: Path, tmp_path: Path) -> None:
    """Options on a card reach the network's constructor; those of timm that name files of weights are refused."""
    pytest.importorskip("timm")
    sentinel, evil = tmp_path / "executed", tmp_path / "evil.pth"
    torch.save(Evil(sentinel), evil)
    shutil.copytree(whole, tmp_path / "teacher")
    card = json.loads((tmp_path / "teacher" / "model.json").read_text())
    (tmp_path / "teacher" / "manifest.json").unlink()
    for options in (
        {"checkpoint_path": str(evil)},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(evil)}},
        {"pretrained": True, "pretrained_cfg": {"file": str(evil), "architecture": "resnet10t"}},
    ):
        changed = card | {"architecture": "timm:resnet10t", "options": options}
        (tmp_path / "teacher" / "model.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match="would load weights unchecked"):
            train(small(tmp_path / "run", "method=kd", f"teacher={tmp_path / 'teacher'}/"))
    assert not sentinel.exists()


def test_what_a_run_leaves_is_text_and_safetensors(whole: Path) -> None:
    for path in whole.rglob("*"):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        else:
            content.decode("utf-8")
        assert not content.startswith((b"PK", b"\x80"))
        with pytest.raises((ValueError, IndexError)):
            list(pickletools.genops(content[:100_000] or b"{"))


CODE = sorted(Path(vrm.__file__).parent.rglob("*.py"))
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.dump", "pickle.dumps", "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open"),
    *("torch.save", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "joblib.load"),
    *("cloudpickle.dump", "dill.load", "numpy.load", "np.load", "tempfile.mktemp", "extractall", "unpack_archive"),
}


def called(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_the_source_runs_no_foreign_code() -> None:
    """No pickle is written or opened with code, no eval, no shell, no unsafe YAML; the exceptions are named."""
    allowed = {("words.py", "yaml.load")}  # with a loader of its own, stricter than the safe one
    found = set()
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = called(node.func)
            words = {keyword.arg: keyword.value for keyword in node.keywords}
            where = f"{path}:{node.lineno}"
            if name in FORBIDDEN or name.rpartition(".")[2] in ("extractall", "unpack_archive"):
                found.add((path.name, name))
            if name == "torch.load":
                assert isinstance(words.get("weights_only"), ast.Constant), where
                assert words["weights_only"].value is True, where  # type: ignore[attr-defined]
            assert "shell" not in words, where
            assert "allow_pickle" not in words, where
            if name.endswith("Unpickler"):
                assert path.name == "pickles.py", where
    assert found == allowed


# ---- the order on the disk -------------------------------------------------------------------------------------------


TRACED = """
import sys, torch
from pathlib import Path
from vrm.runs.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
for step in (1, 2, 3):
    folder.metrics.write({"step": step, "epoch": 1, "split": "train", "name": "loss", "value": 1.0})
    folder.timings.write({"step": step, "epoch": 1, "images_per_second": 1.0, "seconds": 1.0})
    folder.write_weights("best.safetensors", {"x": torch.ones(3)})
    folder.save({"x": torch.ones(3)}, {"step": step}, keep=2)
folder.finish({"steps": 3}, {"model.safetensors": {"x": torch.ones(3)}})
folder.close()
"""


def traced(folder: Path) -> list[tuple[str, str]]:
    """(call, path) of each system call by which a process that runs ``TRACED`` changes ``folder``, in their order."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    output = folder.with_suffix(".strace")
    calls = (
        "openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,ftruncate"
    )
    script = folder.with_suffix(".py")
    script.write_text(TRACED)
    line = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={calls}", "-o", output, sys.executable, script, folder]
    done = subprocess.run(line, capture_output=True, text=True, check=False)  # type: ignore[arg-type]
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"strace: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found = []
    for text in output.read_text().splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)\) = (\d+)", text)
        if match is None or str(folder) not in text:
            continue
        call, arguments, _ = match.groups()
        paths = re.findall(rf"({re.escape(str(folder))}[^\">,]*)", arguments)
        if call == "openat" and "O_CREAT" not in arguments:
            continue
        call = {"pwrite64": "write", "openat": "create"}.get(call, call.removesuffix("at2").removesuffix("at"))
        found.append((call, paths[-1] if call == "rename" else paths[0]))
    return found


def test_the_order_of_system_calls(tmp_path: Path) -> None:
    """Data before the manifest, the manifest before the folder's name, that before anything older goes."""
    run = tmp_path / "run"
    calls = traced(run)

    def at(call: str, path: Path) -> int:
        return calls.index((call, str(path)))

    for step in (1, 2, 3):
        final = run / "checkpoints" / f"step-{step:09d}"
        beside = final.with_name(f".{final.name}.new")
        logs = [run / "metrics.jsonl", run / "timings.jsonl"]
        named = at("rename", final)
        data = [beside / name for name in ("tensors.safetensors", "state.json", "metrics.jsonl", "timings.jsonl")]
        for path in data:
            assert at("create", path) < at("write", path) < at("fsync", path) < at("create", beside / "manifest.json")
        assert (
            at("write", beside / "manifest.json") < at("fsync", beside / "manifest.json") < at("fsync", beside) < named
        )
        assert ("fsync", str(final.parent)) in calls[named:]
        for path in logs:
            writes = [i for i, call in enumerate(calls) if call == ("write", str(path))]
            flushes = [i for i, call in enumerate(calls) if call == ("fsync", str(path))]
            flushed = [i for i in flushes if writes[step - 1] < i < at("create", beside / "tensors.safetensors")]
            assert flushed, f"{path} is on the disk before the checkpoint that knows it is begun"
            assert at("create", path) < flushed[0] < named
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
    assert at("fsync", run) < at("create", run / "checkpoints" / ".step-000000001.new" / "tensors.safetensors")
