"""``vrm doctor``: every fault of a run and of its folder gets a row, and nothing is changed."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.runs.own import DIGITS, Net
from tests.runs.small import QUIET, interrupt, make_teacher, small, train
from vrm.cli import main
from vrm.models import create, save_weights
from vrm.runs import api as runs
from vrm.runs import environment
from vrm.runs.checkpoint import read_checkpoint, write_checkpoint
from vrm.runs.checks.folder import examine_run
from vrm.runs.checks.table import Check, CheckReport
from vrm.runs.errors import RunError

Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Exit code and output of the command."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vrm", "doctor", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return int(stop.value.code or 0), shown.out + shown.err

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a distillation that came to its end."""
    base = tmp_path_factory.mktemp("runs")
    teacher = make_teacher(base / "teacher")
    train(small(base / "run", "method=kd", f"teacher={teacher}/"))
    return base / "run"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped at step 5 of 8."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    interrupt(small(folder, "method=ce", "checkpoint.every=2"), 5)
    return folder


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to / "run")
    return to / "run"


def rows(path: Path) -> dict[str, Check]:
    """The checks of a folder, the worst of each name."""
    found: dict[str, Check] = {}
    for check in examine_run(path, console=QUIET).checks:
        if check.name not in found or found[check.name].result == "ok":
            found[check.name] = check
    return found


def listing(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Every file and folder, with mode, time of change and content."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [folder, *folder.rglob("*")]
    }


