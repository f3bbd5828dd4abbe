"""The report: one HTML page without scripts or outside resources, made of run folders alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

import yaml
from scipy.special import stdtrit

from vrm.files import user_path, write_text
from vrm.report.command import command
from vrm.report.style import STYLE
from vrm.report.svg import DASHES, HUES, SAMPLE, Dots, Level, Look, Series, dot_plot, line_chart, small_chart
from vrm.report.tables import (
    Comparison,
    Row,
    Sample,
    compare,
    comparisons,
    describe_columns,
    difference,
    list_caveats,
    number,
    signed,
    summarise,
)
from vrm.runs.folder import Record, read_run
from vrm.tasks import Metric
from vrm.wording import counted


def write_report(
    path: str | Path,
    records: Sequence[Record],
    *,
    title: str,
    notes: Sequence[str] = (),
    label: Callable[[Record], str] | None = None,
    method: str = "vrm",
    repeat: str | None = None,
) -> None:
    """Write one self-contained HTML page about these runs.

    Args:
        path: The file; an older one is replaced at once.
        records: The runs.
        title: The heading.
        notes: Paragraphs of plain text below the heading.
        label: Names the setting of a run, see :func:`summarise`.
        method: The method that the others are compared with.
        repeat: The command that repeats everything on the page.
    """
    write_text(
        user_path(path), page(summarise(records, label=label), title=title, notes=notes, method=method, repeat=repeat)
    )


def write_run_report(path: Path) -> None:
    """Write ``report.html`` into the run folder ``path``. Raise ``RunError`` if it is no run folder."""
    record = read_run(path)
    rows = summarise([record])
    write_text(path / "report.html", page(rows, title=f"{rows[0].label}: {comparisons(rows)[0].title}"))


def page(
    rows: Sequence[Row], *, title: str, notes: Sequence[str] = (), method: str = "vrm", repeat: str | None = None
) -> str:
    """Return the page as text, see :func:`write_report`."""
    found = comparisons(rows)
    shown = {id(row) for comparison in found for row in comparison.rows}
    teachers = [row for row in rows if id(row) not in shown]
    lines = compare(rows, method=method)
    if len(rows) == 1 and rows[0].finished:
        metric, last, best = rows[0].metric, rows[0].last.mean, rows[0].best.mean
        after = f"after the last epoch; {metric.text(best)} after the best, chosen on the test set."
        lines = [f"Test {metric.describe(last)} {after}"]
    body = [f"<header><h1>{escape(title)}</h1>"]
    body += [f'<p class="verdict">{_with_bound_units(line)}</p>' for line in lines[:1]]
    body += [f"<p>{_with_bound_units(line)}</p>" for line in notes]
    if lines[1:]:
        body.append(f'<ul class="verdicts">{"".join(f"<li>{_with_bound_units(line)}</li>" for line in lines[1:])}</ul>')
    body.append("</header><main>")
    for i, comparison in enumerate(found):
        body.append(_section(comparison, f"part{i}", method, heading=comparison.title if len(found) > 1 else "Result"))
    if teachers:
        body.append(f"<section><h2>Teachers trained here</h2>{_table(teachers, None)}</section>")
    body += [_environment(rows), _settings(rows), _repeat(rows, repeat), "</main>"]
    body.append(
        "<footer><p>All numbers here were measured in the runs listed; no published number is shown.</p></footer>"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        "<body>" + "\n".join(body) + "</body></html>\n"
    )


# ---- a comparison --------------------------------------------------------------------------------------------------


def looks(rows: Sequence[Row], lead: Row | None) -> dict[int, Look]:
    """Return a look for each row, by its ``id``: a hue for at most two rows of a method, a dash and a marker for each.

    The method of ``lead`` has the emphasised hue. Within a method the row with the most views is drawn solid.
    """
    groups: dict[tuple[str, int], list[Row]] = {(lead.method, 0): []} if lead else {}
    for row in rows:
        groups.setdefault((row.method, 0), [])
    ranks: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: (row is not lead, -int(row.config["views"]))):
        rank = ranks[row.method] = ranks.get(row.method, -1) + 1
        groups.setdefault((row.method, rank // 2), []).append(row)
    found: dict[int, Look] = {}
    used = [0] * HUES
    for i, group in enumerate(groups.values()):
        hue = 1 + (i - 1) % (HUES - 1) if i else 0  # no other method has the emphasised hue
        for row in group:
            found[id(row)] = Look(hue, used[hue] % len(DASHES))
            used[hue] += 1
    return found


def _with_bound_units(text: str) -> str:
    """Return text of any characters as HTML in which a percent sign is not parted from its number."""
    return escape(text).replace(" %", "&nbsp;%")


def _section(comparison: Comparison, identity: str, method: str, *, heading: str) -> str:
    lead = comparison.subject(method)
    look = looks(comparison.rows, lead)
    against = lead if len(comparison.rows) > 1 else None
    parts = [f"<section><h2>{escape(heading)}</h2>", _table(comparison.rows, against, look)]
    levels = []
    if comparison.teacher:
        name, score = comparison.teacher.architecture, comparison.teacher.score
        measured = f"{comparison.metric.describe(score)} on the same test set, measured when the runs started."
        parts.append(f'<p class="note">Teacher: {escape(name)}, {measured}</p>')
        levels.append(Level(f"teacher {name} {score:.1f}", score))
    parts.append(_curves(comparison, look, levels, identity))
    if sum(len(row.finished) for row in comparison.rows) > 1:
        parts.append(_finals(comparison, look, levels, identity))
    parts += [_losses(comparison, look, identity), "</section>"]
    return "".join(parts)


def _figure(chart: str, caption: str, css: str = "") -> str:
    return f'<figure class="{css}"><div class="scroll">{chart}</div><figcaption>{caption}</figcaption></figure>'


def _cell(value: str, css: str = "number") -> str:
    return f'<td class="{css}">{escape(value)}</td>'


def _table(rows: Sequence[Row], lead: Row | None, look: dict[int, Look] | None = None) -> str:
    several = len({row.devices for row in rows if row.devices}) > 1
    head = [
        ("setting", "words", ""),
        ("seeds", "number", "finished runs"),
        ("last", "number", "test score after the last epoch, mean over seeds"),
        ("last sd", "number", "over seeds, with n - 1"),
        ("best", "number", "test score after the best epoch, chosen on the test set; mean over seeds"),
        ("best sd", "number", "over seeds, with n - 1"),
    ]
    if lead:
        head.append(("difference", "number", f"last, minus that of {lead.label}; Welch 95 % interval"))
    head += [
        ("parameters", "number", "of the student"),
        ("student passes", "number", "views of each image times epochs (+ those of its phases)"),
        ("seconds", "number", "mean over runs"),
    ]
    if several:
        head.append(("device", "words", ""))
    lines = []
    for row in rows:
        mark = look[id(row)].sample(0, 7) if look else ""
        swatch = f'<svg class="swatch" viewBox="0 0 {SAMPLE} 14" aria-hidden="true">{mark}</svg>' if mark else ""
        cells = [f'<th scope="row"{" class=marked" if mark else ""}>{swatch}{escape(row.label)}</th>', _cell(row.seeds)]
        cells += [_cell(number(row.last.mean), "number strong"), _cell(number(row.last.sd))]
        cells += [_cell(number(row.best.mean)), _cell(number(row.best.sd))]
        if lead:
            cells.append(_against(row, lead))
        cells += [_cell(number(row.parameters, ",d")), _cell(row.passes)]
        cells.append(_cell(number(row.seconds, ",.1f")))
        if several:
            cells.append(_cell(", ".join(row.devices) or "-", "words"))
        lines.append(f"<tr{' class=lead' if row is lead else ''}>{''.join(cells)}</tr>")
    heads = "".join(
        f'<th scope="col" class="{css}"{f" title={chr(34)}{escape(tip)}{chr(34)}" if tip else ""}>{name}</th>'
        for name, css, tip in head
    )
    note = describe_columns(rows).replace("n - 1", "n − 1")
    if lead:
        note += (
            f" difference: last, minus that of {lead.label}, with Welch’s 95 % interval; at equal student passes only."
        )
    missing = "".join(f'<p class="note warning">{escape(line)}</p>' for line in list_caveats(rows))
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f'{missing}<p class="note">{escape(note)}</p>'
    )


def _against(row: Row, lead: Row) -> str:
    """Return the cell with a row's difference to the lead; only rows of equal budget have one."""
    if row is lead or not row.finished:
        return _cell("-")
    if row.budget != lead.budget:
        return '<td class="number quiet">unequal passes</td>'
    found = difference(row.last, lead.last)
    reach = f" [{signed(found.interval[0])}, {signed(found.interval[1])}]" if found.interval else ""
    return f'<td class="number">{signed(found.value)}<span class="quiet">{reach}</span></td>'


