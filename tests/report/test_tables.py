"""Rows, tables and verdicts, against sums made by hand."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from vrm.report import Sample, comparisons, summarise, table, verdict
from vrm.report.tables import difference
from vrm.runs.folder import Record
from vrm.tasks import Metric

from .runs import change_model, write_run


def printed(records: list[Record]) -> str:
    """The table as a terminal of 100 columns shows it."""
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(table(summarise(records)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_seeds_are_gathered_and_summed(tmp_path: Path) -> None:
    records = [
        write_run(tmp_path / "c", seed=2, top1=(91.0, 95.0, 94.0), seconds=30.0),
        write_run(tmp_path / "a", seed=0, top1=(90.0, 90.0, 90.0), seconds=10.0),
        write_run(tmp_path / "b", seed=1, top1=(99.0, 90.0, 92.0), seconds=20.0, data={"seed": 7}),
    ]
    (row,) = summarise(records)
    assert [record.config["seed"] for record in row.records] == [0, 1, 2]
    assert row.last.values == (90.0, 92.0, 94.0)
    assert (row.last.mean, row.last.sd) == (92.0, 2.0)
    assert row.best.values == (90.0, 99.0, 95.0)
    assert row.best.mean == pytest.approx(284 / 3, rel=1e-15)
    assert row.best.sd == pytest.approx(math.sqrt((14 / 3) ** 2 / 2 + (13 / 3) ** 2 / 2 + (1 / 3) ** 2 / 2), rel=1e-12)
    assert (row.label, row.method, row.student, row.seeds) == ("kd", "kd", "resnet8", "3")
    assert row.teacher is not None
    assert (row.teacher.architecture, row.teacher.score) == ("resnet20", 97.0)
    assert (row.parameters, row.passes, row.budget, row.seconds) == (77850, "1 × 3", 3.0, 20.0)
    assert row.devices == ("cpu (x86_64, 1 thread)",)


def test_one_seed_has_no_sd(tmp_path: Path) -> None:
    (row,) = summarise([write_run(tmp_path / "a")])
    assert row.last.sd is None
    assert "60.00" in printed([row.records[0]])


@pytest.mark.parametrize(
    "change", [{"views": 2}, {"batch_size": 32}, {"options": {"temperature": 2.0}}, {"teacher": "x/y/"}]
)
def test_any_other_setting_is_another_row(tmp_path: Path, change: dict[str, object]) -> None:
    records = [write_run(tmp_path / "a"), write_run(tmp_path / "b", **change)]  # type: ignore[arg-type]
    assert len(summarise(records)) == 2


def test_equal_labels_are_told_apart(tmp_path: Path) -> None:
    records = [write_run(tmp_path / str(t), options={"temperature": t, "weight": 1.0}) for t in (2.0, 4.0)]
    assert [row.label for row in summarise(records)] == ["kd, temperature=2.0", "kd, temperature=4.0"]
    assert [row.label for row in summarise(records, label=lambda record: "same")] == [
        "same, temperature=2.0",
        "same, temperature=4.0",
    ]


def test_unfinished_runs_are_listed_and_not_counted(tmp_path: Path) -> None:
    records = [
        write_run(tmp_path / "a", seed=0, top1=(70.0, 80.0)),
        write_run(tmp_path / "b", seed=1, top1=(10.0,), finished=False, epochs=2),
        write_run(tmp_path / "c", seed=0, method="sp", top1=(), loss=(), finished=False, epochs=2),
    ]
    kd, sp = summarise(records)
    assert (kd.seeds, kd.last.values, len(kd.unfinished)) == ("1 of 2", (80.0,), 1)
    assert (sp.seeds, sp.passes, sp.parameters, sp.seconds, sp.budget) == ("0 of 1", "-", None, None, None)
    assert math.isnan(sp.last.mean)
    text = " ".join(printed(records).split())
    assert "1 of 2" in text
    assert "kd, seed 1 (epoch 1, top-1 10.00)" in text
    assert "sp, seed 0 (no epoch done)" in text
    assert sum("Unfinished" in line for line in verdict([kd, sp])) == 2


def test_passes_tell_extra_epochs_and_early_stops(tmp_path: Path) -> None:
    extra = write_run(tmp_path / "a", views=2, top1=(1.0, 2.0, 3.0, 4.0, 5.0), extra_epochs=2)
    (row,) = summarise([extra])
    assert (row.passes, row.budget) == ("2 × (3 + 2)", 10.0)
    stopped = change_model(write_run(tmp_path / "b"), steps=5, all_steps=20, epochs=0.5)
    (row,) = summarise([stopped])
    assert (row.passes, row.budget) == ("1 × 0.5 (stopped)", 0.5)


def test_welch_by_hand() -> None:
    a, b = Sample((10.0, 12.0, 14.0)), Sample((9.0, 9.0, 10.0, 8.0))
    found = difference(a, b)
    va, vb = 4 / 3, (2 / 3) / 4
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    assert freedom == pytest.approx(2.5, abs=0.01)
    assert found.value == 3.0
    assert found.interval is not None
    half = found.interval[1] - found.value
    assert found.value - found.interval[0] == pytest.approx(half, rel=1e-12)
    assert (
        3.182 < half / math.sqrt(va + vb) < 4.303
    )  # the quantiles of Student's t with 3 and with 2 degrees of freedom
    assert not found.clear


def test_welch_at_equal_variances_is_students() -> None:
    found = difference(Sample((1.0, 2.0, 3.0)), Sample((11.0, 12.0, 13.0)))
    assert found.interval == pytest.approx((-10 - 2.7764451 * math.sqrt(2 / 3), -10 + 2.7764451 * math.sqrt(2 / 3)))
    assert found.clear


def test_difference_of_constant_samples_and_of_single_runs() -> None:
    assert difference(Sample((5.0, 5.0)), Sample((3.0, 3.0))).interval == (2.0, 2.0)
    assert difference(Sample((5.0,)), Sample((3.0, 4.0))).interval is None


def seeds(folder: Path, tops: tuple[float, ...], **settings: object) -> list[Record]:
    """A run a seed that ends at this accuracy."""
    name = "-".join(str(value) for value in settings.values())
    return [
        write_run(folder / f"{name}-{seed}", seed=seed, top1=(10.0, top), **settings)  # type: ignore[arg-type]
        for seed, top in enumerate(tops)
    ]


def test_verdict_when_the_method_wins(tmp_path: Path) -> None:
    records = seeds(tmp_path, (95.0, 95.5, 96.0), method="vrm")
    records += seeds(tmp_path, (91.0, 91.5, 92.0), method="kd", views=2)
    records += seeds(tmp_path, (93.0, 93.0, 93.0), method="kd")
    first, second = verdict(summarise(records))
    assert first == (
        "vrm is best: 4.00 points over kd with two views at equal budget (95.50 and 91.50 after the last epoch, "
        "3 seeds, sd 0.50 and 0.50; Welch 95 % interval +2.87 to +5.13)."
    )
    assert second.startswith("At unequal budget")
    assert "kd had 1 × 2, vrm is at +2.50" in second


@pytest.mark.parametrize(
    ("ours", "views", "theirs", "words"),
    [
        ((90.0, 91.0), 2, (93.0, 93.2), ["vrm does not win here: 2.60 points behind kd with two views"]),
        ((90.0, 91.0), 2, (90.0, 90.9), ["vrm is ahead, but not beyond doubt: 0.05 points", "includes zero"]),
        ((90.0, 91.0), 2, (91.0, 90.0), ["vrm does not win here: level with kd with two views"]),
        ((95.0,), 2, (90.0,), ["not beyond doubt", "too few runs for an interval, so chance is not excluded"]),
        ((95.0, 95.1), 1, (90.0, 90.1), ["No verdict on vrm: no other setting had its 2 × 2 student passes."]),
    ],
)
def test_verdict_claims_no_more_than_was_seen(
    tmp_path: Path, ours: tuple[float, ...], views: int, theirs: tuple[float, ...], words: list[str]
) -> None:
    records = seeds(tmp_path, ours, method="vrm") + seeds(tmp_path, theirs, method="kd", views=views)
    first, *others = verdict(summarise(records))
    assert all(word in first for word in words)
    assert [line[:17] for line in others] == ["At unequal budget"] * (views == 1)


def test_a_score_of_which_less_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task decides which score is shown, how it is called, and which of two is the better one."""
    metric = Metric("top1", "error", "px", higher_is_better=False, perfect=0.0)
    monkeypatch.setattr("vrm.tasks.load", lambda name: SimpleNamespace(primary=metric))
    records = seeds(tmp_path, (3.0, 3.1), method="vrm") + seeds(tmp_path, (5.0, 5.1), method="kd", views=2)
    (line,) = verdict(summarise(records))
    assert line.startswith("vrm is best: 2.00 px over kd with two views")
    assert "error in px on the test set" in " ".join(printed(records).split())


