from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.runs.small import QUIET, assert_same, interrupt, small, train
from vrm.config import ConfigError, Resolved
from vrm.models.card import FORMAT
from vrm.runs.errors import RunError
from vrm.runs.resumption import newest_checkpoint
from vrm.sweeps import local as pool
from vrm.sweeps.local import RunFailed, SomeFailed, find_devices, run_all, visible_gpus


def test_runs_side_by_side_equal_runs_alone(tmp_path: Path) -> None:
    """What is finished is left, what was interrupted goes on, the rest is trained; all as if run alone."""
    for seed in range(3):
        train(small(tmp_path / f"alone{seed}", "method=ce", f"seed={seed}"))
    jobs = [small(tmp_path / f"pool{seed}", "method=ce", f"seed={seed}") for seed in range(3)]
    train(jobs[0])
    before = (tmp_path / "pool0" / "model.json").stat().st_mtime_ns
    interrupt(jobs[1], 3)
    ended: list[int] = []
    records = run_all(
        jobs, console=QUIET, on_finish=lambda: ended.append(sum((job.run.run / "model.json").exists() for job in jobs))
    )
    assert (len(ended), ended[-1]) == (2, 3), "told after each of the two that were trained"
    assert [record.path.name for record in records] == ["pool0", "pool1", "pool2"]
    assert all(record.finished for record in records)
    assert (tmp_path / "pool0" / "model.json").stat().st_mtime_ns == before
    for seed in range(3):
        assert_same(tmp_path / f"alone{seed}", tmp_path / f"pool{seed}")


def processes_of(folder: Path) -> list[str]:
    """The processes whose environment names ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"VRM_TEST={folder}\0".encode() in path.read_bytes() + b"\0":
                found.append(path.parent.name)
        except OSError:  # it ended meanwhile
            continue
    return found


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("how", ["killed", "Ctrl-C", "SIGTERM to every process"])
def test_a_stopped_sweep_leaves_nothing_running(tmp_path: Path, how: str) -> None:
    """Its processes stop by themselves, each with a checkpoint from which the run goes on; what waits is not begun."""
    code = (
        "import sys; from pathlib import Path; from vrm.runs.errors import Preempted\n"
        "from vrm.sweeps.local import run_all\n"
        "from tests.runs.small import QUIET, small\n"
        "more = 'epochs=100000', 'checkpoint.every=1000000'\n"
        "jobs = [small(Path(sys.argv[1]) / name, 'method=ce', *more) for name in ('run', 'next')]\n"
        "try: run_all(jobs, console=QUIET, num_workers=1)\n"
        "except Preempted: sys.exit(75)\n"
    )
    script, run = tmp_path / "sweep.py", tmp_path / "run"
    script.write_text(code)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'src'}", "VRM_TEST": str(tmp_path)}
    sweep = subprocess.Popen([sys.executable, script, tmp_path], env=environment, start_new_session=True)
    while not (run / "timings.jsonl").is_file() or len((run / "timings.jsonl").read_text().splitlines()) < 4:
        assert sweep.poll() is None
        time.sleep(0.05)
    if how == "Ctrl-C":
        os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does
    elif how == "SIGTERM to every process":  # as a scheduler does; a run that is told twice would end at once
        for pid in (*children(sweep.pid), sweep.pid):
            os.kill(pid, signal.SIGTERM)
    else:
        os.kill(sweep.pid, signal.SIGKILL)
    assert sweep.wait(60) == (-signal.SIGKILL if how == "killed" else 75)
    deadline = time.monotonic() + 60
    while (left := processes_of(tmp_path)) and time.monotonic() < deadline:
        assert how == "killed", "the sweep ends after its runs"
        time.sleep(0.1)
    assert left == []
    newest, _ = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert not (tmp_path / "next").exists()
    assert newest.step >= json.loads((run / "timings.jsonl").read_text().splitlines()[-1])["step"]


def test_a_folder_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(small(tmp_path / "run", "method=ce"))
    with pytest.raises(RunError, match="holds a run with other settings"):
        run_all([small(tmp_path / "run", "method=ce", "seed=5")], console=QUIET)


def test_a_failure_is_raised(tmp_path: Path) -> None:
    good = small(tmp_path / "good", "method=ce")
    bad = small(tmp_path / "bad", "method=kd", f"teacher={tmp_path / 'nowhere'}/")
    with pytest.raises(RunFailed, match="has no model") as found:
        run_all([bad, good], console=QUIET, num_workers=1)
    assert found.value.exit_code == 2
    assert list(tmp_path.iterdir()) == [], "a mistake leaves nothing behind"


def test_an_unexpected_error_is_raised_and_its_traceback_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from vrm.runs import trainer; from vrm.sweeps import worker\n"
        "trainer.Trainer._evaluate = lambda *arguments: 1 / 0; worker.work()"
    )
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, "-c", code))
    output = tmp_path / "run" / "output.txt"
    with pytest.raises(RunFailed, match=r"^ZeroDivisionError: division by zero \(all it printed is in .*output\.txt\)"):
        run_all([small(tmp_path / "run", "method=ce")], console=QUIET)
    shown = output.read_text()
    assert "Traceback" in shown
    assert "ce: resnet8 on digits" in shown, "what the run would have shown"


def test_a_disk_that_takes_nothing_is_explained(tmp_path: Path) -> None:
    """Neither weights nor what the run printed."""
    for name in ("best.safetensors", "output.txt"):
        (tmp_path / "run" / name).mkdir(parents=True)
    reason = (
        r"best\.safetensors could not be written: Is a directory; what lay there before is as it was "
        r"\(.*output\.txt cannot be written: Is a directory\)"
    )
    with pytest.raises(RunFailed, match=reason):
        run_all([small(tmp_path / "run", "method=ce")], console=QUIET)


# ---- the pool alone: its runs are short programs that do what their folder's name says -------------------------------

STUB = r"""
import json, os, signal, sys, time
from pathlib import Path
settings = json.loads(sys.stdin.readline())["run"]
run = Path(settings["run"])
run.mkdir(exist_ok=True)
log = run.parent / "log"
def write(what):
    with log.open("a") as file:
        file.write(json.dumps([what, run.name, os.environ.get("CUDA_VISIBLE_DEVICES")]) + "\n")
