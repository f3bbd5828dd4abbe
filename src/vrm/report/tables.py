"""What runs add up to: one row a setting over its seeds, comparisons at equal budget, and the truth in plain words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from scipy.special import stdtrit  # type: ignore[import-untyped]

from vrm.training.run_folder import Record

NOTE = (
    "top-1 in % on the test set; sd over seeds (n - 1). last: after the last epoch. best: the best epoch, chosen on the "
    "test set itself, so it flatters. student passes: views of each image x epochs."
)


@dataclass(frozen=True)
class Sample:
    """One number from each of several runs."""

    values: tuple[float, ...]

    def __len__(self) -> int:
        """How many runs."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The mean; NaN without runs."""
        return fmean(self.values) if self.values else math.nan

    @property
    def sd(self) -> float | None:
        """The standard deviation with n - 1; ``None`` for fewer than two runs."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """The difference of two means, and its 95 % interval where there are runs enough for one."""

    value: float
    interval: tuple[float, float] | None

    @property
    def clear(self) -> bool:
        """Whether there is an interval and it excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def difference(a: Sample, b: Sample) -> Difference:
    """``a - b`` with Welch's 95 % interval (unequal variances). Welch, Biometrika 1947."""
    value = a.mean - b.mean
    if a.sd is None or b.sd is None:
        return Difference(value, None)
    va, vb = a.sd**2 / len(a), b.sd**2 / len(b)
    if va + vb == 0:
        return Difference(value, (value, value))
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(va + vb)
    return Difference(value, (value - half, value + half))


@dataclass(frozen=True)
class Teacher:
    """A teacher as the runs measured it on the test set before they started (``top1`` in percent)."""

    architecture: str
    top1: float


@dataclass(frozen=True)
class Row:
    """A setting: all its runs, which differ by seed alone. Numbers are over the finished ones."""

    label: str
    records: tuple[Record, ...]
    teacher: Teacher | None

    @cached_property
    def finished(self) -> tuple[Record, ...]:
        """The runs that came to their end."""
        return tuple(record for record in self.records if record.finished)

    @cached_property
    def unfinished(self) -> tuple[Record, ...]:
        """The runs that did not, or not yet."""
        return tuple(record for record in self.records if not record.finished)

    @cached_property
    def models(self) -> tuple[dict[str, Any], ...]:
        """``model.json`` of each finished run."""
        return tuple(record.model for record in self.records if record.model is not None)

    @property
    def config(self) -> dict[str, Any]:
        """The settings, of the first run."""
        return self.records[0].config

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"]["name"])

    @property
    def student(self) -> str:
        """The student's architecture."""
        return str(self.models[0]["architecture"] if self.models else self.config["student"]["name"])

    @property
    def seeds(self) -> str:
        """How many seeds finished, of how many."""
        return str(len(self.finished)) if not self.unfinished else f"{len(self.finished)} of {len(self.records)}"

    @cached_property
    def last(self) -> Sample:
        """Test top-1 in percent after the last epoch."""
        return Sample(tuple(model["last"]["top1"] for model in self.models))

    @cached_property
    def best(self) -> Sample:
        """Test top-1 in percent after the best epoch, chosen on the test set."""
        return Sample(tuple(model["best"]["top1"] for model in self.models))

    @property
    def parameters(self) -> int | None:
        """Parameters of the student."""
        return int(self.models[0]["parameters"]) if self.models else None

    @property
    def budget(self) -> float | None:
        """Student passes: views of each image times epochs, extra epochs included."""
        return self.models[0]["student_views"] * self.models[0]["epochs"] if self.models else None

    @property
    def passes(self) -> str:
        """The budget in words: ``2 x 40``, ``1 x (240 + 30)`` with the extra epochs of phases."""
        if not self.models:
            return "-"
        model = self.models[0]
        if model["steps"] < model["all_steps"]:
            return f"{model['student_views']} x {model['epochs']:.3g} (stopped)"
        epochs = str(self.config["epochs"])
        if model["extra_epochs"]:
            epochs = f"({epochs} + {model['extra_epochs']})"
        return f"{model['student_views']} x {epochs}"

    @property
    def seconds(self) -> float | None:
        """Mean seconds of a run."""
        return fmean(model["seconds"] for model in self.models) if self.models else None

    @property
    def devices(self) -> tuple[str, ...]:
        """Where the runs ran."""
        return tuple(dict.fromkeys(str(model["device"]) for model in self.models))


