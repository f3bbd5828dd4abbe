from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vrm.config import ConfigError
from vrm.training.pool import run_all
from vrm.training.run_folder import RunError, RunFolder

from .small import QUIET, assert_same, interrupt, small, train


def test_runs_side_by_side_equal_runs_alone(tmp_path: Path) -> None:
    """What is finished is left, what was interrupted goes on, the rest is trained; all as if run alone."""
    for seed in range(3):
        train(small(tmp_path / f"alone{seed}", "method=ce", f"seed={seed}"))
    jobs = [small(tmp_path / f"pool{seed}", "method=ce", f"seed={seed}") for seed in range(3)]
    train(jobs[0])
    before = (tmp_path / "pool0" / "model.json").stat().st_mtime_ns
    interrupt(jobs[1], 3)
    records = run_all(jobs, console=QUIET)
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_sweep_leaves_nothing_running(tmp_path: Path, number: signal.Signals) -> None:
    """Its processes stop by themselves, each with a checkpoint from which the run goes on; what waits is not begun."""
    code = (
        "import sys; from pathlib import Path; from vrm.training.pool import run_all\n"
        "from tests.training.small import QUIET, small\n"
        "if __name__ == '__main__':\n"
        "    jobs = [small(Path(sys.argv[1]) / name, 'method=ce', 'epochs=100000') for name in ('run', 'next')]\n"
        "    run_all(jobs, console=QUIET, num_workers=1)"
    )
    script, run = tmp_path / "sweep.py", tmp_path / "run"
    script.write_text(code)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'src'}", "VRM_TEST": str(tmp_path)}
    sweep = subprocess.Popen([sys.executable, script, tmp_path], env=environment, start_new_session=True)
    while not (run / "checkpoints").is_dir() or len(list((run / "checkpoints").glob("step-*"))) < 2:
        assert sweep.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(sweep.pid, number)  # as a terminal does
    else:
        os.kill(sweep.pid, number)
    sweep.wait(60)
    deadline = time.monotonic() + 60
    while True:
        try:
            RunFolder(run).close()  # the lock is free: nobody trains any more
            break
        except RunError:
            assert time.monotonic() < deadline, "the run is still being trained"
            time.sleep(0.1)
    while (left := processes_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    newest = RunFolder(run).newest()
    assert newest is not None
    assert not (tmp_path / "next").exists()
    assert newest[1]["step"] >= json.loads((run / "timings.jsonl").read_text().splitlines()[-1])["step"]


def test_a_folder_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(small(tmp_path / "run", "method=ce"))
    with pytest.raises(RunError, match="holds a run with other settings"):
        run_all([small(tmp_path / "run", "method=ce", "seed=5")], console=QUIET)


def test_a_failure_is_raised(tmp_path: Path) -> None:
    good = small(tmp_path / "good", "method=ce")
    bad = small(tmp_path / "bad", "method=kd", f"teacher={tmp_path / 'nowhere'}/")
    with pytest.raises(ConfigError, match="has no model"):
        run_all([bad, good], console=QUIET, num_workers=1)
