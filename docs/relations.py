"""Write the tables of docs/relations.md from the records of benchmarks/relations.py.

python docs/relations.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from performance import RESULTS, Record, Tables, filled, milliseconds, ratio, records, table

PAGE = Path(__file__).parent / "relations.md"
GRAPHS = {"sample": "inter-sample", "class": "inter-class", "whole": "both"}


def machine(record: Record) -> str:
    """Return a line that names device, versions and load."""
    on = f"{record['device']}, {record['threads']} threads" if "-cpu" in record["file"].name else record["device"]
    return f"{on}, torch {record['torch']}, load average {record['load'][0]:.1f} at the end (`{record['file']}`):"


def median(found: Record | None) -> str:
    return "-" if found is None else milliseconds(found["median_ms"])


def peak(found: Record | None) -> str:
    return "-" if found is None or found["peak_mib"] is None else f"{found['peak_mib']:,.0f}"


def for_each(results: Path, lines: Callable[[Record], list[str]]) -> list[str]:
    return [
        line for record in records("relations*.json", results) for line in (machine(record), "", *lines(record), "")
    ]


def recordings(record: Record) -> list[str]:
    """Return the table of the whole loss with the mixture's mask, replayed as a CUDA graph."""
    rows = [
        (f"({row['B']}, {row['C']})", *(median(row.get(form)) for form in ("recorded", "compiled, recorded")))
        for row in record.get("recorded", [])
    ]
    heads = ("(B, C), both, `mixture`", "recorded as a CUDA graph, ms", "compiled and recorded, ms")
    return ["", *table(heads, rows)] if rows else []


def matching(results: Path) -> list[str]:
    """Return the table of matching without pruning, and of what pruning adds."""

    def lines(record: Record) -> list[str]:
        cases = {(c["B"], c["C"], c["graph"], c["pruning"], c["views"]): c for c in record["cases"]}
        rows = []
        for b, c, graph in dict.fromkeys(key[:3] for key in cases):
            plain, mixture, collision, near = (
                cases.get((b, c, graph, *key), {})
                for key in (("none", "apart"), ("mixture", "apart"), ("collision", "apart"), ("none", "near"))
            )
            explicit, ours = plain.get("explicit"), plain["ours"]
            rows.append(
                (
                    f"({b}, {c}), {GRAPHS[graph]}",
                    *(median(form) for form in (explicit, ours)),
                    ratio(plain.get("ratio"), 1),
                    *(peak(form) for form in (explicit, ours)),
                    *(median(case.get("ours")) for case in (near, collision)),
                    f"{collision['added']:+.0%}" if "added" in collision else "-",
                    median(mixture.get("ours")),
                    ratio(mixture.get("ratio"), 1),
                )
            )
        heads = ("(B, C), graph", "Algorithm 1, ms", "ours, ms", "times as fast", "Algorithm 1, MiB", "ours, MiB")
        heads = (*heads, "near views, ms", "`collision`, ms", "adds", "`mixture`, ms", "times as fast")
        return [*table(heads, rows), *recordings(record)]

    return for_each(results, lines)


def entropies(results: Path) -> list[str]:
    """Return the table of the mask of classes."""

    def lines(record: Record) -> list[str]:
        heads = ("(B, C)", "untiled, ms", "tiles, ms", "untiled, MiB", "tiles, MiB")
        return table(
            heads,
            [
                (f"({row['B']}, {row['C']})", *(show(row[form]) for show in (median, peak) for form in heads_of))
                for row in record["entropy"]
            ],
        )

    heads_of = ("untiled", "tiled")
    return for_each(results, lines)


def views(results: Path) -> list[str]:
    """Return the table of what virtual views cost."""
    return for_each(
        results,
        lambda record: table(
            ("at (64, 100)", "ms", "MiB"), [(row["what"], median(row), peak(row)) for row in record["virtual_views"]]
        ),
    )


COMMAND = "python benchmarks/relations.py"
TABLES: Tables = {"matching": (matching, COMMAND), "entropies": (entropies, COMMAND), "views": (views, COMMAND)}

if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), RESULTS, TABLES, PAGE.name), encoding="utf-8")
