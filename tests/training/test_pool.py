from __future__ import annotations

from pathlib import Path

import pytest

from vrm.config import ConfigError
from vrm.training.pool import run_all
from vrm.training.run_folder import RunError

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


def test_a_folder_with_other_settings_is_refused(tmp_path: Path) -> None:
    train(small(tmp_path / "run", "method=ce"))
    with pytest.raises(RunError, match="holds a run with other settings"):
        run_all([small(tmp_path / "run", "method=ce", "seed=5")], console=QUIET)


def test_a_failure_is_raised(tmp_path: Path) -> None:
    good = small(tmp_path / "good", "method=ce")
    bad = small(tmp_path / "bad", "method=kd", f"teacher={tmp_path / 'nowhere'}/")
    with pytest.raises(ConfigError, match="has no model"):
        run_all([bad, good], console=QUIET, num_workers=1)