# ---- figures -------------------------------------------------------------------------------------------------------


def _points(record: Record, split: str, name: str) -> list[tuple[int, float]]:
    return [(epoch, value) for epoch, value in record.curve(split, name) if math.isfinite(value)]


def _series(row: Row, look: Look, split: str, name: str) -> list[Series]:
    """Return a row's lines: the mean of its finished runs in a band of all of them, and each unfinished run, thin."""
    found = []
    curves = [dict(_points(record, split, name)) for record in row.finished]
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    if shared:
        at = [(epoch, [curve[epoch] for curve in curves]) for epoch in shared]
        points = [(float(epoch), fmean(values)) for epoch, values in at]
        band = [(float(epoch), min(values), max(values)) for epoch, values in at] if len(curves) > 1 else []
        tip = f"{row.label}: {points[-1][1]:.2f} at epoch {shared[-1]}, mean of {len(curves)}"
        found.append(Series(row.label, look, points, band, tooltip=tip))
    for record in row.unfinished:
        if points := [(float(epoch), value) for epoch, value in _points(record, split, name)]:
            who = f"{row.label}, seed {record.config['seed']}, unfinished"
            named = f"{row.label} (unfinished)" if not found else ""
            found.append(Series(named, look, points, faint=True, tooltip=f"{who}: {points[-1][1]:.2f} so far"))
    return found


