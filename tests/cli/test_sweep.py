"""``vrm sweep``: many runs from one line."""

from __future__ import annotations

import csv
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.runs.small import assert_same, command, make_teacher, small, train
from vrm.cli import main

FEW = ("student=resnet8", "data.labels_per_class=3", "epochs=2", "batch_size=8", "log_every=2")


def sweep(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    """The exit code of a sweep of small runs, in this process."""
    given = {word.partition("=")[0] for word in words}
    base = [word for word in FEW if word.partition("=")[0] not in given]
    monkeypatch.setattr(sys, "argv", ["vrm", "sweep", "digits", *base, f"run={folder}", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "run")


def test_a_grid_is_trained_and_summed_up(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Mean, sd, last and best over the seeds, and the unequal budgets; a second call trains nothing anew."""
    words = ("method=[ce,vrm]", f"teacher={teacher}/", "seed=[0,1]", "workers=2")
    table = tmp_path / "table"
    assert sweep(monkeypatch, table, *words, "dry=true") == 0
    planned = capsys.readouterr().out
    assert re.findall(r"(\S+) +new +(\d × \d) +(\S+) +8", planned) == [
        ("ce_seed=0", "1 × 2", "-"),
        ("ce_seed=1", "1 × 2", "-"),
        ("vrm_seed=0", "2 × 2", "4"),
        ("vrm_seed=1", "2 × 2", "4"),
    ]
    assert "4 new; 12 student passes" in " ".join(planned.split())
    assert not table.exists()

    assert sweep(monkeypatch, table, *words) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].startswith("vrm_seed="), "the longest first"
    assert len(re.findall(r"seed=\d: last top-1", shown)) == 4
    assert re.search(r"^ ce +2 +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +78,042 +1 × 2 ", shown, re.MULTILINE)
    assert re.search(r"^ vrm +2 +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +78,042 +2 × 2 ", shown, re.MULTILINE)
    assert "no fair comparison" in shown
    for name in ("table.md", "table.csv", "report.html"):
        assert str(table / name) in shown
    with (table / "table.csv").open(encoding="utf-8") as file:
        written = {row["setting"]: row for row in csv.DictReader(file)}
    assert {name: (row["n"], row["student_passes"]) for name, row in written.items()} == {
        "ce": ("2", "2"),
        "vrm": ("2", "4"),
    }
    scores = [json.loads((table / f"ce_seed={seed}/model.json").read_text())["last"]["top1"] for seed in (0, 1)]
    assert written["ce"]["last_mean"] == f"{sum(scores) / 2:.2f}"
    assert f"| ce | 2 | {sum(scores) / 2:.2f} |" in (table / "table.md").read_text(encoding="utf-8")
    assert "vrm sweep digits student=resnet8" in (table / "report.html").read_text(encoding="utf-8")
    train(small(tmp_path / "alone", "method=vrm", f"teacher={teacher}/", "seed=1"))
    assert_same(tmp_path / "alone", table / "vrm_seed=1")

    assert sweep(monkeypatch, table, *words) == 0
    again = capsys.readouterr().out
    assert "last top-1" not in again
    assert again.split("setting")[1] == shown.split("setting")[1]
    assert sweep(monkeypatch, table, *words, "dry=true") == 0
    assert "4 finished; 0 student passes" in " ".join(capsys.readouterr().out.split())

    assert sweep(monkeypatch, table, *words, "optimizer.lr=0.1") == 2
    error = capsys.readouterr().err
    assert f"{table / 'ce_seed=0'} holds a run with other settings: optimizer.lr=0.05" in error


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_failure_is_listed_at_the_end(
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    on_failure: str,
) -> None:
    words = ("method=kd", f"teacher=[{tmp_path}/nowhere/,{teacher}/]", f"on_failure={on_failure}", "workers=1")
    assert sweep(monkeypatch, tmp_path / "table", *words) == 1
    found = capsys.readouterr()
    assert f"1 run failed; the same command tries again:\n  {tmp_path / 'table'}" in found.err
    assert "has no model.json" in found.err
    assert "Traceback" not in found.err
    finished = list((tmp_path / "table").glob("*/model.json"))
    assert len(finished) == (1 if on_failure == "continue" else 0)
    assert (" kd " in found.out) == (on_failure == "continue")
    assert (tmp_path / "table" / "table.md").exists() == (on_failure == "continue")


def test_stopped_and_called_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SIGTERM ends it with exit code 75 and checkpoints; the same command ends as if nothing had been."""
    long = ("method=ce", "epochs=15", "seed=[0]", "workers=1", "threads=1")
    table = tmp_path / "table"
    base = [word for word in FEW if not word.startswith("epochs")]
    process = command("sweep", "digits", *base, *long, f"run={table}")
    while not list(table.glob("seed=0/checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "the same command goes on" in errors
    assert not (table / "seed=0" / "model.json").exists()
    assert sweep(monkeypatch, table, *long) == 0
    train(small(tmp_path / "alone", "method=ce", "epochs=15", "seed=0"))
    assert_same(tmp_path / "alone", table / "seed=0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["workers=0"], "workers=0: input should be greater than or equal to 1"),
        (["workers=many"], "workers=many"),
        (["on_failure=ignore"], "on_failure=ignore"),
        (["device=cpu", "devices=[0]"], r"devices=\[0\]: 0 GPUs can be used here"),
        (["devices=[]"], "devices"),
        (["seed=[0,0]"], "has 0 twice"),
        (["seed=[0,1]", "epochs=[0,1]"], r"seed=0_epochs=0: epochs=0"),
        (["method=[ce,vmr]"], "did you mean|nearest: vrm"),
        (["student=resnet8", "seeds=[0,1]"], "unknown key 'seeds'.*did you mean 'seed'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    more = [] if any(word.startswith("method=") for word in words) else ["method=ce"]
    assert sweep(monkeypatch, tmp_path / "table", *more, *words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_folder_has_a_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vrm", "sweep", "digits", *FEW, "method=ce", "dry=true"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert "1 run in runs/digits-sweep" in capsys.readouterr().out