def summarise(records: Sequence[Record], *, label: Callable[[Record], str] | None = None) -> list[Row]:
    """One row for each set of runs that differ by seed alone, in the order of their first run.

    ``label`` names a setting from any of its runs; by default the method's name and the views that were added. Where two
    settings would bear the same name, what tells them apart is added. Unfinished runs are kept, and counted apart.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(_setting(record.config), sort_keys=True), []).append(record)
    members = [tuple(sorted(group, key=lambda record: int(record.config["seed"]))) for group in groups.values()]
    labels = _distinct([(label or _label)(group[0]) for group in members], [_setting(group[0].config) for group in members])
    return [Row(name, group, _teacher(group)) for name, group in zip(labels, members, strict=True)]


def _setting(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without what may differ between the runs of a row."""
    kept = {key: value for key, value in config.items() if key not in ("run", "seed")}
    return kept | {"data": {key: value for key, value in config["data"].items() if key != "seed"}}


def _label(record: Record) -> str:
    name = str(record.config["method"]["name"])
    return f"{name}, two views" if record.config["views"] == 2 else name


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".removesuffix(".name"), value


def _distinct(labels: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Add to equal labels the settings that tell them apart."""
    result = []
    for name, setting in zip(labels, settings, strict=True):
        rivals = [dict(_flat(other)) for rival, other in zip(labels, settings, strict=True) if rival == name]
        differing = [
            f"{key}={value}" for key, value in _flat(setting) if any(other.get(key, ...) != value for other in rivals)
        ]
        result.append(", ".join([name, *differing]))
    return result


def _teacher(records: Iterable[Record]) -> Teacher | None:
    """The teacher as measured by the first of these runs that did."""
    for record in records:
        path = record.path / "teacher.json"
        if path.is_file():
            measured = json.loads(path.read_text(encoding="utf-8"))
            return Teacher(str(measured["architecture"]), float(measured["top1"]))
    return None


# ---- comparisons ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Rows that may be held against each other: the same student, data and teacher (or none)."""

    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Student, teacher and data in words."""
        taught = self.teacher
        data = self.rows[0].config["data"]["name"]
        return f"{self.rows[0].student}{f' from {taught.architecture}' if taught else ''} on {data}"

    @property
    def teacher(self) -> Teacher | None:
        """The teacher of those rows that have one."""
        return next((row.teacher for row in self.rows if row.teacher), None)

    def subject(self, method: str) -> Row | None:
        """The row that the others are held against: the best of ``method``, or of all without it. By the last epoch."""
        done = [row for row in self.rows if row.finished]
        own = [row for row in done if row.method == method]
        return max(own or done, key=lambda row: row.last.mean, default=None)


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Rows by student, data and teacher. Rows without a teacher stand in every comparison of their student and data.

    A row that only served as another's teacher is no comparison of its own.
    """

    def network(settings: Mapping[str, Any] | None) -> str:
        return json.dumps({k: v for k, v in settings.items() if k != "allow_weak"} if settings else None, sort_keys=True)

    def ground(row: Row) -> tuple[str, str]:
        data = {key: row.config["data"][key] for key in ("name", "options")}
        return network(row.config["student"]), json.dumps(data, sort_keys=True)

    served = {Path(row.config["teacher"]["name"]).resolve() for row in rows if row.config["teacher"]}
    keys = dict.fromkeys((ground(row), network(row.config["teacher"])) for row in rows)
    taught = {key[0] for key in keys if key[1] != network(None)}
    found = []
    for where, teacher in keys:
        if teacher == network(None) and where in taught:
            continue
        members = [
            row for row in rows if ground(row) == where and network(row.config["teacher"]) in (teacher, network(None))
        ]
        if any(record.path.resolve() not in served for row in members for record in row.records):
            found.append(Comparison(tuple(members)))
    return found


def verdict(rows: Sequence[Row], *, method: str = "vrm") -> list[str]:
    """The result in plain words: ``method`` against each rival at equal budget, then what is no fair comparison.

    The first line of each comparison is against the best rival. Without runs of ``method`` the best row is the subject.
    """
    found = comparisons(rows)
    lines = [
        f"{comparison.title}: {line}" if len(found) > 1 else line
        for comparison in found
        for line in _compare(comparison, method)
    ]
    return lines + unfinished(rows)


def _compare(comparison: Comparison, method: str) -> Iterator[str]:
    subject = comparison.subject(method)
    if subject is None:
        return
    name = _named(subject)
    rivals = sorted(
        (row for row in comparison.rows if row.finished and row is not subject), key=lambda row: -row.last.mean
    )
    equal = [row for row in rivals if row.budget == subject.budget]
    unequal = [row for row in rivals if row.budget != subject.budget]
    siblings = [row for row in rivals if row.method == subject.method == method]
    if equal:
        yield _headline(subject, equal[0])
    elif rivals:
        yield f"No verdict on {name}: no other setting had its {subject.passes} student passes."
    for row in equal[1:]:
        yield f"{name} against {_named(row)}: {_told(subject, row)}."
    if unequal:
        each = "; ".join(
            f"{_named(row)} had {row.passes}, {name} is at {difference(subject.last, row.last).value:+.2f}" for row in unequal
        )
        yield f"At unequal budget, so no fair comparison (student passes; {name} had {subject.passes}): {each}."
    if siblings:
        yield (
            f"{name} is the best of {len(siblings) + 1} settings of {method}, picked by test accuracy: "
            "its lead over others is flattered."
        )


def _named(row: Row) -> str:
    """A label as it stands in a sentence; a bare method's name in capitals."""
    return row.label.upper() if row.label == row.method else row.label


def _headline(subject: Row, rival: Row) -> str:
    found = difference(subject.last, rival.last)
    name, other = _named(subject), _named(rival)
    if found.value > 0:
        start = f"{name} is best" if found.clear else f"{name} is ahead, but not beyond doubt"
    else:
        start = f"{name} does not win here"
    over = f"{abs(found.value):.2f} points {'over' if found.value > 0 else 'behind'} {other}"
    if found.value == 0:
        over = f"level with {other}"
    return f"{start}: {over} at equal budget ({_told(subject, rival)})."


def _told(a: Row, b: Row) -> str:
    """A difference with all that is needed to judge it."""
    found = difference(a.last, b.last)
    seeds = f"{len(a.last)}" if len(a.last) == len(b.last) else f"{len(a.last)} and {len(b.last)}"
    text = f"{found.value:+.2f} points, {a.last.mean:.2f} and {b.last.mean:.2f} after the last epoch, "
    text += f"{seeds} seed{'' if seeds == '1' else 's'}"
    if found.interval is None:
        return f"{text}; too few runs for an interval, so chance is not excluded"
    low, high = found.interval
    text += f", sd {a.last.sd:.2f} and {b.last.sd:.2f}; Welch 95 % interval {low:+.2f} to {high:+.2f}"
    return text if found.clear else f"{text}, which includes zero"


def unfinished(rows: Iterable[Row]) -> list[str]:
    """One line for each run without an end."""
    lines = []
    for row in rows:
        for record in row.unfinished:
            curve = record.curve("test", "top1")
            reached = f"epoch {curve[-1][0]}, top-1 {curve[-1][1]:.2f}" if curve else "no epoch done"
            lines.append(f"Unfinished, not counted: {row.label}, seed {record.config['seed']} ({reached}): {record.path}")
    return lines


# ---- the table of the terminal ----------------------------------------------------------------------------------------


def number(value: float | None, spec: str = ".2f") -> str:
    """A number, or ``-`` where there is none."""
    return "-" if value is None or math.isnan(value) else format(value, spec)


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal of 100 columns. Student and teacher have columns where they differ."""
    several = len(comparisons(rows)) > 1 or len({row.student for row in rows}) > 1
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, caption=escape(_caption(rows)))
    result.caption_justify = "left"
    result.add_column("setting", overflow="fold", ratio=1, min_width=12)
    if several:
        result.add_column("student", overflow="fold")
        result.add_column("teacher", overflow="fold")
    else:
        result.title = escape(comparisons(rows)[0].title) if comparisons(rows) else None
    for heading in ("seeds", "last", "sd", "best", "sd", "parameters", "passes", "seconds"):
        result.add_column(heading, justify="right", no_wrap=heading != "passes")
    leaders = {id(row) for c in comparisons(rows) if (row := max(c.rows, key=_score)).finished and len(c.rows) > 1}
    for row in rows:
        names = [row.student, row.teacher.architecture if row.teacher else "-"] if several else []
        result.add_row(
            escape(row.label),
            *map(escape, names),
            row.seeds,
            number(row.last.mean),
            number(row.last.sd),
            number(row.best.mean),
            number(row.best.sd),
            number(row.parameters, ",d"),
            row.passes,
            number(row.seconds, ",.1f"),
            style="bold" if id(row) in leaders else "",
        )
    return result


def _score(row: Row) -> float:
    return row.last.mean if row.finished else -math.inf


def _caption(rows: Sequence[Row]) -> str:
    teachers = dict.fromkeys(row.teacher for row in rows if row.teacher)
    lines = [f"teacher {teacher.architecture}: {teacher.top1:.2f} on the same test set" for teacher in teachers]
    devices = dict.fromkeys(device for row in rows for device in row.devices)
    return "\n".join([NOTE, *lines, *(["ran on " + ", ".join(devices)] if devices else []), *unfinished(rows)])
