"""Summaries of runs: one row for each setting over its seeds, comparisons at equal budget, and a verdict in words."""

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
from scipy.special import stdtrit

from vrm import config
from vrm.runs.folder import Record
from vrm.tasks import Metric

NOT_BEGUN = Metric("", "score", "", higher_is_better=True, perfect=math.inf)
"""What stands for the score of runs whose training has not begun: their task is not known yet."""


@dataclass(frozen=True)
class Sample:
    """The same number of several runs."""

    values: tuple[float, ...]

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The mean; NaN if there is no run."""
        return fmean(self.values) if self.values else math.nan

    @property
    def sd(self) -> float | None:
        """The standard deviation with n - 1 in the denominator; ``None`` for fewer than two runs."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """The difference of two means, and its 95 % interval if both have two runs or more."""

    value: float
    interval: tuple[float, float] | None

    @property
    def clear(self) -> bool:
        """Whether there is an interval and it excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def difference(a: Sample, b: Sample) -> Difference:
    """Return ``a - b`` with Welch's 95 % interval for unequal variances (Welch, Biometrika 1947)."""
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
    """A teacher, and its primary score on the test set as the runs measured it before they started."""

    architecture: str
    score: float


@dataclass(frozen=True)
class Row:
    """All runs of one setting, which differ by their seeds alone. Numbers are taken over the finished ones."""

    label: str
    records: tuple[Record, ...]
    teacher: Teacher | None

    @cached_property
    def finished(self) -> tuple[Record, ...]:
        """The runs that came to their end."""
        return tuple(record for record in self.records if record.finished)

    @cached_property
    def unfinished(self) -> tuple[Record, ...]:
        """The runs that have not come to their end."""
        return tuple(record for record in self.records if not record.finished)

    @cached_property
    def models(self) -> tuple[dict[str, Any], ...]:
        """``model.json`` of each finished run."""
        return tuple(record.model for record in self.records if record.model is not None)

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the first run."""
        return self.records[0].config

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"]["name"])

    @property
    def student(self) -> str:
        """The student's architecture."""
        return str(self.models[0]["architecture"] if self.models else self.config["student"]["name"])

    @cached_property
    def metric(self) -> Metric:
        """The score that the runs are judged by: the primary one of their task."""
        return next((record.task.primary for record in self.records if record.task), NOT_BEGUN)

    @property
    def seeds(self) -> str:
        """How many seeds finished, of how many."""
        return str(len(self.finished)) if not self.unfinished else f"{len(self.finished)} of {len(self.records)}"

    @cached_property
    def last(self) -> Sample:
        """The test score after the last epoch."""
        return Sample(tuple(model["last"][self.metric.key] for model in self.models))

    @cached_property
    def best(self) -> Sample:
        """The test score after the best epoch, chosen on the test set."""
        return Sample(tuple(model["best"][self.metric.key] for model in self.models))

    @property
    def rank(self) -> float:
        """A number that is larger for the better of two finished rows, by the last epoch."""
        return self.last.mean if self.metric.higher_is_better else -self.last.mean

    @property
    def parameters(self) -> int | None:
        """The number of the student's parameters."""
        return int(self.models[0]["parameters"]) if self.models else None

    @property
    def budget(self) -> float | None:
        """The student's passes over each training image: views times epochs, extra epochs of phases included."""
        return self.models[0]["student_views"] * self.models[0]["epochs"] if self.models else None

    @property
    def passes(self) -> str:
        """The budget as tables show it: ``2 × 40``, or ``1 × (240 + 30)`` with the extra epochs of phases."""
        if not self.models:
            return "-"
        model = self.models[0]
        if model["steps"] < model["all_steps"]:
            return f"{model['student_views']} × {model['epochs']:.3g} (stopped)"
        epochs = str(self.config["epochs"])
        if model["extra_epochs"]:
            epochs = f"({epochs} + {model['extra_epochs']})"
        return f"{model['student_views']} × {epochs}"

    @property
    def seconds(self) -> float | None:
        """The mean duration of a run, in seconds."""
        return fmean(model["seconds"] for model in self.models) if self.models else None

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that the runs were trained on."""
        return tuple(dict.fromkeys(str(model["device"]) for model in self.models))


def summarise(records: Sequence[Record], *, label: Callable[[Record], str] | None = None) -> list[Row]:
    """Return one row for each set of runs that differ by their seeds alone, in the order of their first run.

    ``label`` names a setting from any of its runs; by default that is the method's name, and the views where there are
    two. Settings with equal names are told apart by the values in which they differ. Runs without an end are kept in
    their row, and counted apart.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(config.identity(record.config), sort_keys=True), []).append(record)
    members = [tuple(sorted(group, key=lambda record: int(record.config["seed"]))) for group in groups.values()]
    labels = _distinct_labels([(label or _default_label)(group[0]) for group in members], [*map(json.loads, groups)])
    return [Row(name, group, _teacher(group)) for name, group in zip(labels, members, strict=True)]


