"""Independent runs side by side in local processes, with one live display; what is done already is not done again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vrm.config import Resolved
from vrm.training.loop import Preempted
from vrm.training.run_folder import Record, check_settings, read_run


def run_all(jobs: Sequence[Resolved], *, console: Console, num_workers: int | None = None) -> list[Record]:
    """Train every job, finished ones excepted and interrupted ones from where they were; returns all records in order.

    Each process computes on one thread, so that a run's result does not depend on how many run beside it. The first
    failure stops what has not begun and is raised when what is running has ended.
    """
    for job in jobs:
        check_settings(job.run)
    waiting = [job for job in jobs if not (job.run.run / "model.json").is_file()]
    with _display(console) as progress:
        overall = progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(waiting), info="")
        if waiting:
            _run(waiting, progress, overall, num_workers or min(len(waiting), os.cpu_count() or 1))
    return [read_run(job.run.run) for job in jobs]


def _run(jobs: Sequence[Resolved], progress: Progress, overall: TaskID, num_workers: int) -> None:
    bars: dict[Path, TaskID] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_follow, initargs=(os.getpid(),)) as pool:
        futures: dict[Future[None], Path] = {pool.submit(_one, job): job.run.run for job in jobs}
        epochs = {job.run.run: job.run.epochs for job in jobs}
        try:
            while futures:
                time.sleep(0.2)
                for path in futures.values():
                    _watch(path, epochs[path], progress, bars)
                for future in [future for future in futures if future.done()]:
                    path = futures.pop(future)
                    if path in bars:
                        progress.remove_task(bars.pop(path))
                    future.result()
                    progress.advance(overall)
                    _print_end(path, progress)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise Preempted("stopped, each run with a checkpoint; the same command goes on") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_stopped = False
"""Whether this process was told to stop: what it still finds in its queue is then not begun."""


def _follow(parent: int) -> None:
    """Let this process stop, with a checkpoint, when ``parent`` is no more: a killed sweep leaves nothing running."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # a run stops with a checkpoint; without one this ends the process
        while not _stopped:
            time.sleep(0.1)
        os._exit(75)

    threading.Thread(target=watch, daemon=True).start()


def _one(job: Resolved) -> None:
    """Train one job in a process of its own."""
    global _stopped

    import torch

    from vrm.training.runs import resume, start

    if _stopped:
        raise Preempted(f"{job.run.run} was not begun")
    torch.set_num_threads(1)
    quiet = Console(quiet=True)
    try:
        if (job.run.run / "config.yaml").is_file():
            resume(job.run.run, console=quiet, quiet=True)
        else:
            start(job, console=quiet, quiet=True)
    except Preempted:
        _stopped = True
        raise


def _display(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[info]}")
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)


def _watch(path: Path, epochs: int, progress: Progress, bars: dict[Path, TaskID]) -> None:
    """Show how far a run has come, as its log tells."""
    if not (path / "metrics.jsonl").is_file() or not (path / "config.yaml").is_file():
        return
    curve = read_run(path).curve("test", "top1")
    if path not in bars:
        bars[path] = progress.add_task(f"  {path.name}", total=epochs, info="")
    if curve:
        progress.update(bars[path], completed=curve[-1][0], info=f"top-1 {curve[-1][1]:.1f} %")


def _print_end(path: Path, progress: Progress) -> None:
    model = read_run(path).model
    if model is None:
        raise RuntimeError(f"{path} ended without a model.json")
    progress.console.print(
        f"{path.name}: last top-1 {model['last']['top1']:.2f} %, best {model['best']['top1']:.2f} %, "
        f"{model['seconds']:.0f} s",
        highlight=False,
    )
