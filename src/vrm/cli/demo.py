"""``vrm demo``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from vrm.cli import Words, resumable

TEACHER = "resnet20"
TEACHER_EPOCHS = 20
STUDENT = "resnet8"
LABELS_PER_CLASS = 5
SETTINGS = {
    "alone": ["method=ce"],
    "alone, two views": ["method=ce", "views=2"],
    "KD": ["method=kd"],
    "KD, two views": ["method=kd", "views=2"],
    "VRM": ["method=vrm"],
}

NOTES = (
    f"Real handwritten digits of 8 x 8 pixels (scikit-learn). The teacher, {TEACHER}, was trained on all 1,438 "
    f"training images; each student, {STUDENT}, sees only {LABELS_PER_CLASS} images of each class, "
    "the same ones in every setting, for the same number of epochs. "
    "With all images every setting comes close to 100 %, and distillation has nothing to add. "
    "A setting with two views costs its student two passes over an image instead of one.",
)

HELP = """Distil handwritten digits with several methods, as a first example that takes minutes.

It trains a teacher and small students, and ends in a table, a verdict and an HTML page. The same command goes on where
it was stopped.

\b
  run=FOLDER   Where the folders of the runs and report.html lie; runs/demo.
  seeds=N      How many seeds each setting is trained with; 3.
  epochs=N     How many epochs each student is trained for; 60.
"""


def register(app: typer.Typer) -> None:
    @app.command(help=HELP)
    @resumable()
    def demo(words: Words = None) -> None:
        from vrm.cli._show import console
        from vrm.config import resolve
        from vrm.report import summarise, table, verdict, write_report
        from vrm.sweeps.local import run_all

        (folder, num_seeds, num_epochs), out = _parse(words or []), console()
        teacher = folder / "teacher"
        out.out(f"teacher: {TEACHER}, on all 1,438 digits; students: {STUDENT}, on {LABELS_PER_CLASS} digits a class")
        words = [f"model={TEACHER}", f"run={teacher}", f"epochs={TEACHER_EPOCHS}", "seed=100", "threads=1"]
        run_all([resolve("train", "digits", words)], console=out)
        shared = [
            f"student={STUDENT}",
            f"data.labels_per_class={LABELS_PER_CLASS}",
            f"epochs={num_epochs}",
            "threads=1",
        ]
        jobs = {
            (label, seed): resolve(
                "distill",
                "digits",
                [*shared, *extra, f"seed={seed}", f"run={run_folder(folder, label, seed)}"]
                + ([] if "method=ce" in extra else [f"teacher={teacher}/"]),
            )
            for label, extra in SETTINGS.items()
            for seed in range(num_seeds)
        }
        records = dict(zip(jobs, run_all(list(jobs.values()), console=out), strict=True))
        labels = {jobs[key].run.run: key[0] for key in jobs}
        rows = summarise(list(records.values()), label=lambda record: labels[record.path])
        out.print(table(rows))
        for line in verdict(rows):
            out.out(line)
        page = folder / "report.html"
        write_report(
            page,
            list(records.values()),
            title="Distilling handwritten digits",
            notes=NOTES,
            label=lambda record: labels[record.path],
            repeat="vrm demo",
        )
        out.out(f"report: {page}")


def _parse(words: Sequence[str]) -> tuple[Path, int, int]:
    """Return the folder, and how many seeds and epochs. Raise ``ConfigError`` for words that are refused."""
    from pydantic import BaseModel, Field

    from vrm.config import checked, parse_words
    from vrm.config.schema import UserPath

    class Settings(BaseModel, extra="forbid"):
        run: UserPath = Path("runs/demo")
        seeds: int = Field(3, gt=0)
        epochs: int = Field(60, gt=0)

    found = checked(Settings, parse_words(words))
    return found.run, found.seeds, found.epochs


def run_folder(folder: Path, label: str, seed: int) -> Path:
    """Return the folder of one run of the demo."""
    return folder / f"{label.lower().replace(', ', '-').replace(' ', '-')}-{seed}"