def fail(code, reason="it failed"):
    write("failed")
    print(reason)
    sys.exit(code)
write("started")
print("hello from", run.name)
(run / "environment.json").write_text('{"task": "classification", "format": %d}')
(run / "timings.jsonl").write_text('{"step": 1, "epoch": 1, "images_per_second": 1.0, "seconds": 1.0}\n')
line = {"step": 1, "epoch": 1, "split": "test", "name": "top1", "value": 40.0}
(run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
(run / "config.yaml").write_text(json.dumps(settings))
time.sleep(0.15)
if "error" in run.name: fail(2)
if "nan" in run.name: fail(1)
if "crash" in run.name: os.abort()
if "child" in run.name and os.fork() == 0:
    time.sleep(60)
    os._exit(0)
if "slow" in run.name: time.sleep(0.8)
if "patient" in run.name:
    while '"failed"' not in log.read_text(): time.sleep(0.05)
    time.sleep(1)
first = not (run / "tried").exists()
(run / "tried").touch()
if "huge" in run.name or ("full" in run.name and first): fail(12, "out of memory")
if "killed" in run.name and first: write("failed"); os.kill(os.getpid(), signal.SIGKILL)
top1, ends = {"top1": 50.0}, {"steps": 8, "all_steps": 8}
(run / "model.json").write_text(json.dumps({"task": "classification", "last": top1, "best": top1, "seconds": 1} | ends))
write("ended")
"""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, "-c", STUB % FORMAT))


def jobs(folder: Path, *names: str) -> list[Resolved]:
    return [small(folder / name, "method=ce") for name in names]


def events(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def most_at_once(folder: Path, device: str | None) -> int:
    now = most = 0
    for what, _, where in events(folder):
        if where == device:
            now += 1 if what == "started" else -1
            most = max(most, now)
    return most


@pytest.mark.usefixtures("stub")
def test_runs_are_spread_over_devices(tmp_path: Path) -> None:
    """Each GPU takes ``num_workers`` at once, the emptiest first."""
    names = [f"slow{i}" for i in range(7)]
    records = run_all(jobs(tmp_path, *names), console=QUIET, num_workers=2, devices=["3", "GPU-x"])
    assert [record.path.name for record in records] == names
    started = [event for event in events(tmp_path) if event[0] == "started"]
    assert sorted(event[2] for event in started[:4]) == ["3", "3", "GPU-x", "GPU-x"]
    assert most_at_once(tmp_path, "3") == most_at_once(tmp_path, "GPU-x") == 2


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("kind", ["full", "killed"])
def test_a_run_without_memory_is_put_back_and_its_device_takes_fewer(tmp_path: Path, kind: str) -> None:
    """``full`` finds no memory, ``killed`` is killed as the system does when memory is short."""
    console = Console(record=True, width=200, file=(tmp_path / "shown").open("w"))
    names = ["patient", f"{kind}1", "next"]
    records = run_all(jobs(tmp_path, *names), console=console, num_workers=2, devices=["0"])
    assert all(record.finished for record in records)
    assert [name for what, name, _ in events(tmp_path) if what == "started"][2:] == [f"{kind}1", "next"]
    assert [what for what, _, _ in events(tmp_path)][-4:] == ["started", "ended"] * 2, "one at a time from then on"
    shown = console.export_text()
    assert f"{kind}1: " in shown
    assert "is put back, and GPU 0 takes 1 run at a time from now on" in shown


@pytest.mark.usefixtures("stub")
def test_a_run_without_memory_fails_when_it_is_alone(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="out of memory"):
        run_all(jobs(tmp_path, "huge", "next"), console=QUIET, num_workers=1, devices=[None])
    assert not (tmp_path / "next" / "model.json").exists()


@pytest.mark.usefixtures("stub")
def test_failures_do_not_lose_the_others(tmp_path: Path) -> None:
    names = ["error", "a", "crash", "b", "nan", "c"]
    with pytest.raises(SomeFailed) as found:
        run_all(jobs(tmp_path, *names), console=QUIET, num_workers=2, devices=[None], on_failure="continue")
    failures = {path.name: error for path, error in found.value.failures.items()}
    assert {name: error.exit_code for name, error in failures.items()} == {"error": 2, "crash": 1, "nan": 1}
    assert f"killed by SIGABRT (all it printed is in {tmp_path / 'crash' / 'output.txt'})" == str(failures["crash"])
    assert f"{tmp_path / 'nan'}: it failed" in str(found.value)
    assert all((tmp_path / name / "model.json").is_file() for name in "abc")
    assert (tmp_path / "a" / "output.txt").read_text() == "hello from a\n"


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("how", ["raise", "stop"])
def test_a_failure_stops_what_has_not_begun(tmp_path: Path, how: str) -> None:
    given = jobs(tmp_path, "error", "slow1", "next")
    if how == "raise":
        with pytest.raises(RunFailed, match="it failed"):
            run_all(given, console=QUIET, num_workers=2, devices=[None])
    else:
        with pytest.raises(SomeFailed, match="it failed"):
            run_all(given, console=QUIET, num_workers=2, devices=[None], on_failure="stop")
    assert (tmp_path / "slow1" / "model.json").is_file(), "what was running came to its end"
    assert not (tmp_path / "next").exists()


@pytest.mark.usefixtures("stub")
def test_a_process_that_a_run_left_behind_holds_nobody(tmp_path: Path) -> None:
    """It may keep the run's pipes open."""
    started = time.monotonic()
    run_all(jobs(tmp_path, "child"), console=QUIET, devices=[None])
    assert time.monotonic() - started < 30


@pytest.mark.usefixtures("stub")
def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    for names in (["a"], ["a", "b"], ["a", "b"]):
        run_all(jobs(tmp_path, *names), console=QUIET, devices=[None])
    assert [event[1] for event in events(tmp_path)] == ["a", "a", "b", "b"]


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"2 runs would share the folder {tmp_path / 'a'}"):
        run_all(jobs(tmp_path, "a", "b", "a"), console=QUIET)


def test_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-abc")
    assert visible_gpus() == ["5", "GPU-abc"]
    assert find_devices(jobs(tmp_path, "a")) == ["5", "GPU-abc"]
    assert find_devices([small(tmp_path / "a", "method=ce", "device=cpu")]) == [None]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert find_devices(jobs(tmp_path, "a")) == [None]


@pytest.mark.usefixtures("stub")
def test_a_terminal_shows_how_far_each_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SECONDS_BETWEEN_LOOKS", 0.0)
    console = Console(force_terminal=True, color_system=None, width=100, file=io.StringIO())
    run_all(jobs(tmp_path, "slow1"), console=console, devices=[None])
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"slow1.* 1/2 .*top-1 40\.00 %", shown)
    assert "slow1: last top-1 50.00 %, best 50.00 %" in shown


def test_a_stop_before_the_run_has_begun(tmp_path: Path) -> None:
    """The input ends while the process starts."""
    process = pool._Process(small(tmp_path / "run", "method=ce"), None)
    assert process.end()[0] == 75
    assert not (tmp_path / "run" / "model.json").exists()
