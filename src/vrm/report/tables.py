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
from scipy.special import stdtrit

from vrm.runs.checkpoint import read_json
from vrm.runs.folder import Record

NOTE = (
    "top-1 in % on the test set; sd over seeds (n - 1). last: after the last epoch. best: the best epoch, chosen on "
    "the test set itself, so it flatters. student passes: views of each image × epochs (+ those of its phases)."
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
        """The budget in words: ``2 × 40``, ``1 × (240 + 30)`` with the extra epochs of phases."""
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
        """Mean seconds of a run."""
        return fmean(model["seconds"] for model in self.models) if self.models else None

    @property
    def devices(self) -> tuple[str, ...]:
        """Where the runs ran."""
        return tuple(dict.fromkeys(str(model["device"]) for model in self.models))


def summarise(records: Sequence[Record], *, label: Callable[[Record], str] | None = None) -> list[Row]:
    """One row for each set of runs that differ by seed alone, in the order of their first run.

    ``label`` names a setting from any of its runs; by default the method's name and the views that were added. Where
    settings would bear the same name, what tells them apart is added. Unfinished runs are kept, and counted apart.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(_setting(record.config), sort_keys=True), []).append(record)
    members = [tuple(sorted(group, key=lambda record: int(record.config["seed"]))) for group in groups.values()]
    settings = [_setting(group[0].config) for group in members]
    labels = _distinct([(label or _label)(group[0]) for group in members], settings)
    return [Row(name, group, _teacher(group)) for name, group in zip(labels, members, strict=True)]


WHEREABOUTS = ("run", "checkpoint", "capture", "timeout", "tensorboard", "log_every")
"""Keys of a run that change where and how it is kept, and no number in it."""

DATA_WHEREABOUTS = ("root", "placement", "workers", "download")
"""The same of its data."""


def _setting(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without what may differ between the runs of a row."""
    kept = {key: value for key, value in config.items() if key not in (*WHEREABOUTS, "seed")}
    return kept | {"data": _data(config) | {"views": config["data"]["views"]}, "teacher": _learnt_from(config)}


def _data(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the images of a run, without their views."""
    kept = {k: v for k, v in config["data"].items() if k not in (*DATA_WHEREABOUTS, "seed", "views")}
    if kept.get("bad_images") != "skip":  # the other policies stop at a bad image, or find none
        kept.pop("bad_images", None)
    return kept


def _learnt_from(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What decides a run's teacher: a cache of its logits counts if it rounded them."""
    if not config["teacher"]:
        return None
    kept = {key: value for key, value in config["teacher"].items() if key not in ("allow_weak", "cache")}
    if not config["teacher"].get("cache") or kept.get("cache_precision") == "float32":
        kept.pop("cache_precision", None)
    return kept


def _label(record: Record) -> str:
    name = str(record.config["method"]["name"])
    return f"{name} with two views" if record.config["views"] == 2 else name


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".removesuffix(".name"), value


def _distinct(labels: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Add to labels that are equal, for the same student and teacher, the settings that tell them apart."""
    networks = [json.dumps([setting["student"], setting["teacher"]], sort_keys=True) for setting in settings]
    scopes = list(zip(labels, networks, strict=True))
    result = []
    for name, scope, setting in zip(labels, scopes, settings, strict=True):
        rivals = [
            dict(_flat(other)) for other_scope, other in zip(scopes, settings, strict=True) if other_scope == scope
        ]
        differing = [
            f"{key.removeprefix('method.')}={value}"
            for key, value in _flat(setting)
            if value is not None and any(other.get(key) != value for other in rivals)
        ]
        result.append(", ".join([name, *differing]))
    return result


def _teacher(records: Iterable[Record]) -> Teacher | None:
    """The teacher as measured by the first of these runs that did."""
    for record in records:
        path = record.path / "teacher.json"
        if path.is_file():
            measured = read_json(path)
            return Teacher(str(measured["architecture"]), float(measured["scores"]["top1"]))
    return None


# ---- comparisons ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Rows that may be held against each other: the same student, data and teacher (or none)."""

    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Student, teacher and data in words."""
        taught = self.teacher
        data = _data(self.rows[0].config)
        special = ", ".join(f"{key}={value}" for key, value in data.items() if key != "name" and value is not None)
        where = f"{data['name']} ({special})" if special else data["name"]
        return f"{self.rows[0].student}{f' from {taught.architecture}' if taught else ''} on {where}"

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

    def ground(row: Row) -> str:
        return json.dumps([row.config["student"], _data(row.config)], sort_keys=True)

    def teacher_of(row: Row) -> str:
        return json.dumps(_learnt_from(row.config), sort_keys=True)

    alone = json.dumps(None)
    served = {Path(row.config["teacher"]["name"]).resolve() for row in rows if row.config["teacher"]}
    keys = dict.fromkeys((ground(row), teacher_of(row)) for row in rows)
    taught = {key[0] for key in keys if key[1] != alone}
    found = []
    for where, teacher in keys:
        if teacher == alone and where in taught:
            continue
        members = [row for row in rows if ground(row) == where and teacher_of(row) in (teacher, alone)]
        if any(record.path.resolve() not in served for row in members for record in row.records):
            found.append(Comparison(tuple(members)))
    return found


def verdict(rows: Sequence[Row], *, method: str = "vrm") -> list[str]:
    """The result in plain words: ``method`` against each rival at equal budget, then what is no fair comparison.

    The first line of each comparison is against the best rival. Without runs of ``method`` the best row is the subject.
    """
    return [*compared(rows, method=method), *unfinished(rows)]


def compared(rows: Sequence[Row], *, method: str) -> list[str]:
    """The comparisons of a verdict, without the list of unfinished runs."""
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
    rivals = sorted(
        (row for row in comparison.rows if row.finished and row is not subject), key=lambda row: -row.last.mean
    )
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
        yield f"{name} against {row.label}: {signed(value)} points ({_told(subject, row)})."
    if unequal:
        ahead = [difference(subject.last, row.last).value for row in unequal]
        each = "; ".join(
            f"{row.label} had {row.passes}, {name} is at {signed(value)}"
            for row, value in zip(unequal, ahead, strict=True)
        )
        yield f"At unequal budget, so no fair comparison (student passes; {name} had {subject.passes}): {each}."
    if siblings:
        yield (
            f"{name} is the best of {len(siblings) + 1} settings of {method}, picked by test accuracy: "
            "its lead over others is flattered."
        )


def _headline(subject: Row, rival: Row) -> str:
    found = difference(subject.last, rival.last)
    name, other = subject.label, rival.label
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
    text = f"{a.last.mean:.2f} and {b.last.mean:.2f} after the last epoch, {seeds} seed{'' if seeds == '1' else 's'}"
    if found.interval is None:
        return f"{text}; too few runs for an interval, so chance is not excluded"
    low, high = found.interval
    text += f", sd {a.last.sd:.2f} and {b.last.sd:.2f}; Welch 95 % interval {signed(low)} to {signed(high)}"
    return text if found.clear else f"{text}, which includes zero"


def unfinished(rows: Iterable[Row]) -> list[str]:
    """One line for each run without an end."""
    lines = []
    for row in rows:
        for record in row.unfinished:
            curve = record.curve("test", "top1")
            reached = f"epoch {curve[-1][0]}, top-1 {curve[-1][1]:.2f}" if curve else "no epoch done"
            who = f"{row.label}, seed {record.config['seed']}"
            lines.append(f"Unfinished, not counted: {who} ({reached}): {record.path}")
    return lines


# ---- the table of the terminal -------------------------------------------------------------------------------------


def number(value: float | None, spec: str = ".2f") -> str:
    """A number, or ``-`` where there is none."""
    return "-" if value is None or math.isnan(value) else format(value, spec)


def signed(value: float) -> str:
    """A difference, always with its sign."""
    return f"{value:+.2f}".replace("-", "−")


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal of 100 columns; several comparisons stand one below the other, each under its title.

    Rows without a teacher are repeated in every comparison of their student. The best row of each is bold.
    """
    found = comparisons(rows)
    shown = {id(row) for comparison in found for row in comparison.rows}
    blocks = [(comparison.title, comparison.rows) for comparison in found]
    blocks += [("teachers trained here", tuple(row for row in rows if id(row) not in shown))] * (len(shown) < len(rows))
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    result.caption, result.caption_justify = escape(_caption(rows)), "left"
    result.add_column("setting", overflow="fold")
    for heading in ("seeds", "last", "sd", "best", "sd", "parameters", "passes", "seconds"):
        result.add_column(heading, justify="right", no_wrap=heading != "passes")
    for title, members in blocks:
        if len(blocks) > 1:
            result.add_section()
            result.add_row(f"[italic]{escape(title)}[/]")
        else:
            result.title = escape(title)
        best = max(members, key=lambda row: row.last.mean if row.finished else -math.inf)
        for row in members:
            result.add_row(
                escape(row.label),
                row.seeds,
                number(row.last.mean),
                number(row.last.sd),
                number(row.best.mean),
                number(row.best.sd),
                number(row.parameters, ",d"),
                row.passes,
                number(row.seconds, ",.1f"),
                style="bold" if row is best and row.finished and len(members) > 1 else "",
            )
    return result


def _caption(rows: Sequence[Row]) -> str:
    teachers = dict.fromkeys(row.teacher for row in rows if row.teacher)
    lines = [f"teacher {teacher.architecture}: {teacher.top1:.2f} on the same test set" for teacher in teachers]
    devices = dict.fromkeys(device for row in rows for device in row.devices)
    return "\n".join([NOTE, *lines, *(["ran on " + ", ".join(devices)] if devices else []), *unfinished(rows)])
