"""The files of many runs in one folder: their table as Markdown and as CSV, and their page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from vrm.files import write_text
from vrm.report.html import page
from vrm.report.tables import Row, blocks, caption, cells, compare, number, summarise
from vrm.runs.folder import Record

MARKDOWN, CSV, PAGE = "table.md", "table.csv", "report.html"

COLUMNS = ["comparison", "setting", "n", "runs", "score", "unit", "last_mean", "last_sd", "best_mean", "best_sd"]
COLUMNS += ["parameters", "views", "epochs", "extra_epochs", "student_passes", "seconds"]
"""Of ``table.csv``. ``n`` runs of ``runs`` are finished, and counted."""


def write_tables(folder: Path, records: Sequence[Record], *, title: str, repeat: str | None = None) -> None:
    """Write ``table.md``, ``table.csv`` and ``report.html`` about these runs; each replaces an older one at once."""
    rows = summarise(records)
    write_text(folder / MARKDOWN, _markdown(rows, title=title))
    write_text(folder / CSV, _csv(rows))
    write_text(folder / PAGE, page(rows, title=title, repeat=repeat))


def _markdown(rows: Sequence[Row], *, title: str) -> str:
    lines = [f"# {title}", ""]
    heads = ("setting", "seeds", "last", "last sd", "best", "best sd", "parameters", "student passes", "seconds")
    for name, members in blocks(rows):
        lines += [f"## {name}", "", _line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
        lines += [_line(cells(row)) for row in members]
        lines.append("")
    lines += [f"- {line}" for line in [*compare(rows, method="vrm"), *caption(rows)]]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _csv(rows: Sequence[Row]) -> str:
    """Return one line for each setting of each comparison. What is not known yet is empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for name, members in blocks(rows):
        for row in members:
            model = row.models[0] if row.models else None
            views, epochs = (model["student_views"], model["epochs"] - model["extra_epochs"]) if model else (None, None)
            scores = [row.last.mean, row.last.sd, row.best.mean, row.best.sd]
            cells = [name, row.label, len(row.finished), len(row.records), row.metric.label, row.metric.unit]
            cells += [number(score) for score in scores]
            cells += [number(row.parameters, "d"), views, number(epochs, "g"), model and model["extra_epochs"]]
            cells += [number(row.budget, "g"), number(row.seconds, ".1f")]
            table.writerow(["" if cell in (None, "-") else cell for cell in cells])
    return text.getvalue()
