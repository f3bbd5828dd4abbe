"""``~`` stands for the home folder in every path that a user can give."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from vrm import models
from vrm.cli import main
from vrm.config import ConfigError, flat, resolve, resolve_evaluation, resolve_mapping, restore, settings
from vrm.files import NoHome, user_path
from vrm.report import write_report
from vrm.runs import api as runs
from vrm.runs.folder import read_run

from ..runs.small import QUIET, SMALL, make_teacher

PATHS = [setting.key for setting in settings() if setting.type == "path"]
NETWORKS = ["student", "teacher"]
WORDS = {"student": "resnet8", "teacher": "resnet20", "method": "kd"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder beside the working folder."""
    folder, work = tmp_path / "home", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("VRM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(work)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["vrm", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_paths_are_these() -> None:
    assert {"run", "student.weights", "teacher.weights", "teacher.cache", "data.root"} <= {*PATHS}


@pytest.mark.parametrize("key", [*PATHS, *NETWORKS])
def test_every_setting_that_is_a_path(key: str, home: Path, tmp_path: Path) -> None:
    expected = f"{home}/a b/x" + "/" * (key in NETWORKS)
    full = f"{key}.name" if key in NETWORKS else key
    given = [f"{k}={v}" for k, v in WORDS.items() if k != key]
    by_command = resolve("distill", "digits", [*given, f"{key}=~/a b/x"]).run
    assert flat(by_command)[full] == expected
    recipe = tmp_path / "home" / "mine.yaml"
    section, _, name = full.rpartition(".")
    recipe.write_text((f"{section}: {{{name}: ~/a b/x}}" if section else f"{name}: ~/a b/x") + "\nepochs: 3")
    assert flat(resolve("distill", "~/mine.yaml", [*given, "data=digits"]).run)[full] == expected
    nested = {"run": "r", "epochs": 1, "data": "digits", **WORDS}
    if key == "run":
        assert resolve_mapping(nested | {"run": "~/a b/x"}).run.run == Path(expected)
    if key == "teacher.cache":
        call = resolve_mapping(nested | {"teacher": {"name": "Net", "cache": Path("~/a b/x")}}).run
        assert flat(call)[full] == expected


def test_an_older_run_and_an_evaluation(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "{recipe: digits, run: ~/r, epochs: 2, student: {name: ~/s/}, method: {name: ce}, data: {name: digits, "
        "root: ~/d}}"
    )
    run = restore(file)
    assert (run.run, run.student.name, run.data.root) == (home / "r", f"{home}/s/", home / "d")
    found = resolve_evaluation("digits", ["model=~/s", "model.weights=~/w.pth"])
    assert found.model is not None
    assert (found.model.name, found.model.weights) == (f"{home}/s/", home / "w.pth")


def test_a_path_is_expanded_at_its_start_alone(home: Path) -> None:
    assert user_path("~") == home
    assert user_path("~/x") == home / "x"
    assert user_path("a~/b") == Path("a~/b")
    assert resolve("train", "digits", ["model=timm:net~x"]).run.student.name == "timm:net~x"


def test_a_user_without_a_home_is_named() -> None:
    with pytest.raises(NoHome, match="~nobody-here/x begins with ~nobody-here, a user with no known home"):
        user_path("~nobody-here/x")
    with pytest.raises(ConfigError, match=r"^teacher\.cache=~nobody-here/x: .* begins with ~nobody-here, a user"):
        resolve("distill", "digits", [*(f"{k}={v}" for k, v in WORDS.items()), "teacher.cache=~nobody-here/x"])


def test_from_training_to_the_report(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is ever written to a folder named ``~``."""
    make_teacher(Path("~/teacher").expanduser())
    words = [*SMALL, "method=kd", "teacher=~/teacher/", "teacher.cache=~/kept"]
    assert command(monkeypatch, "distill", "digits", *words, "run=~/run", "steps=4") == 0
    assert command(monkeypatch, "resume", "~/run") == 0
    assert command(monkeypatch, "doctor", "~/run") == 0
    assert command(monkeypatch, "sweep", "digits", *words, "run=~/sweep", "steps=1", "ema=[0.5,0.9]", "workers=1") == 0
    assert command(monkeypatch, "eval", "digits", "model=~/run/") == 0
    assert command(monkeypatch, "data", "digits", "pack=~/pack") == 0
    record = read_run("~/run")
    assert record.path == home / "run"
    write_report("~/page.html", [record], title="One run")
    student = models.create("resnet8", num_classes=10)
    models.load_weights(student, "~/run/model.safetensors")
    models.save_weights(student, "~/copy.safetensors")
    runs.resume("~/run", console=QUIET, quiet=True)
    kept = {"teacher", "run", "kept", "sweep", "pack", "page.html", "copy.safetensors"}
    assert {path.name for path in home.iterdir()} == kept
    assert sorted(path.name for path in (home / "sweep").iterdir() if path.is_dir()) == ["ema=0.5", "ema=0.9"]
    assert os.listdir(".") == []
    assert "~" not in capsys.readouterr().err