def _curves(comparison: Comparison, look: dict[int, Look], levels: Sequence[Level], identity: str) -> str:
    series = [line for row in comparison.rows for line in _series(row, look[id(row)], "test", row.metric.key)]
    if not series:
        return '<p class="note">No epoch is done yet: no learning curve.</p>'
    metric = comparison.metric
    ends = "; ".join(f"{line.label} ends at {line.points[-1][1]:.2f}" for line in series if line.label)
    chart = line_chart(
        series,
        identity=f"{identity}-curves",
        title=f"Test {metric.label} over the epochs",
        description=f"In {metric.unit}, mean over seeds. {ends}.",
        unit=f"test {metric.label}, {metric.unit}",
        levels=levels,
        ceiling=_ceiling(metric),
    )
    several = any(line.band for line in series)
    caption = f"<b>Learning curves.</b> Test {escape(metric.label)} after each epoch" + (
        ": mean over seeds, in a band from the lowest to the highest seed." if several else "."
    )
    if any(line.faint for line in series):
        caption += " Thin dotted lines are runs without an end."
    return _figure(chart, caption)


def _finals(comparison: Comparison, look: dict[int, Look], levels: Sequence[Level], identity: str) -> str:
    lines = [
        Dots(
            row.label,
            look[id(row)],
            row.last.values,
            row.best.values,
            [
                f"{row.label}, seed {record.config['seed']}: last {last:.2f}, best {best:.2f}"
                for record, last, best in zip(row.finished, row.last.values, row.best.values, strict=True)
            ],
            number(row.last.mean),
            _interval(row.last),
        )
        for row in comparison.rows
        if row.finished
    ]
    metric = comparison.metric
    chart = dot_plot(
        lines,
        identity=f"{identity}-finals",
        title=f"Test {metric.label} of each run",
        description="Last epoch, run by run. " + "; ".join(f"{line.label}: mean {line.mean}" for line in lines) + ".",
        unit=f"test {metric.label}, {metric.unit}",
        levels=levels,
        ceiling=_ceiling(metric),
    )
    caption = "<b>Every run.</b> Filled: last epoch. Hollow: best epoch, chosen on the test set. Stroke: mean of last"
    caption += (
        "; bar: its 95 % interval (Student’s t over seeds), cut off at the frame. At the right, the mean."
        if any(line.interval for line in lines)
        else ". At the right, the mean."
    )
    head = "<tr><th scope=col>setting</th><th scope=col class=number>seed</th><th scope=col class=number>last</th>"
    head += "<th scope=col class=number>best</th><th scope=col class=words>run</th></tr>"
    body = "".join(
        f"<tr><th scope=row>{escape(row.label)}</th>{_cell(str(record.config['seed']))}{_cell(f'{last:.2f}')}"
        f"{_cell(f'{best:.2f}')}<td class=words><code>{escape(str(record.path))}</code></td></tr>"
        for row in comparison.rows
        for record, last, best in zip(row.finished, row.last.values, row.best.values, strict=True)
    )
    numbers = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
    return _figure(chart, caption) + _details("The numbers behind this figure", f'<div class="scroll">{numbers}</div>')


