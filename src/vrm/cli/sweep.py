"""``vrm sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vrm.cli import Recipe, Words, resumable

if TYPE_CHECKING:
    from rich.console import Console

    from vrm.config import Resolved
    from vrm.sweeps.local import Device


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    @resumable()
    def sweep(recipe: Recipe, words: Words = None) -> None:
        """Train many runs; lists span them: vrm sweep cifar100 pair=[a/b,c/d] method=[kd,vrm] seed=[0,1,2] run=DIR.

        workers=N runs side by side on each device, devices=[0,1] GPUs, on_failure=continue|stop, dry=true lists
        the runs. The same command goes on where it was stopped.
        """
        from vrm.cli._show import console
        from vrm.report import summarise, table, verdict
        from vrm.runs.folder import check_settings, read_run
        from vrm.sweeps.grid import budget, span
        from vrm.sweeps.local import SomeFailed, find_devices, run_all, visible_gpus

        mine = [word for word in words or [] if word.partition("=")[0] in Settings.__dataclass_fields__]
        own, out = _settings(mine), console()
        folder = Path(own.run or f"runs/{Path(recipe).stem}-sweep")
        jobs = span(recipe, [word for word in words or [] if word not in mine], folder=folder)
        for job in jobs:
            check_settings(job.run)
        if own.dry:
            _list(jobs, out)
            return
        devices: Sequence[Device] = find_devices(jobs)
        if own.devices is not None:
            devices = _chosen(own.devices, visible_gpus())
        longest_first = sorted(jobs, key=lambda job: -budget(job.run).passes)
        failed = None
        try:
            run_all(longest_first, console=out, num_workers=own.workers, devices=devices, on_failure=own.on_failure)
        except SomeFailed as error:
            failed = error
        records = [read_run(job.run.run) for job in jobs if (job.run.run / "config.yaml").is_file()]
        if records:
            rows = summarise(records)
            out.print(table(rows))
            for line in verdict(rows):
                out.print(line, highlight=False, soft_wrap=True, markup=False)
        if failed is not None:
            raise failed


@dataclass(frozen=True)
class Settings:
    """What a sweep can be told beside its runs."""

    run: str | None = None
    workers: int | None = None
    devices: list[int] | None = None
    on_failure: Literal["continue", "stop"] = "continue"
    dry: bool = False


def _settings(words: Sequence[str]) -> Settings:
    """``key=value`` words, checked."""
    from pydantic import ConfigDict, Field, create_model

    from vrm.config import checked, parse_words

    types: dict[str, Any] = {
        "run": str | None,
        "workers": Annotated[int, Field(ge=1)] | None,
        "devices": Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None,
        "on_failure": Literal["continue", "stop"],
        "dry": bool,
    }
    fields: dict[str, Any] = {name: (kind, getattr(Settings, name)) for name, kind in types.items()}
    schema = create_model("Sweep", __config__=ConfigDict(extra="forbid"), **fields)
    return Settings(**checked(schema, parse_words(words)).model_dump())


def _chosen(numbers: Sequence[int], visible: Sequence[Device]) -> list[Device]:
    from vrm.config import ConfigError

    missing = [number for number in numbers if number >= len(visible)]
    if missing or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"devices={list(numbers)}: {len(visible)} GPU(s) are visible here, numbered from 0; name each once"
        )
    return [visible[number] for number in numbers]


def _list(jobs: Sequence[Resolved], out: Console) -> None:
    """The runs and their cost, nothing else."""
    from collections import Counter

    from rich import box
    from rich.table import Table

    from vrm.sweeps.grid import budget, state

    title = f"{len(jobs)} run{'s' * (len(jobs) > 1)} in {jobs[0].run.run.parent}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", caption_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for heading in ("student passes", "teacher's", "batch"):
        table.add_column(heading, justify="right")
    states = []
    for job in jobs:
        cost, reached = budget(job.run), state(job.run)
        cached = " (cached)" if job.run.teacher is not None and job.run.teacher.cache is not None else ""
        taught = f"{cost.teacher * (cost.epochs + cost.extra)}{cached}" if cost.teacher else "-"
        table.add_row(job.run.run.name, reached, str(cost), taught, str(job.run.batch_size))
        states.append(reached.partition(" ")[0])
    table.caption = (
        "passes: views of each training image × epochs. "
        + ", ".join(f"{count} {name}" for name, count in Counter(states).items())
        + f"; {sum(budget(job.run).passes for job, s in zip(jobs, states, strict=True) if s != 'finished'):,} student "
        "passes of each image in those that are not finished"
    )
    out.print(table)