def test_a_pick_among_variants_is_told(tmp_path: Path) -> None:
    records = [
        record
        for alpha, tops in ((1.0, (90.0, 90.5)), (2.0, (91.0, 91.5)))
        for record in seeds(tmp_path / str(alpha), tops, method="vrm", options={"alpha": alpha})
    ]
    lines = verdict(summarise(records))
    assert lines[0].startswith("vrm, alpha=2.0 is ahead, but not beyond doubt: 1.00 points over vrm, alpha=1.0")
    assert lines[-1].startswith("vrm, alpha=2.0 is the best of 2 settings of vrm, picked by its test score")
    records += seeds(tmp_path, (80.0, 80.5), method="kd", views=2)
    assert verdict(summarise(records))[0].startswith("vrm, alpha=2.0 is best: 11.00 points over kd with two views")


def test_comparisons_keep_students_apart_and_leave_teachers_out(tmp_path: Path) -> None:
    teacher = write_run(tmp_path / "t", method="ce", teacher=None, student="resnet20")
    alone = write_run(tmp_path / "alone", method="ce", teacher=None)
    taught = write_run(tmp_path / "kd", teacher=f"{tmp_path}/t/")
    other = write_run(tmp_path / "other", teacher=f"{tmp_path}/t/", student="resnet14")
    rows = summarise([teacher, alone, taught, other])
    found = comparisons(rows)
    assert [[row.label for row in comparison.rows] for comparison in found] == [["ce", "kd"], ["kd"]]
    assert [comparison.title for comparison in found] == [
        "resnet8 from resnet20 on digits",
        "resnet14 from resnet20 on digits",
    ]
    text = printed([teacher, alone, taught, other])
    assert "teachers trained here" in text
    assert "resnet14 from resnet20 on digits" in text


def test_other_data_are_another_comparison(tmp_path: Path) -> None:
    records = [write_run(tmp_path / str(n), data={"labels_per_class": n}, method="ce", teacher=None) for n in (5, 9)]
    titles = [comparison.title for comparison in comparisons(summarise(records))]
    assert titles == ["resnet8 on digits (labels_per_class=5)", "resnet8 on digits (labels_per_class=9)"]


def test_the_table_fits_and_shows_any_name(tmp_path: Path) -> None:
    names = ["[bold]not markup[/bold]", "a name that goes on and on " * 3, "VRM"]
    records = [write_run(tmp_path / str(i), options={"i": i}) for i in range(3)]
    console = Console(file=io.StringIO(), width=100, color_system=None)
    rows = summarise(records, label=lambda record: names[record.config["method"]["i"]])
    console.print(table(rows))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "[bold]not markup[/bold]" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "77,850" in text
    assert "chosen on the test set" in " ".join(text.split())
