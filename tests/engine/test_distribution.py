"""One run over two processes: what is equal to one process, and what happens when one is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.runs.small import command, final_state, metrics
from vrm.engine.distribution import ALONE, World
from vrm.runs.resumption import newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, method: str, what: str = "plain", *, processes: int = 2) -> list[subprocess.Popen[str]]:
    """The processes of a run, as torchrun would start them."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    words = [sys.executable, "-m", "tests.runs.two", str(folder), method, what]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            words, env=os.environ | shared | {"RANK": str(rank)}, stdout=pipe, stderr=pipe, text=True, cwd=ROOT
        )
        for rank in range(processes)
    ]


def finish(processes: list[subprocess.Popen[str]], code: int = 0) -> list[str]:
    """Wait for the processes; what they printed."""
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), told
    return [out for out, _ in told]


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"rank{rank}.json").read_text())
    return found


def assert_near(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    for name, value in one["weights"].items():
        a, b = (torch.tensor(weights, dtype=torch.float64) for weights in (value, other["weights"][name]))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def reached(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a checkpoint of that step is there."""
    deadline = time.monotonic() + 60
    while not any(int(path.name[5:]) >= step for path in (run / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("method", "what"), [("kd", "plain"), ("vrm", "plain"), ("dot", "plain"), ("kd", "parts"), ("dot", "parts")]
)
def test_two_processes_train_as_one(tmp_path: Path, method: str, what: str) -> None:
    """Without batch norm, and with relations over the whole batch; also if each goes through its share in parts."""
    finish([*start(tmp_path / "two", method, what), *start(tmp_path / "one", method, processes=1)])
    assert_near(result(tmp_path / "one"), result(tmp_path / "two"), 1e-9)
    assert result(tmp_path / "two", 0) == result(tmp_path / "two", 1)
    one, two = (
        {(m["step"], m["split"], m["name"]): m["value"] for m in metrics(tmp_path / n / "run")} for n in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert all(two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-9) for key in one)


def test_evaluation_counts_every_sample_once(tmp_path: Path) -> None:
    """Batch norm's statistics differ from one process's, but all processes evaluate the same network."""
    finish(start(tmp_path / "two", "kd", "norm"))
    found = [result(tmp_path / "two", rank) for rank in (0, 1)]
    assert found[0]["evaluation"] == found[1]["evaluation"]
    from tests.runs.own import DIGITS, Net
    from vrm import tasks
    from vrm.engine.evaluation import evaluate
    from vrm.models import Preprocess, TappedNetwork, load_weights

    student = Net()
    load_weights(student, tmp_path / "two" / "run" / "model.safetensors")
    alone = evaluate(
        TappedNetwork(student, (), Preprocess(DIGITS.mean, DIGITS.std), input_size=(8, 8)),
        DIGITS.test,
        tasks.load(DIGITS.task),
    )
    assert alone["top1"] == found[0]["evaluation"]["top1"]
    assert alone["loss"] == pytest.approx(found[0]["evaluation"]["loss"], rel=1e-6)


@given(st.integers(0, 50), st.integers(1, 7), st.integers(1, 40))
def test_shares_are_a_partition(count: int, size: int, batch: int) -> None:
    worlds = [World(rank, size) for rank in range(size)]
    spans = [range(*world.span(count)) for world in worlds]
    assert [i for span in spans for i in span] == list(range(count))
    index = torch.arange(batch)
    parts = [world.part(index) for world in worlds]
    assert sorted(torch.cat(parts).tolist()) == list(range(batch))
    values = torch.rand(batch, dtype=torch.float64)
    means = [values[part].mean() * world.weight(index) for world, part in zip(worlds, parts, strict=True) if len(part)]
    assert torch.stack(means).sum() / size == pytest.approx(float(values.mean()))
    assert ALONE.weight(index) == 1.0


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_dies_the_other_stops(tmp_path: Path, victim: int) -> None:
    processes = start(tmp_path, "kd", "long")
    reached(tmp_path / "run", 4, processes[0])
    processes[victim].kill()
    started = time.monotonic()
    out, errors = processes[1 - victim].communicate(timeout=60)
    assert time.monotonic() - started < 30  # their timeout is 20 s
    assert processes[1 - victim].returncode == 1, errors
    assert "another process of this run died" in out
    processes[victim].communicate()
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[0] is not None


@pytest.mark.parametrize("what", ["norm", "dropout"])
def test_a_signal_to_one_stops_all_and_they_go_on_bitwise(tmp_path: Path, what: str) -> None:
    finish(start(tmp_path / "whole", "kd", what))
    processes = start(tmp_path / "stopped", "kd", what)
    reached(tmp_path / "stopped" / "run", 2, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=60) for process in processes]
    codes = {process.returncode for process in processes}
    assert codes in ({75}, {0}), told  # it may have been over by then
    if codes == {75}:
        finish(start(tmp_path / "stopped", "kd", what))
    assert result(tmp_path / "whole", 1) == result(tmp_path / "stopped", 1)
    one, two = (final_state(tmp_path / name / "run") for name in ("whole", "stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert metrics(tmp_path / "whole" / "run") == metrics(tmp_path / "stopped" / "run")


def test_a_bad_step_of_one_is_taken_back_by_all(tmp_path: Path) -> None:
    finish(start(tmp_path, "kd", "poison"))
    assert result(tmp_path, 0) == result(tmp_path, 1)
    lines = metrics(tmp_path / "run")
    assert [line["value"] for line in lines if line["name"] == "nonfinite_steps"] == [1.0]
    assert len(json.loads((tmp_path / "run" / "nonfinite.json").read_text())["samples"]) == 10


def test_methods_with_a_memory_are_refused(tmp_path: Path) -> None:
    processes = start(tmp_path, "crd")
    told = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode for process in processes)
    assert "method=crd keeps a memory" in told[0][1]


def test_torchrun_starts_the_command_line(tmp_path: Path) -> None:
    words = [
        "method=ce",
        "student=resnet8",
        "data.labels_per_class=3",
        "epochs=1",
        "batch_size=10",
        f"run={tmp_path}/run",
    ]
    code = "import sys; from vrm.cli import main; sys.argv[0] = 'vrm'; main()"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python",
         sys.executable, "-c", code, "distill", "digits", *words],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("last top-1") == 1
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["processes"] == 2
    assert command("resume", str(tmp_path / "run")).wait(60) == 0
