"""The files of many runs: what their table says, digit by digit."""

from __future__ import annotations

import csv
from pathlib import Path

from vrm.report import write_tables

from .runs import change_model, write_run

TEACHER = "resnet8 from resnet20 on digits"


def test_the_table_as_markdown_and_csv(tmp_path: Path) -> None:
    """Means and sd of two seeds, a run under way, phases with epochs of their own, a trial."""
    records = [
        write_run(tmp_path / "kd0", seed=0, top1=(50.0, 80.123456789)),
        write_run(tmp_path / "kd1", seed=1, top1=(83.0, 82.0), seconds=11.0),
        write_run(tmp_path / "vrm0", method="vrm", top1=(60.0, 90.0)),
        write_run(tmp_path / "vrm1", method="vrm", seed=1, top1=(61.0,), epochs=2, finished=False),
        write_run(tmp_path / "ab", method="ab", top1=(1.0, 60.0, 70.0), extra_epochs=1),
    ]
    write_tables(tmp_path, records, title="A sweep | of two", repeat="vrm sweep digits")
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text.splitlines()[:8] == [
        "# A sweep | of two",
        "",
        f"## {TEACHER}",
        "",
        "| setting | seeds | last | last sd | best | best sd | parameters | student passes | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| kd | 2 | 81.06 | 1.33 | 81.56 | 2.03 | 77,850 | 1 × 2 | 10.5 |",
        "| vrm | 1 of 2 | 90.00 | - | 90.00 | - | 77,850 | 2 × 2 | 10.0 |",
    ]
    assert "| ab | 1 | 70.00 | - | 70.00 | - | 77,850 | 1 × (2 + 1) | 10.0 |" in text
    assert "- Unfinished, not counted: vrm, seed 1 (epoch 1, top-1 61.00)" in text
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        found = {row["setting"]: row for row in csv.DictReader(file)}
    assert found["kd"] == {
        "comparison": TEACHER, "setting": "kd", "n": "2", "runs": "2", "score": "top-1", "unit": "%",
        "last_mean": "81.06", "last_sd": "1.33", "best_mean": "81.56", "best_sd": "2.03", "parameters": "77850",
        "views": "1", "epochs": "2", "extra_epochs": "0", "student_passes": "2", "seconds": "10.5",
    }  # fmt: skip
    assert [found["ab"][name] for name in ("epochs", "extra_epochs", "student_passes")] == ["2", "1", "3"]
    assert [found["vrm"][name] for name in ("n", "runs", "last_sd", "student_passes")] == ["1", "2", "", "4"]
    assert "vrm sweep digits" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_before_the_first_run_ends_and_after_a_trial(tmp_path: Path) -> None:
    begun = write_run(tmp_path / "a", top1=(), loss=(), finished=False)
    trial = change_model(
        write_run(tmp_path / "b", method="vrm", top1=(7.0,)),
        steps=2, all_steps=10, epochs=0.2, last={"top1": 7.0, "epoch": 1, "images": 256},
    )  # fmt: skip
    write_tables(tmp_path, [begun, trial], title="A sweep")
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| kd | 0 of 1 | - | - | - | - | - | - | - |" in text
    assert "- vrm was stopped early and measured on 256 test images, not on all" in text