def _default_label(record: Record) -> str:
    name = str(record.config["method"]["name"])
    return f"{name} with two views" if record.config["views"] == 2 else name


def _section(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return those of flat settings that belong to sections."""
    return {key: value for key, value in settings.items() if key.partition(".")[0] in names}


def _distinct_labels(labels: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Add to labels that are equal, for the same student and teacher, the settings in which their rows differ."""
    scopes = [
        (label, json.dumps(_section(own, "student", "teacher"), sort_keys=True))
        for label, own in zip(labels, settings, strict=True)
    ]
    result = []
    for scope, own in zip(scopes, settings, strict=True):
        rivals = [other for other_scope, other in zip(scopes, settings, strict=True) if other_scope == scope]
        differing = [
            f"{key.removeprefix('method.').removesuffix('.name')}={value}"
            for key, value in own.items()
            if value is not None and any(other.get(key) != value for other in rivals)
        ]
        result.append(", ".join([scope[0], *differing]))
    return result


def _teacher(records: Iterable[Record]) -> Teacher | None:
    """Return the teacher as the first of these runs that has measured it found it."""
    for record in records:
        if record.teacher is not None and record.task is not None:
            score = record.teacher["scores"][record.task.primary.key]
            return Teacher(str(record.teacher["architecture"]), float(score))
    return None


# ---- comparisons ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Rows that may be compared: they have the same student, data and teacher, or no teacher."""

    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Student, teacher and data in words."""
        data = _data(self.rows[0])
        special = ", ".join(
            f"{key.removeprefix('data.')}={value}"
            for key, value in data.items()
            if key != "data.name" and value is not None
        )
        where = f"{data['data.name']} ({special})" if special else data["data.name"]
        return f"{self.rows[0].student}{f' from {self.teacher.architecture}' if self.teacher else ''} on {where}"

    @property
    def metric(self) -> Metric:
        """The score by which the rows are compared."""
        return next((row.metric for row in self.rows if row.metric is not NOT_BEGUN), NOT_BEGUN)

    @property
    def teacher(self) -> Teacher | None:
        """The teacher of the rows that have one."""
        return next((row.teacher for row in self.rows if row.teacher), None)

    def subject(self, method: str) -> Row | None:
        """Return the row that others are compared with: the best finished one of ``method``, else the best of all."""
        done = [row for row in self.rows if row.finished]
        own = [row for row in done if row.method == method]
        return max(own or done, key=lambda row: row.rank, default=None)


def _data(row: Row) -> dict[str, Any]:
    """Return what decides the images of a row's runs, without their views."""
    own = _section(config.identity(row.config), "data")
    return {key: value for key, value in own.items() if key != "data.views"}


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Group rows by student, data and teacher. Rows without a teacher stand in every group of their student and data.

    A row that only served as the teacher of others forms no group of its own.
    """

    def student_and_data(row: Row) -> str:
        return json.dumps([_section(config.identity(row.config), "student"), _data(row)], sort_keys=True)

    def taught_by(row: Row) -> str:
        return json.dumps(
            _section(config.identity(row.config), "teacher") if row.config["teacher"] else None, sort_keys=True
        )

    nobody = json.dumps(None)
    served = {Path(row.config["teacher"]["name"]).resolve() for row in rows if row.config["teacher"]}
    keys = dict.fromkeys((student_and_data(row), taught_by(row)) for row in rows)
    with_teacher = {key[0] for key in keys if key[1] != nobody}
    found = []
    for place, teacher in keys:
        if teacher == nobody and place in with_teacher:
            continue
        members = [row for row in rows if student_and_data(row) == place and taught_by(row) in (teacher, nobody)]
        if any(record.path.resolve() not in served for row in members for record in row.records):
            found.append(Comparison(tuple(members)))
    return found


def verdict(rows: Sequence[Row], *, method: str = "vrm") -> list[str]:
    """Return the result in sentences: ``method`` against each rival at equal budget, then what is no fair comparison.

    The first sentence of each comparison is about the best rival. Without runs of ``method`` the best row takes its
    place. Runs without an end are listed last.
    """
    return [*compare(rows, method=method), *list_caveats(rows)]


def compare(rows: Sequence[Row], *, method: str) -> list[str]:
    """Return the sentences of a verdict that compare, without the list of unfinished runs."""
    found = comparisons(rows)
    return [
        f"{comparison.title}: {line}" if len(found) > 1 else line
        for comparison in found
        for line in _compare(comparison, method)
    ]


def _compare(comparison: Comparison, method: str) -> Iterator[str]:
    subject = comparison.subject(method)
    if subject is None:
        return
    name = subject.label
    rivals = sorted((row for row in comparison.rows if row.finished and row is not subject), key=lambda row: -row.rank)
    siblings = [row for row in rivals if row.method == subject.method == method]
    rivals = [row for row in rivals if row.method != method] or siblings
    equal = [row for row in rivals if row.budget == subject.budget]
    unequal = [row for row in rivals if row.budget != subject.budget]
    if equal:
        yield _headline(subject, equal[0])
    elif rivals:
        yield f"No verdict on {name}: no other setting had its {subject.passes} student passes."
    for row in equal[1:]:
        value = difference(subject.last, row.last).value
        yield f"{name} against {row.label}: {signed(value)} {_unit(row.metric)} ({_details(subject, row)})."
    if unequal:
        each = "; ".join(
            f"{row.label} had {row.passes}, {name} is at {signed(difference(subject.last, row.last).value)}"
            for row in unequal
        )
        yield f"At unequal budget, so no fair comparison (student passes; {name} had {subject.passes}): {each}."
    if siblings:
        yield (
            f"{name} is the best of {len(siblings) + 1} settings of {method}, picked by its test score: "
            "its lead over others is flattered."
        )


def _unit(metric: Metric) -> str:
    """Return the unit of a difference."""
    return "points" if metric.unit == "%" else metric.unit


def _headline(subject: Row, rival: Row) -> str:
    found = difference(subject.last, rival.last)
    name, other = subject.label, rival.label
    if subject.rank > rival.rank:
        start = f"{name} is best" if found.clear else f"{name} is ahead, but not beyond doubt"
    else:
        start = f"{name} does not win here"
    gap = f"{abs(found.value):.2f} {_unit(subject.metric)} {'over' if subject.rank > rival.rank else 'behind'} {other}"
    if found.value == 0:
        gap = f"level with {other}"
    return f"{start}: {gap} at equal budget ({_details(subject, rival)})."


def _details(a: Row, b: Row) -> str:
    """Return all that is needed to judge a difference: means, seeds, standard deviations, interval."""
    found = difference(a.last, b.last)
    seeds = f"{len(a.last)}" if len(a.last) == len(b.last) else f"{len(a.last)} and {len(b.last)}"
    text = f"{a.last.mean:.2f} and {b.last.mean:.2f} after the last epoch, {seeds} seed{'' if seeds == '1' else 's'}"
    if found.interval is None:
        return f"{text}; too few runs for an interval, so chance is not excluded"
    low, high = found.interval
    text += f", sd {a.last.sd:.2f} and {b.last.sd:.2f}; Welch 95 % interval {signed(low)} to {signed(high)}"
    return text if found.clear else f"{text}, which includes zero"


def list_caveats(rows: Iterable[Row]) -> list[str]:
    """Return one line for each run without an end, and one for each row whose scores are those of a trial."""
    lines = []
    for row in rows:
        if counts := sorted({model["last"]["images"] for model in row.models if "images" in model["last"]}):
            images = " and ".join(f"{count:,}" for count in counts)
            lines.append(f"{row.label} was stopped early and measured on {images} test images, not on all")
        for record in row.unfinished:
            curve = record.curve("test", row.metric.key)
            reached = f"epoch {curve[-1][0]}, {row.metric.label} {curve[-1][1]:.2f}" if curve else "no epoch done"
            who = f"{row.label}, seed {record.config['seed']}"
            lines.append(f"Unfinished, not counted: {who} ({reached}): {record.path}")
    return lines


# ---- the table of the terminal -------------------------------------------------------------------------------------


def number(value: float | None, spec: str = ".2f") -> str:
    """Return a number as text, or ``-`` for none."""
    return "-" if value is None or math.isnan(value) else format(value, spec)


def signed(value: float) -> str:
    """Return a difference as text, always with its sign."""
    return f"{value:+.2f}".replace("-", "−")


def table(rows: Sequence[Row]) -> Table:
    """Return the rows as a table for a terminal of 100 columns, with each comparison under its title.

    Rows without a teacher are repeated in every comparison of their student. The best row of each one is bold.
    """
    parts = blocks(rows)
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    result.caption, result.caption_justify = escape("\n".join(caption(rows))), "left"
    result.add_column("setting", overflow="fold")
    for heading in ("seeds", "last", "last\nsd", "best", "best\nsd", "parameters", "passes", "seconds"):
        result.add_column(heading, justify="right", no_wrap=heading != "passes")
    for title, members in parts:
        if len(parts) > 1:
            result.add_section()
            result.add_row(f"[italic]{escape(title)}[/]")
        else:
            result.title = escape(title)
        best = max(members, key=lambda row: row.rank if row.finished else -math.inf)
        for row in members:
            result.add_row(
                *map(escape, cells(row)),
                style="bold" if row is best and row.finished and len(members) > 1 else "",
            )
    return result


def cells(row: Row) -> list[str]:
    """Return a row of a table as text: label, seeds, last and best scores, parameters, passes and seconds."""
    scores = [number(value) for score in (row.last, row.best) for value in (score.mean, score.sd)]
    return [row.label, row.seeds, *scores, number(row.parameters, ",d"), row.passes, number(row.seconds, ",.1f")]


def blocks(rows: Sequence[Row]) -> list[tuple[str, tuple[Row, ...]]]:
    """Return the parts of a table with their titles: each comparison, then the teachers that were trained here."""
    found = comparisons(rows)
    shown = {id(row) for comparison in found for row in comparison.rows}
    teachers = tuple(row for row in rows if id(row) not in shown)
    return [(each.title, each.rows) for each in found] + [("teachers trained here", teachers)] * bool(teachers)


def describe_columns(rows: Sequence[Row]) -> str:
    """Return what the numbers of a table mean."""
    metrics = [*dict.fromkeys(row.metric for row in rows if row.metric is not NOT_BEGUN)] or [NOT_BEGUN]
    scores = ", ".join(f"{metric.label} in {metric.unit}" if metric.unit else metric.label for metric in metrics)
    return (
        f"{scores} on the test set; sd over seeds (n - 1). last: after the last epoch. best: the best epoch, chosen on "
        "the test set itself, so it flatters. student passes: views of each image × epochs (+ those of its phases)."
    )


def caption(rows: Sequence[Row]) -> list[str]:
    """Return what stands below a table: what its numbers mean, teachers, devices, and what does not count in full."""
    teachers = dict.fromkeys(row.teacher for row in rows if row.teacher)
    devices = dict.fromkeys(device for row in rows for device in row.devices)
    return [
        describe_columns(rows),
        *(f"teacher {teacher.architecture}: {teacher.score:.2f} on the same test set" for teacher in teachers),
        *(["ran on " + ", ".join(devices)] if devices else []),
        *list_caveats(rows),
    ]
