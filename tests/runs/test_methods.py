"""Every method trains on the digits, and a run of it that is interrupted ends bitwise as if it had not been."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from vrm import methods
from vrm.runs import api as runs

from .forked import Forked, Pause
from .small import QUIET, SMALL, assert_same, interrupt, make_teacher, metrics, small, train, words_of


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "run")


def words_for(name: str, teacher: Path) -> list[str]:
    return words_of(name, f"teacher={teacher}/")


VARIANTS: Mapping[str, tuple[str, ...]] = {
    "fitnet": ("method.two_stage=true", "method.hint_epochs=1"),
}
"""Options that make other phases of a method."""

RUNS = [pytest.param(name, (), id=name) for name in methods.names()]
RUNS += [pytest.param(n, more, id="-".join((n, *more))) for n, more in VARIANTS.items() if n in methods.names()]


@pytest.mark.parametrize(("name", "more"), RUNS)
def test_two_epochs_interrupted_and_resumed(teacher: Path, tmp_path: Path, name: str, more: tuple[str, ...]) -> None:
    words = [*words_for(name, teacher), *more]
    result = train(small(tmp_path / "whole", *words))
    losses = [line for line in metrics(tmp_path / "whole") if line["name"].startswith("loss/")]
    assert all(line["value"] == line["value"] for line in losses)
    # in the middle of an epoch of four steps: of each phase where there are several
    for step in (3, 6)[: 1 + (result["extra_epochs"] > 0)]:
        stopped = tmp_path / f"stopped-{step}"
        interrupt(small(stopped, *words), step)
        resumed = runs.resume(stopped, console=QUIET, quiet=True)
        assert_same(tmp_path / "whole", stopped)
        assert resumed["last"] == result["last"]


@pytest.mark.parametrize("name", methods.names())
def test_half_precision_stays_in_the_networks(teacher: Path, tmp_path: Path, name: str) -> None:
    train(small(tmp_path / "run", *words_for(name, teacher), "precision=bfloat16", "epochs=1"))
    losses = {line["name"]: line["value"] for line in metrics(tmp_path / "run") if line["name"].startswith("loss/")}
    train(small(tmp_path / "full", *words_for(name, teacher), "epochs=1"))
    full = {line["name"]: line["value"] for line in metrics(tmp_path / "full") if line["name"].startswith("loss/")}
    assert losses.keys() == full.keys()
    assert losses != full
    for term, value in losses.items():
        assert value == pytest.approx(full[term], rel=0.25, abs=0.05), term


@pytest.mark.parametrize("name", [name for name in ("ab", "crd", "dot") if name in methods.names()])
def test_killed_and_resumed(teacher: Path, tmp_path: Path, name: str) -> None:
    """By ``kill -9`` in the seventh of eight steps or more, in the second phase where there are two."""
    words = [*words_for(name, teacher), "checkpoint.every=2"]
    train(small(tmp_path / "whole", *words))
    killed = tmp_path / "killed"
    given = {word.partition("=")[0] for word in words}
    shared = [word for word in SMALL if word.partition("=")[0] not in given]
    pause = Pause("vrm.engine.step:Step.__call__", 7)
    process = Forked("distill", "digits", *shared, *words, f"run={killed}", output=tmp_path / "told.txt", pause=pause)
    process.wait_for_pause()
    assert process.kill()
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"step-000000004", "step-000000006"}
    assert not (killed / "model.json").is_file()
    process = Forked("resume", str(killed), output=tmp_path / "told.txt")
    assert process.wait() == os.EX_OK, process.text
    assert_same(tmp_path / "whole", killed)
