"""``vrm bench``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vrm.cli import Recipe, Words
from vrm.wording import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PARTS = {
    "views": "views",
    "teacher": "teach",
    "student": "stud",
    "loss": "loss",
    "backward": "backw",
    "optimizer": "optim",
    "guard": "guard",
    "measure": "meas",
    "other": "other",
}
"""Short names of the parts of a step, for a narrow table."""

HELP = """Measure what a training step costs with each method.

The step is the very one that training takes. Without data.root images are made up, and a teacher without weights is
random: neither changes what a step costs.

\b
  vrm bench step cifar100 pair=resnet32x4/resnet8x4 methods=[kd,vrm,crd]

\b
Beside the settings of a run, it takes:
  methods=[kd,vrm]          The methods to measure, or all.
  against=[compile=true]    Other settings to measure each method with, too;
                            + joins several. naive is VRM with every edge
                            in memory.
  NAME.option=value         An option of one method.
  rounds=N, steps=N         How many rounds, and timed steps in each.
  warmup=N                  Untimed steps before them.
  samples=N, classes=N      How many images to make up, of how many classes.
  memory=false              Do not measure peak memory on the CPU.
  out=FILE.json             Where to write everything that was measured.
"""


def register(app: typer.Typer) -> None:
    @app.command(help=HELP)
    def bench(
        what: Annotated[str, typer.Argument(help="What to measure: step.")], recipe: Recipe, words: Words = None
    ) -> None:
        import json

        from vrm.bench.comparison import measure_step
        from vrm.bench.subjects import Settings
        from vrm.cli._show import console
        from vrm.config import ConfigError, checked, parse_words
        from vrm.config.words import split_words
        from vrm.files import write_text
        from vrm.wording import nearest

        if what != "step":
            raise ConfigError(f"vrm bench {what}: {nearest(what, ['step'])}")
        own, rest = split_words(words or [], Settings.model_fields)
        settings, out = checked(Settings, parse_words(own)), console()
        if settings.out is not None and not settings.out.parent.is_dir():
            raise ConfigError(f"out={settings.out}: there is no folder {settings.out.parent}; make it first")
        if settings.out is not None and settings.out.is_dir():
            raise ConfigError(f"out={settings.out} is a folder; give a file, as out={settings.out / 'step.json'}")
        found = measure_step(recipe, rest, settings, console=out)
        show(found, out)
        if settings.out is not None:
            write_text(settings.out, json.dumps(found, indent=1) + "\n")
            out.out(f"written to {settings.out}")
        if not found["rows"]:
            raise typer.Exit(1)


def show(found: Mapping[str, Any], out: Console) -> None:
    """Print the time of each step, the shares of its parts, and what could not be measured."""
    if not out.is_terminal:
        out.width = max(out.width, 120)
    rows = found["rows"]
    if rows:
        out.print(_times(found))
    if any(row["shares"] for row in rows):
        out.print(_shares(found))
    for row in rows:
        if row["nonfinite_steps"]:
            out.out(
                f"{row['name']}: {counted(int(row['nonfinite_steps']), 'step')} met NaN or infinity and were taken back"
            )
        if row["disagreement_of_forms"] is not None:
            gap = f"by {row['disagreement_of_forms']:.1g} at most (relative, in float64)"
            out.out(f"{row['name']}: its losses differ from the closed form's {gap}")
    for name, note in found["notes"].items():
        out.out(f"{name}: memory {note}")
    for each in found["failed"]:
        out.out(f"{each['name']}: not measured: {each['reason']}")


def _table(title: str, heads: Sequence[str]) -> Table:
    """Return an empty table with a row for each step."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption_justify="left", padding=0)
    table.add_column("step", overflow="fold", min_width=12)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _times(found: Mapping[str, Any]) -> Table:
    from rich.markup import escape

    from vrm.report.tables import number

    rows, images = found["rows"], found["images"]
    height, width = images["size"]
    changed = any(row["change"] for row in rows)
    title = (
        f"{found['pair']}, {images['classes']} classes, {height}x{width} pixels, on {found['environment']['device']}"
    )
    heads = ("views", "ms", "p95", "images/s", "×ce", "×kd", *(["×same"] * changed), "×nets", "MiB")
    table = _table(title, (*heads, "kernels" if found["launches"].startswith("kernels") else "calls"))
    for row in rows:
        ratios = (row["over"].get("ce"), row["over"].get("kd"), *([row["over_unchanged"]] * changed))
        memory, launches = row["peak_memory_bytes"], row["launches"]
        table.add_row(
            escape(row["name"]),
            str(row["student_views"]),
            _milliseconds(row["median_ms"]),
            _milliseconds(row["p95_ms"]),
            f"{row['images_per_second']:,.0f}",
            *map(number, ratios),
            number(row["over_bare_networks"], ".3f"),
            "-" if memory is None else f"{memory / 2**20:,.0f}",
            number(launches, ",d"),
        )
    settings = sorted({(row["batch_size"], row["precision"]) for row in rows if not row["change"]})
    same = "; ×same: as the same step unchanged" * changed
    table.caption = (
        ", ".join(f"batch {batch}, {precision}" for batch, precision in settings)
        + f"; images {'made up' if found['made_up_images'] else 'real'}; {found['rounds']} rounds of "
        f"{counted(found['steps_a_round'], 'step')} in turns, median and p95 of a step; {found['clock']}; "
        f"{sum(row['recorded'] for row in rows)} of {len(rows)} recorded as CUDA graphs. ×ce, ×kd: as long as cross "
        f"entropy alone, as KD{same}; ×nets: as the networks' own passes. MiB: {found['peak_memory']}; "
        f"{found['launches']}"
    )
    return table


def _shares(found: Mapping[str, Any]) -> Table:
    from rich.markup import escape

    from vrm.report.tables import number

    table = _table(f"% {found['shares']}", tuple(PARTS.values()))
    for row in found["rows"]:
        table.add_row(escape(row["name"]), *(number(100 * row["shares"].get(part, math.nan), ".1f") for part in PARTS))
    return table


def _milliseconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 100 else f"{value:.2f}"
