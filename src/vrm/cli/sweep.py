"""``vrm sweep``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vrm.cli import Recipe, Words, resumable

if TYPE_CHECKING:
    from rich.console import Console

    from vrm.config import Resolved
    from vrm.sweeps.local import Device

HELP = """Train many runs: a list in a setting gives one run for each of its values.

Several lists give all combinations. The runs end in one table: table.md, table.csv and report.html in the sweep's
folder, which are brought up to date as runs finish. The same command goes on where it was stopped.

\b
  vrm sweep cifar100 data.root=PATH pair=[resnet56/resnet20,vgg13/vgg8]
      teacher.weights={teacher}.pth method=[kd,vrm] seed=[0,1,2]

\b
Beside the settings of its runs, a sweep takes:
  run=FOLDER        Where the folders of the runs lie; runs/RECIPE-sweep.
  workers=N         How many runs each device takes at once; by default one
                    on a GPU, and on the CPU one for each processor.
  devices=[0,1]     Which of the visible GPUs to use; by default all.
  on_failure=stop   Start no further run after a failure; by default the
                    others go on.
  dry=true          Only list the runs, their cost and how far they are.
"""


def register(app: typer.Typer) -> None:
    @app.command(help=HELP)
    @resumable()
    def sweep(recipe: Recipe, words: Words = None) -> None:
        from vrm.cli._show import console
        from vrm.config import checked, parse_words
        from vrm.config.words import split_words
        from vrm.report import summarise, table, verdict, write_tables
        from vrm.runs.folder import is_run, read_run
        from vrm.runs.resumption import decide_resumption
        from vrm.sweeps.grid import Settings, count_passes, expand
        from vrm.sweeps.local import SomeFailed, find_devices, run_all, visible_gpus

        own, of_runs = split_words(words or [], Settings.model_fields)
        settings, out = checked(Settings, parse_words(own)), console()
        folder = settings.run or Path(f"runs/{Path(recipe).stem}-sweep")
        jobs = expand(recipe, of_runs, folder=folder)
        for job in jobs:
            decide_resumption(job.run.run, job.run).require()
        if settings.dry:
            _list(jobs, out)
            return
        devices: Sequence[Device] = find_devices(jobs)
        if settings.devices is not None:
            devices = _choose_devices(settings.devices, visible_gpus())
        repeat = shlex.join(["vrm", "sweep", recipe, *(words or [])])
        longest_first = sorted(jobs, key=lambda job: -count_passes(job.run).total)
        failed = None
        try:
            run_all(
                longest_first,
                console=out,
                num_workers=settings.workers,
                devices=devices,
                on_failure=settings.on_failure,
                on_finish=lambda: _refresh(jobs, folder, recipe, repeat, out),
            )
        except SomeFailed as error:
            failed = error
        records = [read_run(job.run.run) for job in jobs if is_run(job.run.run)]
        if records:
            rows = summarise(records)
            out.print(table(rows))
            for line in verdict(rows):
                out.out(line)
            write_tables(folder, records, title=f"Sweep of {recipe}", repeat=repeat)
            out.out(f"table and report: {folder / 'table.md'}, {folder / 'table.csv'}, {folder / 'report.html'}")
        if failed is not None:
            raise failed


def _refresh(jobs: Sequence[Resolved], folder: Path, recipe: str, repeat: str, out: Console) -> None:
    """Bring the files of a sweep under way up to date; if the disk does not take them, tell it and go on."""
    from vrm.files import NotWritten
    from vrm.report import write_tables
    from vrm.runs.errors import RunError
    from vrm.runs.folder import is_run, read_run

    records = []
    for job in jobs:
        with suppress(RunError):  # of a run under way, which deals with its own files
            records += [read_run(job.run.run)] if is_run(job.run.run) else []
    try:
        write_tables(folder, records, title=f"Sweep of {recipe}", repeat=repeat)
    except NotWritten as error:
        out.print(str(error), style="yellow", markup=False, soft_wrap=True)


def _choose_devices(numbers: Sequence[int], visible: Sequence[Device]) -> list[Device]:
    """Return the visible GPUs with these numbers. Raise ``ConfigError`` for a number that is no GPU's, or twice."""
    from vrm.config import ConfigError
    from vrm.wording import counted

    if any(number >= len(visible) for number in numbers) or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"devices={list(numbers)}: {counted(len(visible), 'GPU')} can be used here, numbered from 0; name each once"
        )
    return [visible[number] for number in numbers]


def _list(jobs: Sequence[Resolved], out: Console) -> None:
    """Print the runs with their cost and how far they are."""
    from collections import Counter

    from rich import box
    from rich.table import Table

    from vrm.sweeps.grid import count_passes, describe_progress
    from vrm.wording import counted

    title = f"{counted(len(jobs), 'run')} in {jobs[0].run.run.parent}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for heading in ("student passes", "teacher's", "batch"):
        table.add_column(heading, justify="right")
    states: Counter[str] = Counter()
    left = 0
    for job in jobs:
        passes, progress = count_passes(job.run), describe_progress(job.run)
        cached = " (cached)" if job.run.teacher is not None and job.run.teacher.cache is not None else ""
        taught = f"{passes.teacher * (passes.epochs + passes.extra)}{cached}" if passes.teacher else "-"
        table.add_row(job.run.run.name, progress, str(passes), taught, str(job.run.batch_size))
        states[progress.partition(" ")[0]] += 1
        left += passes.total * (progress != "finished")
    table.caption = (
        "passes: views of each training image × epochs. "
        + ", ".join(f"{count} {name}" for name, count in states.items())
        + f"; {left:,} student passes of each image in those that are not finished"
    )
    out.print(table)
