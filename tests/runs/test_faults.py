"""Whole runs through full disks, damage and kills: nothing is lost, nothing damaged is believed."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from vrm.config import ConfigError, differing, restore
from vrm.files import NotWritten
from vrm.runs import api as runs
from vrm.runs.checkpoint import DamagedCheckpoint, read_checkpoint, write_checkpoint
from vrm.runs.errors import RunError
from vrm.runs.folder import read_run, read_settings
from vrm.runs.resumption import decide_resumption
from vrm.runs.trainer import Trainer

from .faults import DAMAGES, flip, kill, mounted, operations, remount
from .forked import Forked
from .small import QUIET, assert_same, interrupt, make_teacher, outcome, small, train


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


def test_a_run_on_a_read_only_disk_is_read_and_taught_from_but_not_written(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs") as disk:
        make_teacher(disk / "teacher")
        remount(disk, "remount,ro")
        assert read_run(disk / "teacher").finished
        with pytest.raises(RunError, match=r"teacher cannot be written \(Read-only file system\) at .*lock; give run="):
            runs.resume(disk / "teacher", console=QUIET, quiet=True)
        train(small(tmp_path / "run", "method=kd", f"teacher={disk / 'teacher'}/"))
        words = ("distill", "digits", "method=ce", "student=resnet8", f"run={disk / 'new'}")
        process = Forked(*words, output=tmp_path / "told.txt")
        assert process.wait() == 2, process.text
        assert "Read-only file system" in process.text
        assert "Traceback" not in process.text


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
    original = Trainer._set_rate

    def count(self: Trainer, *arguments: Any) -> None:
        nonlocal step
        step = self.state.step
        original(self, *arguments)

    monkeypatch.setattr(Trainer, "_set_rate", count)
    with full_disk(monkeypatch, lambda: 3 <= step < 6):
        runs.start(small(run, "method=ce", "checkpoint.every=2", "checkpoint.on_error=continue"), console=shown)
    text = shown.file.getvalue()
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
    monkeypatch.setattr("vrm.runs.recorder.open_tensorboard", lambda path: Full())
    runs.start(small(tmp_path / "run", "method=ce", "checkpoint.every=2", "tensorboard=true"), console=shown)
    told = "TensorBoard's files cannot be written (No space left on device); training goes on without them"
    assert shown.file.getvalue().count(told) == 1
    assert_same(whole, tmp_path / "run")


def test_a_full_disk_at_the_very_start_and_at_the_very_end(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with (
        full_disk(monkeypatch, lambda: True),
        pytest.raises(NotWritten, match=r"(sources\.json|config\.yaml) could not be"),
    ):
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
        words = ("distill", "digits", "method=ce", "student=resnet8", "epochs=1", f"run={disk / 'run'}")
        process = Forked(*words, output=tmp_path / "told.txt")
        assert process.wait() in (1, 2), process.text
        assert "Traceback" not in process.text
        assert "more are needed" in process.text or "No space left" in process.text


@pytest.mark.parametrize("damage", ["half", "one bit", "empty", "missing", "zeros"])
@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "timings.jsonl", "environment.json", "taps.json", "sources.json", "lock", "best.safetensors"],
)
def test_damage_to_a_stopped_run_is_told_and_made_good(
    whole: Path, stopped: Path, tmp_path: Path, name: str, damage: str
) -> None:
    """Only of a log what was damaged stays as it is."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    if (run / name).stat().st_size or damage == "missing":
        DAMAGES[damage](run / name)
    shown = Console(file=io.StringIO(), width=300)
    runs.resume(run, console=shown)
    if name == "metrics.jsonl":
        torch.testing.assert_close(outcome(run)[:2], outcome(whole)[:2], rtol=0, atol=0)
        assert outcome(run)[2].endswith("".join(outcome(whole)[2].splitlines(keepends=True)[-4:]))
    else:
        assert_same(whole, run)
    untold = name in ("lock", "best.safetensors", "sources.json") or damage == "one bit"  # what is readable is kept
    assert untold or str(run / name) in shown.file.getvalue()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True))
def test_a_bit_of_the_settings(stopped: Path, tmp_path: Path, place: float) -> None:
    """Refused by name, or one that decides nothing."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run, dirs_exist_ok=True)
    config = run / "config.yaml"
    flip(config, int(place * 8 * config.stat().st_size))
    try:
        decide_resumption(run, read_settings(run)).require()
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
    original = Trainer._set_rate

    def look(self: Trainer, *arguments: Any) -> None:
        seen.append((run / "model.json").exists())
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_set_rate", look)
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
    train(resolved)
    assert_same(whole, run)


FITS_NOT = "the checkpoint of step 6 does not fit this run's networks, as if another version"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, tensors: state.pop("phase"), r"state\.json: phase: Field required"),
        (lambda state, tensors: state.update(best=[1]), r"state\.json: best: Input should be a valid dict"),
        (lambda state, tensors: state.update(meter={"a": "b"}), r"state\.json: meter: "),
        (lambda state, tensors: state.update(rate_scale="x"), r"state\.json: rate_scale: "),
        (lambda state, tensors: state.update(phase="x"), "is in phase 'x', where this run is in phase 'main'"),
        (lambda state, tensors: state["settings"].update(seed=1), "was written with seed=1, but .*yaml says seed=0"),
        (lambda state, tensors: tensors.pop("student.fc.bias"), FITS_NOT),
        (lambda state, tensors: tensors.update({"student.fc.bias": torch.ones(3)}), FITS_NOT),
        (lambda state, tensors: tensors.pop("rng.0.cpu"), FITS_NOT),
        (lambda state, tensors: tensors.update({"rng.0.cpu": torch.ones(3)}), FITS_NOT),
        (lambda state, tensors: tensors.pop("optimizer.0.momentum_buffer"), FITS_NOT),
    ],
)
def test_a_checkpoint_that_is_whole_but_of_something_else_is_explained(
    stopped: Path, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any], message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    shutil.rmtree(run / "checkpoints" / "step-000000004")
    found = read_checkpoint(run / "checkpoints" / "step-000000006")
    change(found.state, found.tensors)
    write_checkpoint(found.path, found.tensors, found.state)
    with pytest.raises((RunError, DamagedCheckpoint), match=message):
        runs.resume(run, console=QUIET, quiet=True)
