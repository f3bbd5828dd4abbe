"""``vrm demo``."""

from __future__ import annotations

from pathlib import Path

import typer

from vrm.cli import Words

TEACHER = "resnet20"
STUDENT = "resnet8"
LABELS_PER_CLASS = 5
SETTINGS = {
    "alone": ["method=ce"],
    "alone, two views": ["method=ce", "views=2"],
    "KD": ["method=kd"],
    "KD, two views": ["method=kd", "views=2"],
    "VRM": ["method=vrm"],
}


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def demo(words: Words = None) -> None:
        """Distil real handwritten digits on this machine, in minutes: vrm demo [run=runs/demo] [seeds=3] [epochs=60]."""
        from vrm.cli._show import console
        from vrm.config import ConfigError, near, parse_words, resolve
        from vrm.report import summarise, table, verdict, write_report
        from vrm.training.pool import run_all

        given = {"run": "runs/demo", "seeds": 3, "epochs": 60} | parse_words(words or [])
        if unknown := sorted(set(given) - {"run", "seeds", "epochs"}):
            raise ConfigError(f"unknown key {unknown[0]!r}; {near(unknown[0], ['run', 'seeds', 'epochs'])}")
        for key in ("seeds", "epochs"):
            if not isinstance(given[key], int) or isinstance(given[key], bool) or given[key] < 1:
                raise ConfigError(f"{key}={given[key]}: give a whole number of at least 1")
        folder, out = Path(str(given["run"])), console()

        teacher = folder / "teacher"
        out.print(
            f"teacher: {TEACHER} on all training digits; students: {STUDENT} on {LABELS_PER_CLASS} labelled digits a class",
            highlight=False,
        )
        run_all(
            [resolve("train", "digits", [f"model={TEACHER}", f"run={teacher}", "epochs=20", "seed=100", "threads=1"])],
            console=out,
        )
        shared = [f"student={STUDENT}", f"data.labels_per_class={LABELS_PER_CLASS}", f"epochs={given['epochs']}", "threads=1"]
        jobs = {
            (label, seed): resolve(
                "distill",
                "digits",
                [*shared, *extra, f"seed={seed}", f"run={folder / _slug(label)}-{seed}"]
                + ([] if "method=ce" in extra else [f"teacher={teacher}/"]),
            )
            for label, extra in SETTINGS.items()
            for seed in range(given["seeds"])
        }
        records = dict(zip(jobs, run_all(list(jobs.values()), console=out), strict=True))
        rows = summarise(list(records.values()), label=lambda record: _label(record.config))
        out.print(table(rows))
        for line in verdict(rows):
            out.print(line, highlight=False, soft_wrap=True)
        page = folder / "report.html"
        write_report(page, list(records.values()), title="Distilling handwritten digits", notes=[])
        out.print(f"report: {page}", highlight=False, soft_wrap=True)


def _slug(label: str) -> str:
    return label.lower().replace(", ", "-").replace(" ", "-")
