"""A run that is stopped anywhere ends as if it had not been."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vrm.models import weights_hash
from vrm.runs import api as runs
from vrm.runs.assembly import assemble
from vrm.runs.checkpoint import Damaged
from vrm.runs.folder import RunError, RunFolder, read_run
from vrm.runs.trainer import Training

from .faults import files, flip
from .small import QUIET, assert_same, command, interrupt, make_teacher, metrics, outcome, small, train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
@pytest.mark.parametrize("method", ["kd", "vrm"])
def test_stopped_and_resumed_is_bitwise_the_same(teacher: Path, tmp_path: Path, method: str, stop: int) -> None:
    words = [f"method={method}", f"teacher={teacher}/", "optimizer=adamw" if stop == 3 else "optimizer=sgd"]
    train(small(tmp_path / "whole", *words))
    interrupt(small(tmp_path / "stopped", *words), stop)
    runs.resume(tmp_path / "stopped", console=QUIET, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_sigterm_leaves_a_checkpoint_and_exit_code_75(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["method=ce", "student=resnet8", "epochs=1000", "threads=1", "checkpoint.every=100000"]
    process = command("distill", "digits", *words, f"run={run}")
    while not (run / "timings.jsonl").is_file() or not (run / "timings.jsonl").stat().st_size:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "vrm resume" in errors
    assert RunFolder(run).newest() is not None


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = train(small(tmp_path / "run", "method=ce"))
    before = outcome(tmp_path / "run")[2]
    again = runs.resume(tmp_path / "run", console=QUIET, quiet=True)
    assert again == first
    assert outcome(tmp_path / "run")[2] == before


def test_a_finished_run_without_checkpoints_is_left_as_it_is(tmp_path: Path) -> None:
    """Who removes them to save room loses nothing."""
    run = tmp_path / "run"
    first = train(small(run, "method=ce"))
    shutil.rmtree(run / "checkpoints")
    before = files(run)
    folder = RunFolder(run)
    training = Training(assemble(small(run, "method=ce").run), folder, console=QUIET, quiet=True)
    assert training.train() == json.loads(json.dumps(first))
    folder.close()
    assert weights_hash(training.assembly.student.network) == first["weights_sha256"]
    assert files(run) == before
    flip(run / "model.safetensors")
    with pytest.raises(RunError, match=r"run is finished and has no checkpoints, but .*model\.safetensors is damaged"):
        runs.resume(run, console=QUIET, quiet=True)
    (run / "model.json").write_text("[")
    with pytest.raises(Damaged, match=r"model\.json"):
        runs.resume(run, console=QUIET, quiet=True)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    train(small(tmp_path / "whole", "method=ce"))
    interrupt(small(tmp_path / "run", "method=ce", "checkpoint.every=2"), 6)
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*")) / "tensors.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    runs.resume(tmp_path / "run", console=QUIET, quiet=True)
    assert outcome(tmp_path / "run")[2] == outcome(tmp_path / "whole")[2]


def test_no_whole_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    interrupt(small(tmp_path / "run", "method=ce"), 2)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/state.json"):
        path.write_text("{}")
    with pytest.raises(RunError, match=r"state\.json does not have the SHA-256"):
        runs.resume(tmp_path / "run", console=QUIET, quiet=True)


def test_other_data_are_refused(tmp_path: Path) -> None:
    interrupt(small(tmp_path / "run", "method=ce"), 2)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("labels_per_class: 3", "labels_per_class: 4"))
    with pytest.raises(RunError, match=r"labels_per_class=3, but .* says data\.labels_per_class=4"):
        runs.resume(tmp_path / "run", console=QUIET, quiet=True)


def test_a_second_writer_is_refused_and_a_dead_one_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(RunError, match="in use by another process"):
        RunFolder(tmp_path / "run")
    folder.close()
    RunFolder(tmp_path / "run").close()


def test_a_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    train(small(tmp_path / "run", "method=ce"))
    with pytest.raises(RunError, match="already holds a run"):
        train(small(tmp_path / "run", "method=ce"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["batch_size=16"], "batch_size=8"),
        (["method=kd"], "method.name=ce"),
        (["data.labels_per_class=4"], "data.labels_per_class=3"),
        (["seed=1", "optimizer.lr=0.1"], "optimizer.lr=0.05, seed=0"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_alone(teacher: Path, tmp_path: Path, words: list[str], named: str) -> None:
    interrupt(small(tmp_path / "run", "method=ce"), 2)
    extra = [f"teacher={teacher}/"] if "method=kd" in words else []
    with pytest.raises(RunError, match=re.escape(named)):
        train(small(tmp_path / "run", *(["method=ce"] if not extra else []), *words, *extra))


def test_another_teacher_is_refused(teacher: Path, tmp_path: Path) -> None:
    mine = tmp_path / "teacher"
    shutil.copytree(teacher, mine)
    interrupt(small(tmp_path / "run", "method=kd", f"teacher={mine}/"), 2)
    weights = load_file(mine / "model.safetensors")
    weights["fc.bias"] += 1e-3
    save_file(weights, mine / "model.safetensors")
    with pytest.raises(RunError, match="the teacher changed since the run started"):
        runs.resume(tmp_path / "run", console=QUIET, quiet=True)


def test_the_seed_of_the_data_rules_views_and_order_alone(tmp_path: Path) -> None:
    train(small(tmp_path / "a", "method=ce", "seed=1"))
    train(small(tmp_path / "b", "method=ce", "seed=1", "data.seed=1"))
    train(small(tmp_path / "c", "method=ce", "seed=1", "data.seed=2"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


def test_a_reader_may_look_at_a_run_that_is_being_written(tmp_path: Path) -> None:
    interrupt(small(tmp_path / "run", "method=ce"), 5)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epo')
    record = read_run(tmp_path / "run")
    assert not record.finished
    assert [epoch for epoch, _ in record.curve("test", "top1")] == [1]
    assert os.listdir(tmp_path / "run")