class TestBeforeARun:
    def test_all_is_well(self, doctor: Doctor, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        code, shown = doctor("digits", "method=vid", "student=resnet8", f"teacher={finished.parent / 'teacher'}/")
        assert code == 0, shown
        for text in (
            "train data      ok    1,438 images of 8x8, 64 of them read; 10 classes, from 139 images (8) to 146 (1)",
            "matched: stage1 16x8x8 with stage1 16x8x8, stage2",
            "teacher         ok    teacher resnet8: top-1",
            "one step        ok    forward and backward in float32 on batches of 64: loss",
            "disk            ok",
        ):
            assert text in shown
        assert list(tmp_path.iterdir()) == []

    def test_a_network_alone(self, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        code, shown = doctor("digits", "model=resnet8")
        assert code == 0, shown
        assert "ce in runs/digits-resnet8-ce-seed0" in shown
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["method=kd", "student=resnet8", "teacher=resnet8", "teacher.weights=W"], "hardly above chance"),
            (["method=kd", "student=resnet8", "teacher=resnet20", "teacher.weights=W"], "does not fit ResNet"),
            (["method=ce", "student=resnet9"], "unknown network 'resnet9'; did you mean 'resnet8'"),
            (["model=resnet8", "batch_size=1437"], "leave a last batch of one"),
            (["model=resnet8", "data.root=."], "data            fail  data=digits: the digits come with scikit-learn"),
            (["model=resnet8", "run=held"], "held/config.yaml"),
        ],
    )
    def test_a_fault_has_a_row_and_code_1(
        self, words: list[str], message: str, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        torch.manual_seed(0)
        save_weights(create("resnet8", num_classes=10), "W")
        Path("W").rename("w.safetensors")
        Path("held").mkdir()
        Path("held/config.yaml").write_text("")
        before = listing(tmp_path)
        code, shown = doctor("digits", *[word.replace("=W", "=w.safetensors") for word in words])
        assert code == 1, shown
        assert message in shown
        assert " fail  " in shown
        assert listing(tmp_path) == before

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["digitz", "model=resnet8"], "did you mean 'digits'"),
            (["digits", "model=resnet8", "sed=3"], "unknown key 'sed'"),
            (["digits", "model=resnet8", "seed"], "'seed' is not of the form key=value"),
            (["digits"], "no network to train"),
            (["no/where"], "no/where is not a run folder"),
            ([".", "seed=3"], "is the folder of a run and holds its settings; leave 'seed=3' out"),
            (["."], ". is not a run folder"),
        ],
    )
    def test_wrong_usage_has_code_2(
        self, words: list[str], message: str, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code, shown = doctor(*words)
        assert code == 2
        assert message in shown
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_without_room(self, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        code, shown = doctor("digits", "model=resnet8")
        assert code == 1
        assert "more are needed at" in shown
        assert "10 B are free; make room, lower checkpoint.keep, or give run=FOLDER" in shown

    def test_a_folder_that_cannot_be_written(
        self, doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        code, shown = doctor("digits", "model=resnet8")
        assert code == 1
        assert f"{tmp_path} cannot be written; give run=ANOTHER_FOLDER" in shown


class TestAFolder:
    def test_nothing_in_it_changes(self, doctor: Doctor, stopped: Path, finished: Path) -> None:
        for folder in (stopped, finished):
            before = listing(folder.parent)
            code, shown = doctor(str(folder))
            assert code == 0, shown
            assert listing(folder.parent) == before

    def test_a_stopped_run(self, stopped: Path) -> None:
        found = rows(stopped)
        assert {check.result for check in found.values()} == {"ok"}
        assert found["checkpoints"].detail == "2 whole: step-000000005, step-000000004"
        assert found["resume"].detail == "goes on at step 5 of 8, in epoch 2 of 2"
        assert found["metrics log"].detail == "as the newest checkpoint knew it"

    def test_a_finished_run(self, finished: Path) -> None:
        found = rows(finished)
        assert {check.result for check in found.values()} == {"ok"}
        assert found["resume"].detail == "finished at step 8: resuming trains nothing, and writes the same result"
        assert "recorded" in found["teacher"].detail

    def test_a_run_without_checkpoint(self, stopped: Path, tmp_path: Path) -> None:
        folder = copied(stopped, tmp_path)
        shutil.rmtree(folder / "checkpoints")
        found = rows(folder)
        assert found["checkpoints"].detail == "0 whole"
        assert found["resume"].detail == "starts from step 0 of 8"

    def test_what_resuming_does_is_what_was_said(self, stopped: Path, tmp_path: Path) -> None:
        folder = copied(stopped, tmp_path)
        runs.resume(folder, console=QUIET, quiet=True)
        assert rows(folder)["resume"].detail.startswith("finished at step 8")

    def test_a_live_run_is_locked(self, stopped: Path, tmp_path: Path) -> None:
        folder = copied(stopped, tmp_path)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert rows(folder)["lock"].result == "fail"
        assert rows(folder)["lock"].result == "ok"

    @pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
    def test_a_damaged_checkpoint_is_named(self, name: str, stopped: Path, tmp_path: Path) -> None:
        folder = copied(stopped, tmp_path)
        newest, older = sorted((folder / "checkpoints").iterdir(), reverse=True)
        content = bytearray((newest / name).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)
        found = rows(folder)
        assert found["checkpoints"].result == "note"
        assert str(newest) in found["checkpoints"].detail
        assert "goes on at step 4 of 8" in found["resume"].detail
        (older / name).unlink()
        found = rows(folder)
        assert found["checkpoints"].result == "fail"
        assert "0 whole; 2 damaged" in found["checkpoints"].detail

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda text: text[: len(text) // 2], "bytes, but the checkpoint knew"),
            (lambda text: "", "has 0 bytes, but the checkpoint knew"),
            (lambda text: text.replace('"step"', '"stop"', 1), "was changed since the checkpoint was written"),
            (lambda text: "\n" + text[1:], "was changed since the checkpoint was written"),
        ],
    )
    def test_a_damaged_log_is_named(
        self, damage: Callable[[str], str], message: str, stopped: Path, tmp_path: Path
    ) -> None:
        folder = copied(stopped, tmp_path)
        file = folder / "metrics.jsonl"
        file.write_text(damage(file.read_text()))
        found = rows(folder)
        assert found["metrics log"].result == "note"
        assert message in found["metrics log"].detail
        assert found["timings log"].result == "ok"

    def test_lines_behind_the_checkpoint_are_told(self, stopped: Path, tmp_path: Path) -> None:
        folder = copied(stopped, tmp_path)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6}\n{"st')
        check = rows(folder)["metrics log"]
        assert check.result == "ok"
        assert "resuming writes the 16 bytes after it again" in check.detail

    @pytest.mark.parametrize("name", ["model.safetensors", "best.safetensors", "model.json"])
    def test_damaged_results_are_named(self, name: str, finished: Path, tmp_path: Path) -> None:
        folder = copied(finished, tmp_path)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 3 // 4])
        found = rows(folder)
        assert found["card" if name == "model.json" else "weights"].result == "fail"
        assert "resume" in found["card" if name == "model.json" else "weights"].fix

    def test_other_weights_are_found(self, finished: Path, tmp_path: Path) -> None:
        folder = copied(finished, tmp_path)
        for name in ("model.safetensors", "best.safetensors"):
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            found = rows(folder)["weights"]
            assert found.result == "fail"
            assert f"{name} is damaged: its tensors do not have the SHA-256 in its header" in found.detail
            (folder / name).write_bytes(whole)
        shutil.copy(finished.parent / "teacher" / "model.safetensors", folder)
        assert "does not hold the weights that" in rows(folder)["weights"].detail
        (folder / "model.safetensors").unlink()
        assert "is missing" in rows(folder)["weights"].detail

    @pytest.mark.parametrize("name", ["taps.json", "environment.json", "metrics.jsonl", "teacher.json"])
    def test_files_that_were_changed_after_the_end_are_named(self, name: str, finished: Path, tmp_path: Path) -> None:
        folder = copied(finished, tmp_path)
        assert rows(folder)["files"] == Check("files", "ok", "all are as the run left them")
        with (folder / name).open("a") as file:
            file.write("\n")
        assert rows(folder)["files"].result == "note"
        assert f"{folder / name} was changed after the run had ended" in rows(folder)["files"].detail
        (folder / name).unlink()
        assert rows(folder)["files"].detail == f"{folder / name} is missing"
        (folder / "manifest.json").write_text("[]")
        assert rows(folder)["files"].result == "note"

    @pytest.mark.parametrize("logs", [None, {"metrics.jsonl": {"bytes": "many"}}, {"metrics.jsonl": 3}])
    def test_a_checkpoint_that_tells_nothing_of_the_logs_is_damaged(
        self, logs: object, stopped: Path, tmp_path: Path
    ) -> None:
        folder = copied(stopped, tmp_path)
        for path in (folder / "checkpoints").iterdir():
            found = read_checkpoint(path)
            write_checkpoint(path, found.tensors, found.state | {"logs": logs})
        assert "state.json: logs" in rows(folder)["checkpoints"].detail

    def test_other_data_are_found(self, stopped: Path, tmp_path: Path) -> None:
        folder = copied(stopped, tmp_path)
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("labels_per_class: 3", "labels_per_class: 4"))
        check = rows(folder)["resume"]
        assert check.result == "fail"
        assert "labels_per_class=3" in check.detail

    def test_another_teacher_is_found(self, finished: Path, tmp_path: Path) -> None:
        shutil.copytree(finished.parent, tmp_path / "runs")
        folder = tmp_path / "runs" / "run"
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace(str(finished.parent), str(tmp_path / "runs")))
        assert rows(folder)["resume"].result == "ok"
        torch.manual_seed(3)
        save_weights(create("resnet8", num_classes=10), tmp_path / "runs" / "teacher" / "model.safetensors")
        found = rows(folder)
        assert "the teacher changed since the run started" in found["resume"].detail
        assert found["teacher"].result == "fail"

    def test_other_surroundings_are_noted(self, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = environment.describe_environment
        monkeypatch.setattr(environment, "describe_environment", lambda *where: original(*where) | {"torch": "9.9"})
        check = rows(stopped)["resume"]
        assert check.result == "note"
        assert "is 9.9: the result may not be bitwise the same" in check.detail

    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_damage_to_any_file_gets_an_answer(
        self, data: st.DataObject, finished: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        folder = copied(finished, tmp_path_factory.mktemp("damaged"))
        for _ in range(data.draw(st.integers(1, 3))):
            file = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
            content = bytearray(file.read_bytes())
            place = data.draw(st.integers(0, max(len(content) - 1, 0)))
            kind = data.draw(st.sampled_from(["flip", "cut", "remove", "insert"]))
            if kind == "remove":
                file.unlink()
                continue
            if kind == "flip" and content:
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            elif kind == "cut":
                del content[place:]
            else:
                content[place:place] = data.draw(st.binary(max_size=20))
            file.write_bytes(content)
        before = listing(folder)
        if (folder / "config.yaml").is_file():
            assert examine_run(folder, console=QUIET).checks
        else:
            with pytest.raises(RunError, match="is not a run folder"):
                examine_run(folder, console=QUIET)
        assert listing(folder) == before

    def test_the_teachers_cache(self, finished: Path, tmp_path: Path) -> None:
        teacher, cache = finished.parent / "teacher", tmp_path / "cache"
        words = ["method=kd", f"teacher={teacher}/", f"teacher.cache={cache}"]
        interrupt(small(tmp_path / "run", *words), 5)
        before = listing(cache)
        found = rows(tmp_path / "run")
        assert found["cache"].result == "ok"
        assert "1 epoch stored" in found["cache"].detail
        config = tmp_path / "run" / "config.yaml"
        config.write_text(config.read_text().replace("batch_size: 8", "batch_size: 10"))
        found = rows(tmp_path / "run")
        assert found["cache"].result == "fail"
        assert "batch_size is 8 there and 10 here" in found["cache"].detail
        assert listing(cache) == before

    def test_settings_that_are_damaged(self, stopped: Path, tmp_path: Path, doctor: Doctor) -> None:
        folder = copied(stopped, tmp_path)
        (folder / "config.yaml").write_text("recipe: [")
        code, shown = doctor(str(folder))
        assert code == 1
        assert "settings        fail" in shown

    def test_settings_that_are_not_those_of_the_checkpoint(self, stopped: Path, tmp_path: Path) -> None:
        folder = copied(stopped, tmp_path)
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("batch_size: 8", "batch_size: 10"))
        found = rows(folder)["resume"]
        assert found.result == "fail"
        assert "was written with batch_size=8, but" in found.detail
        with pytest.raises(RunError, match="batch_size=8"):
            runs.resume(folder, console=QUIET, quiet=True)
        config.write_text(
            config.read_text().replace("batch_size: 10", "batch_size: 8").replace("nan: stop", "nan: skip")
        )
        assert rows(folder)["resume"].result == "ok"

    def test_data_that_are_gone(self, stopped: Path, tmp_path: Path) -> None:
        folder = copied(stopped, tmp_path)
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("root: null", "root: /nonexistent"))
        found = rows(folder)
        assert found["data"].result == "fail"
        assert found["checkpoints"].result == "ok"

    def test_a_run_of_own_modules(self, tmp_path: Path) -> None:
        runs.distill(student=Net(), teacher=None, data=DIGITS, run=tmp_path / "run", method="ce", epochs=1, quiet=True)
        found = rows(tmp_path / "run")
        assert found["networks"].result == "note"
        assert "distill() goes on with it" in found["networks"].detail
        assert found["weights"].result == "ok"
        assert not examine_run(tmp_path / "run", console=QUIET).failures

    def test_the_table_on_a_terminal(self, stopped: Path) -> None:
        report: CheckReport = examine_run(stopped, console=QUIET)
        console = Console(width=100, force_terminal=True, color_system=None, file=io.StringIO())
        report.show(console)
        assert "2 whole: step-000000005" in console.file.getvalue()  # type: ignore[attr-defined]

    def test_steps_that_are_trained_again_are_said(self, finished: Path, tmp_path: Path) -> None:
        """The newest checkpoint of a finished run is damaged: resuming goes back to the one before."""
        folder = copied(finished, tmp_path)
        newest = max((folder / "checkpoints").iterdir())
        (newest / "state.json").write_text("{}")
        assert "goes on at step 4 of 8" in rows(folder)["resume"].detail

    @pytest.mark.parametrize("name", ["metrics.jsonl", "lock"])
    def test_a_folder_in_the_place_of_a_file_is_named(self, name: str, stopped: Path, tmp_path: Path) -> None:
        folder = copied(stopped, tmp_path)
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        check = rows(folder)["resume"]
        assert (check.result, f"{folder / name} is no plain file" in check.detail) == ("fail", True)
        with pytest.raises(RunError, match="is no plain file"):
            runs.resume(folder, console=QUIET, quiet=True)