def _ceiling(metric: Metric) -> float:
    """Return the highest value that an axis shows."""
    return metric.perfect if metric.higher_is_better else math.inf


def _interval(sample: Sample) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean (Student's t), or ``None`` for a single run."""
    if sample.sd is None:
        return None
    half = float(stdtrit(len(sample) - 1, 0.975)) * sample.sd / math.sqrt(len(sample))
    return sample.mean - half, sample.mean + half


def _losses(comparison: Comparison, look: dict[int, Look], identity: str) -> str:
    panels = []
    for i, row in enumerate(comparison.rows):
        series = _series(row, look[id(row)], "train", "loss")
        if series:
            chart = small_chart(
                series,
                identity=f"{identity}-loss{i}",
                title=f"Training loss of {row.label}",
                description=f"From {series[0].points[0][1]:.3f} to {series[0].points[-1][1]:.3f}.",
            )
            panels.append(f"<div><h3>{escape(row.label)}</h3>{chart}</div>")
    if not panels:
        return ""
    caption = "<b>Training loss</b> (the weighted sum of the method’s terms, as last logged in each epoch)."
    if len(panels) > 1:
        caption += " Each setting sums other terms, so each has its own scale: compare shapes, not levels."
    return f'<figure><div class="panels">{"".join(panels)}</div><figcaption>{caption}</figcaption></figure>'


# ---- environment, settings, and how to repeat it -------------------------------------------------------------------


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _environment(rows: Sequence[Row]) -> str:
    records = [record for row in rows for record in row.records]
    lines = []
    for key in dict.fromkeys(key for record in records for key in record.environment):
        values: dict[str, int] = {}
        for record in records:
            value = str(record.environment.get(key, "unknown"))
            values[value] = values.get(value, 0) + 1
        shown = [value if len(values) == 1 else f"{value} ({counted(count, 'run')})" for value, count in values.items()]
        lines.append(f'<tr><th scope="row">{escape(key)}</th><td class="words">{escape(", ".join(shown))}</td></tr>')
    if not lines:
        return ""
    content = f'<div class="scroll"><table class="pairs"><tbody>{"".join(lines)}</tbody></table></div>'
    return f"<section><h2>Environment</h2>{content}</section>"


def _settings(rows: Sequence[Row]) -> str:
    blocks = []
    for row in rows:
        seeds = ", ".join(str(record.config["seed"]) for record in row.records)
        text = yaml.safe_dump(row.config, sort_keys=False, allow_unicode=True)
        lead = f'<p class="note">The first of its runs; seeds: {seeds}.</p>' if len(row.records) > 1 else ""
        blocks.append(_details(row.label, f"{lead}<pre>{escape(text)}</pre>"))
    return f"<section><h2>Settings</h2>{''.join(blocks)}</section>"


def _repeat(rows: Sequence[Row], repeat: str | None) -> str:
    parts = ["<section><h2>Repeat it</h2>"]
    if repeat:
        parts.append(f"<pre>{escape(repeat)}</pre>")
    single = [(row, record, command(record)) for row in rows for record in row.records]
    named = [line for _, _, line in single if line]
    if named:
        content = f"<pre>{escape(chr(10).join(named))}</pre>"
        parts.append(content if len(named) == 1 and not repeat else _details(f"Run by run ({len(named)})", content))
    if len(named) < len(single):
        parts.append(
            f'<p class="note">{len(single) - len(named)} of the runs were started from Python with modules of the '
            "caller: only that program repeats them.</p>"
        )
    return "".join([*parts, "</section>"])
