"""Write the tables of docs/performance.md from the records in benchmarks/results; no number there is typed by hand.

    python docs/performance.py

Between ``<!-- NAME -->`` and ``<!-- end -->`` stands the table NAME, one for each device and precision that has a
record, or the command that would make one.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "performance.md"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

Record = dict[str, Any]
Tables = dict[str, tuple[Callable[[Path], list[str]], str]]
"""By name: the function that makes the table's lines, and the command that makes its records."""


def records(pattern: str, results: Path) -> Iterator[Record]:
    """Yield the records in JSON files of this name, in any device's folder."""
    for path in sorted(results.rglob(pattern)):
        yield json.loads(path.read_text(encoding="utf-8")) | {"file": path.relative_to(results.parent.parent)}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table; the first column is aligned left, the others right."""
    marks = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, marks, *rows)]


def ratio(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def machine(record: Record) -> str:
    """Return device, versions and load in words."""
    where = record["environment"]
    device, processor = where["device"], where.get("processor")
    on = f"{processor}, {where['threads']} threads" if processor and str(device).startswith("cpu") else device
    load = f", load average {record['load_average'][0]:.1f} at the start" if "load_average" in record else ""
    return f"{on}, torch {where['torch']}{load} (`{record['file']}`)"


def changed(record: Record) -> list[Record]:
    """Return the rows that were measured with another setting."""
    return [row for row in record["rows"] if "=" in (row["change"] or "")]


def steps(results: Path) -> list[str]:
    lines = []
    for record in records("step-*.json", results):
        if changed(record):
            continue
        first = record["rows"][0]
        recorded = sum(row["recorded"] for row in record["rows"])
        lines += [
            f"{record['pair']}, batch {first['batch_size']}, {first['precision']}, "
            f"{record['rounds']} rounds of {record['steps_a_round']} steps, {recorded} of {len(record['rows'])} "
            f"recorded, on {machine(record)}:",
            "",
        ]
        of_kernels = record["launches"].startswith("kernels")
        heads = ("step", "views", "ms", "p95", "images/s", "×ce", "×kd", "×networks", "MiB")
        lines += table(
            (*heads, "kernels" if of_kernels else "calls"),
            [
                (
                    row["name"],
                    str(row["student_views"]),
                    milliseconds(row["median_ms"]),
                    milliseconds(row["p95_ms"]),
                    f"{row['images_per_second']:,.0f}",
                    ratio(row["over"].get("ce")),
                    ratio(row["over"].get("kd")),
                    ratio(row["over_bare_networks"], 3),
                    "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:,.0f}",
                    "-" if row["launches"] is None else f"{row['launches']:,}",
                )
                for row in record["rows"]
            ],
        )
        lines += ["", *(f"Not measured: {each['name']}, {each['reason']}" for each in record["failed"])]
    return lines


def shares(results: Path) -> list[str]:
    lines = []
    for record in records("step-*.json", results):
        rows = [row for row in record["rows"] if row["shares"] and not row["change"]]
        if not rows or changed(record):
            continue
        parts = list(rows[0]["shares"])
        lines += [f"% {record['shares']}, {rows[0]['precision']}, on {machine(record)}:", ""]
        lines += table(
            ("step", *parts), [(row["name"], *(f"{100 * row['shares'][part]:.1f}" for part in parts)) for row in rows]
        )
        lines.append("")
    return lines


def options(results: Path) -> list[str]:
    lines = []
    for record in records("step-*.json", results):
        rows = changed(record)
        if not rows:
            continue
        names = list(dict.fromkeys(row["method"] for row in rows))
        lines += [
            f"{record['pair']}, batch {rows[0]['batch_size']}, against {record['rows'][0]['precision']}, on "
            f"{machine(record)}:",
            "",
        ]
        found = {(row["change"], row["method"]): row["over_unchanged"] for row in rows}
        lines += table(
            ("option", *(f"{name}: time of a step over that without" for name in names)),
            [
                (f"`{change}`", *(ratio(found.get((change, name))) for name in names))
                for change in dict.fromkeys(row["change"] for row in rows)
            ],
        )
        lines += ["", *(f"Not measured: {each['name']}, {each['reason']}" for each in record["failed"])]
    return lines


def first(found: Iterator[str]) -> str:
    """Return the first text, or that nothing was measured."""
    return next(found, "not measured")


def goals(results: Path) -> list[str]:
    """Return the table of goals, and what was measured of each."""
    pair = "resnet32x4/resnet8x4"
    of_pair = [each for each in records("step-*.json", results) if each["pair"] == pair]
    rows = [
        (record, row, str(record["environment"]["device"]).startswith("cpu"))
        for record in of_pair
        for row in record["rows"]
        if row["batch_size"] == 64
        and set(filter(None, (row["change"] or "").split("+"))) <= {"compile=true", "channels_last=true"}
    ]
    views = [*records("views.json", results)]

    def on_gpu(method: str, precisions: Sequence[str]) -> str:
        found = [
            (
                row["median_ms"],
                f"{row['median_ms']:.2f} ms, {row['precision']}, "
                + "".join(f"{word}, " for word in [row["change"]] if word)
                + record["environment"]["device"],
            )
            for record, row, cpu in rows
            if not cpu and row["method"] == method and row["precision"] in precisions
        ]
        return first(text for _, text in sorted(found))

    runs = [
        (card["seconds"], f"{card['seconds'] / 60:.1f} minutes, {card['device']} (`{card['file'].parent.name}`)")
        for card in records("vrm-*-*/model.json", results)
        if card["epochs"] == 240 and not card["device"].startswith("cpu")
    ]
    gpu_views = [(row["images_per_second"], record["gpu"]) for record in views for row in record["gpu_rows"]]
    over = {
        row["name"]: f"{row['name']} {row['over_bare_networks']:.3f} (load {record['load_average'][0]:.1f})"
        for record, row, cpu in rows
        if cpu and row["precision"] == "float32" and row["method"] in ("kd", "vrm") and not changed(record)
    }
    against_pil = [
        f"{row['ratio']:.1f}, {record['processor']}"
        for record in views
        for row in record["rows"]
        if (row["batch"], row["cores"], row["normalised"]) == (512, 1, False)
    ]
    accuracy = [path.relative_to(results.parent.parent) for path in results.rglob("accuracy.txt")]
    found = [
        ("a step of VRM on a GPU (H100), bfloat16 or TF32", "at most 3.0 ms", on_gpu("vrm", ("bfloat16", "tf32"))),
        ("a step of KD there", "under 2 ms", on_gpu("kd", ("bfloat16", "tf32"))),
        ("240 epochs of VRM there, evaluation included", "at most 10 minutes", first(text for _, text in sorted(runs))),
        (
            "accuracy in bfloat16 and TF32 against float32",
            "told with n and sd",
            first(f"`{path}`" for path in accuracy),
        ),
        ("a step on a CPU over the bare networks' passes", "at most 1.05", ", ".join(over.values()) or "not measured"),
        ("views on a CPU core, batch 512, over PIL on one", "at least 3", first(iter(against_pil))),
        (
            "views on a GPU",
            "at least 1 million images/s",
            first(f"{rate / 1e6:.2f} million, {name}" for rate, name in sorted(gpu_views, reverse=True)),
        ),
    ]
    return [*table(("what", "goal", "measured"), found), ""]


def views(results: Path) -> list[str]:
    lines = []
    for record in records("views.json", results):
        same = "no byte differs" if not any(record["differing_bytes"].values()) else "BYTES DIFFER"
        lines += [
            f"{record['images']} images; {same}; {record['processor']}, torch {record['torch']}, load average "
            f"{record['load_average_at_start']:.1f} at the start (`{record['file']}`):",
            "",
        ]
        lines += table(
            ("views", "batch", "cores", "PIL, images/s", "vrm, images/s", "times as fast"),
            [
                (
                    "normalised" if row["normalised"] else "bytes",
                    str(row["batch"]),
                    str(row["cores"]),
                    f"{row['pil_images_per_second']:,}",
                    f"{row['batched_images_per_second']:,}",
                    ratio(row["ratio"]),
                )
                for row in record["rows"]
            ],
        )
        lines += ["", *[f"On {record['gpu']}, torch {record['torch']}:", ""] * bool(record["gpu_rows"])]
        if record["gpu_rows"]:
            lines += table(
                ("views", "batch", "form", "images/s"),
                [
                    (
                        "normalised" if row["normalised"] else "bytes",
                        str(row["batch"]),
                        row["form"],
                        f"{row['images_per_second']:,}",
                    )
                    for row in record["gpu_rows"]
                ],
            )
            lines.append("")
    return lines


def cache(results: Path) -> list[str]:
    lines = []
    for record in records("teacher_cache*.json", results):
        settings = record["settings"]
        lines += [
            f"{settings['teacher']}/{settings['student']}, batch {settings['batch']}, {settings['precision']}, "
            f"on {machine(record)}:",
            "",
        ]
        lines += table(
            ("method", "computed, ms a step", "stored on the way", "read", "times as fast", "bytes of all results"),
            [
                (
                    row["method"],
                    *(milliseconds(row[f"{mode}_ms_per_step"]) for mode in ("none", "fill", "read")),
                    ratio(row["ratio"]),
                    "the same" if row["identical"] else "DIFFERENT",
                )
                for row in record["rows"]
            ],
        )
        lines.append("")
    return lines


def reference(results: Path) -> list[str]:
    lines = []
    for record in records("reference_loop*.json", results):
        lines += [
            f"{record['words'][0].removeprefix('pair=')}, batch {record['batch_size']}, {record['precision']}, "
            f"{record['workers']} workers of the usual loop, on {machine(record)}:",
            "",
        ]
        lines += table(
            ("method", "usual loop, images/s", "vrm, images/s", "times as fast", "in each round"),
            [
                (
                    name,
                    f"{row['usual_images_per_second']:,.1f}",
                    f"{row['our_images_per_second']:,.1f}",
                    ratio(row["ratio"]),
                    ", ".join(ratio(value) for value in row["ratios"]),
                )
                for name, row in record["methods"].items()
            ],
        )
        lines.append("")
    return lines


TABLES: Tables = {
    "goals": (goals, "benchmarks/gpu.sh"),
    "steps": (steps, "vrm bench step cifar100 pair=resnet32x4/resnet8x4 methods=all against=naive out=FILE"),
    "shares": (shares, "vrm bench step cifar100 pair=resnet32x4/resnet8x4 methods=all out=FILE"),
    "options": (options, "vrm bench step cifar100 pair=.. methods=[kd,vrm] against=[compile=true,..] out=FILE"),
    "views": (views, "python benchmarks/views.py"),
    "reference": (reference, "python benchmarks/reference_loop.py"),
    "cache": (cache, "python benchmarks/teacher_cache.py"),
}


def _of_cpu(line: str) -> bool:
    """Return whether the line above a table names a processor and no GPU."""
    return " threads, torch " in line or "/views.json" in line


GPU = "On a GPU this has not been measured yet; `benchmarks/gpu.sh` does it."


def wrapped(line: str) -> list[str]:
    """Return a line of prose in parts of 120 characters; a row of a table stays whole."""
    return [line] if line.startswith("|") else textwrap.wrap(line, 120, break_on_hyphens=False) or [""]


def filled(text: str, results: Path, tables: Tables = TABLES, page: str = PAGE.name) -> str:
    """Return the page with all its tables made again."""
    for name, (make, command) in tables.items():
        lines = make(results)
        if not lines:
            lines = [f"Not measured yet: `{command}`.", ""]
        elif name != "goals" and not any(", torch " in line and not _of_cpu(line) for line in lines):
            lines += [GPU, ""]
        body = "\n".join(part for line in lines for part in wrapped(line))
        text, count = re.subn(
            rf"<!-- {name} -->\n.*?<!-- end -->",
            lambda match, name=name, body=body: f"<!-- {name} -->\n\n{body}\n<!-- end -->",
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"{page} must have the marks of {name!r} once, it has them {count} times")
    return text


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
