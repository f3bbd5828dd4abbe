"""Every method trains on the digits, and a run of it that is interrupted ends bitwise as if it had not been."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vrm import methods
from vrm.training import runs

from .small import OPTIONS, QUIET, SMALL, assert_same, command, interrupt, make_teacher, metrics, small, train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "run")


def words_for(name: str, teacher: Path) -> list[str]:
    own = [] if name == "ce" else [f"teacher={teacher}/"]
    return [f"method={name}", *own, *OPTIONS.get(name, ())]


@pytest.mark.parametrize("name", methods.names())
def test_two_epochs_interrupted_and_resumed(teacher: Path, tmp_path: Path, name: str) -> None:
    words = words_for(name, teacher)
    result = train(small(tmp_path / "whole", *words))
    losses = [line for line in metrics(tmp_path / "whole") if line["name"].startswith("loss/")]
    assert all(line["value"] == line["value"] for line in losses)
    # in the middle of an epoch: the last one of a pretraining phase where there is one
    interrupt(small(tmp_path / "stopped", *words), 3)
    resumed = runs.resume(tmp_path / "stopped", console=QUIET, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
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
    words = [*words_for(name, teacher), "checkpoint.every=2", "epochs=12"]
    train(small(tmp_path / "whole", *words))
    killed = tmp_path / "killed"
    given = {word.partition("=")[0] for word in words}
    shared = [word for word in SMALL if word.partition("=")[0] not in given]
    process = command("distill", "digits", *shared, *words, f"run={killed}")
    while len(list((killed / "checkpoints").glob("step-*"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (killed / "model.json").is_file()
    resumed = command("resume", str(killed))
    _, errors = resumed.communicate()
    assert resumed.returncode == os.EX_OK, errors
    assert_same(tmp_path / "whole", killed)
