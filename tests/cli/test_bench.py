"""``vrm bench``: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vrm import methods
from vrm.bench import comparison
from vrm.cli import main
from vrm.cli.bench import show

SMALL = ("pair=resnet8/resnet8", "batch_size=5", "data.labels_per_class=1", "threads=1", "rounds=1", "steps=2")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of ``vrm bench``, run in this process."""
    monkeypatch.setattr(sys, "argv", ["vrm", "bench", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_a_table_and_the_same_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    chosen = [name for name in ("ce", "kd") if name in methods.names()]
    words = (f"methods=[{','.join(chosen)}]", "memory=false", "against=[accumulate=2]", f"out={out}")
    assert run(monkeypatch, "step", "digits", *SMALL, *words) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    names = [f"{name}{change}" for name in chosen for change in ("", " accumulate=2")]
    assert [row["name"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert re.search(rf"^ {row['name']} +1 +[\d.,]+ +[\d.,]+ ", printed, re.MULTILINE), printed
        assert row["timed_steps"] == 2
    assert printed.count("accumulate=2") == 2 * len(chosen), "once in each of two tables"
    assert "images real" in printed
    assert f"written to {out}" in printed
    assert found["environment"]["torch"]
    assert len(found["load_average"]) == 2
    assert found["clock"] == "time.perf_counter"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stp", "digits"], "vrm bench stp: did you mean 'step'"),
        (["step", "digitz"], "did you mean 'digits'"),
        (["step", "digits", "methods=none"], "methods=none"),
        (["step", "digits", "student=resnet8", "methods=kd"], "needs a teacher: give pair=TEACHER/STUDENT"),
        (["step", "digits", "pair=resnet9/resnet8", "methods=kd"], "unknown network 'resnet9'"),
        (["step", "digits", "pair=resnet8/resnet8", "out=no/where.json"], "no folder no; make it first"),
        (["step", "digits", "pair=resnet8/resnet8", "out=."], "out=. is a folder; give a file, as out=step.json"),
        (["step", "digits", "pair=resnet8/resnet8", "run=here"], "run has no effect on a step"),
        (["step", "cifar100", "pair=resnet8/resnet8", "data.root=nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_with_one_paragraph(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_nothing_measured_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "step", "digits", *SMALL, "student=resnet8", "data.views=imagenet", "memory=false") in (
        1,
        2,
    )
    capsys.readouterr()

    def found(*arguments: Any, **options: Any) -> dict[str, Any]:
        return result(rows=[], failed=[{"name": "kd", "reason": "no room"}])

    monkeypatch.setattr(comparison, "measure_step", found)
    assert run(monkeypatch, "step", "digits", *SMALL) == 1
    assert "kd: not measured: no room" in capsys.readouterr().out


def result(**more: Any) -> dict[str, Any]:
    """As ``measure_step`` returns it, on a GPU."""
    row = {
        "name": "vrm naive", "change": "naive", "student_views": 2, "median_ms": 12.345, "p95_ms": 13.0,
        "images_per_second": 5184.0, "over": {"ce": 3.5, "kd": None}, "over_unchanged": 1.5,
        "over_bare_networks": 1.04321, "peak_memory_bytes": 3 << 30, "launches": None, "shares": {},
        "nonfinite_steps": 2.0, "disagreement_of_forms": 3e-12, "recorded": True, "batch_size": 64,
        "precision": "bfloat16",
    }  # fmt: skip
    return {
        "pair": "a/b", "images": {"classes": 100, "size": [32, 32]}, "environment": {"device": "a GPU"},
        "rounds": 10, "steps_a_round": 20, "clock": "CUDA events, synchronised", "made_up_images": True,
        "launches": "kernels a step", "shares": "of the kernels' time", "peak_memory": "as allocated",
        "rows": [row], "failed": [], "notes": {"vrm naive": "not measured: killed"},
    } | more  # fmt: skip


@pytest.mark.parametrize("width", [80, 200])
def test_what_is_unknown_is_a_dash_and_what_went_wrong_is_told(width: int) -> None:
    console = Console(width=width, force_terminal=True, no_color=True, record=True, file=io.StringIO())
    show(result(), console)
    text = " ".join(console.export_text().split())
    assert "12.35 13.00 5,184 3.50 - 1.50 1.043 3,072 -" in text
    assert "1 of 1 recorded as CUDA graphs" in text
    assert "vrm naive: 2 steps met NaN or infinity and were taken back" in text
    assert "differ from the closed form's by 3e-12 at most" in text
    assert "vrm naive: memory not measured: killed" in text
    assert "kernels" in text
    assert "% of" not in text, "no table of shares where none are known"
