"""Independent runs side by side on this machine, each in a process of its own (:mod:`vrm.sweeps.worker`).

Finished runs are not done again, interrupted ones go on from their newest checkpoint. A run that fails or is killed
takes no other run with it. A run that finds no memory beside others is put back, and its device takes one run fewer
from then on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vrm import tasks
from vrm.config import ConfigError, Resolved
from vrm.runs.errors import Preempted, RunError
from vrm.runs.folder import Record, is_run, read_run
from vrm.runs.resumption import decide_resumption
from vrm.runs.signals import STOP_SIGNALS, on_stop_signal
from vrm.sweeps.grid import count_passes, is_finished
from vrm.sweeps.worker import OUT_OF_MEMORY
from vrm.wording import counted, first_line, seconds_in_words

COMMAND = (sys.executable, "-m", "vrm.sweeps.worker")
"""What a run's process executes."""

SECONDS_BETWEEN_LOOKS = 5.0
"""How often the bars on a terminal are brought up to date from the run folders."""

Device = str | None
"""A GPU as ``CUDA_VISIBLE_DEVICES`` names it; ``None`` is the CPU."""


class RunFailed(RuntimeError):
    """A run of a sweep failed; the message holds the last line it printed and where the rest is."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        """``exit_code``: 2 for a run whose settings cannot be, 1 for all else."""
        self.exit_code = exit_code
        super().__init__(message)


class SomeFailed(RuntimeError):
    """Some of the runs failed; the others came to their end."""

    exit_code = 1

    def __init__(self, failures: Mapping[Path, RunFailed]) -> None:
        """``failures``: what happened, by run folder."""
        self.failures = dict(failures)
        listed = "".join(f"\n  {path}: {first_line(error)}" for path, error in failures.items())
        super().__init__(f"{counted(len(failures), 'run')} failed; the same command tries again:{listed}")


def run_all(
    jobs: Sequence[Resolved],
    *,
    console: Console,
    num_workers: int | None = None,
    devices: Sequence[Device] | None = None,
    on_failure: Literal["raise", "stop", "continue"] = "raise",
    on_finish: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Train every job that is not finished, and return the records of all jobs in order.

    On the CPU each process computes on one thread (or as many as the run's ``threads``), so that a run's result does
    not depend on how many run beside it.

    Args:
        jobs: Resolved runs, each with a folder of its own.
        console: Shows one bar a run on a terminal, and elsewhere a line at the end of each run.
        num_workers: How many runs each device takes at once. By default one on a GPU, and on the CPU as many as there
            are processors for.
        devices: Where to train; by default what :func:`find_devices` returns.
        on_failure: ``continue`` goes on with the other runs. ``raise`` and ``stop`` start no further run and wait for
            those under way; then ``raise`` raises the first failure, ``stop`` :class:`SomeFailed` with all of them.
        on_finish: Called after each run that came to its end.

    Raises:
        ConfigError, RunError: Two jobs share a folder, or a folder holds other settings; nothing was started.
        RunFailed, SomeFailed: Runs failed, see ``on_failure``.
        Preempted: A signal to stop came; all runs have stopped, each with a checkpoint.
    """
    for path, count in Counter(job.run.run for job in jobs).items():
        if count > 1:
            raise ConfigError(f"{count} runs would share the folder {path}; give each its own")
    for job in jobs:
        decide_resumption(job.run.run, job.run).require()
    waiting = deque(job for job in jobs if not is_finished(job.run))
    if waiting:
        devices = find_devices(jobs) if devices is None else devices
        limits = {device: num_workers or _default_workers(jobs, device) for device in devices}
        with _make_progress(console) as progress:
            overall = progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(waiting), info="")
            keep_going = on_failure == "continue"
            failures = _Pool(waiting, limits, progress, overall, keep_going=keep_going, on_finish=on_finish).run()
        if failures:
            raise next(iter(failures.values())) if on_failure == "raise" else SomeFailed(failures)
    return [read_run(job.run.run) for job in jobs]


def find_devices(jobs: Sequence[Resolved]) -> list[Device]:
    """Return every visible GPU, or the CPU if there is none or all jobs ask for the CPU."""
    return (visible_gpus() if any(job.run.device != "cpu" for job in jobs) else []) or [None]


def visible_gpus() -> list[Device]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them, without touching any."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    return [*names][:count]


def _default_workers(jobs: Sequence[Resolved], device: Device) -> int:
    """Return one for a GPU, and for the CPU as many as there are processors for, each with its threads."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return processors // max(job.run.threads or 1 for job in jobs) or 1 if device is None else 1


# ---- the pool --------------------------------------------------------------------------------------------------------


class _Pool:
    """Starts waiting jobs where a device has room, and deals with those that end."""

    def __init__(
        self,
        waiting: deque[Resolved],
        limits: dict[Device, int],
        progress: Progress,
        overall: TaskID,
        *,
        keep_going: bool,
        on_finish: Callable[[], None],
    ) -> None:
        """``limits``: how many runs each device takes at once."""
        self.on_finish = on_finish
        self.waiting, self.limits, self.keep_going = waiting, limits, keep_going
        self.progress, self.overall = progress, overall
        self.running: list[_Process] = []
        self.failures: dict[Path, RunFailed] = {}

    def run(self) -> dict[Path, RunFailed]:
        """Train all jobs; return what failed, by folder. Raise :class:`Preempted` after a signal to stop."""
        signals: list[bool] = []
        seen, shown = 0, 0.0
        with on_stop_signal(lambda: signals.append(True)):
            try:
                while self.waiting or self.running:
                    if len(signals) > seen:
                        self.waiting.clear()
                        for process in self.running:
                            process.stop(at_once=seen > 0)
                        seen = len(signals)
                    if self.failures and not self.keep_going:
                        self.waiting.clear()
                    while self.waiting and (free := self._free_devices()):
                        self.running.append(_Process(self.waiting.popleft(), free[0]))
                    time.sleep(0.1)
                    for process in [each for each in self.running if each.popen.poll() is not None]:
                        self.running.remove(process)
                        self._finish(process, stopping=seen > 0)
                    if not self.progress.disable and time.monotonic() - shown > SECONDS_BETWEEN_LOOKS:
                        shown = time.monotonic()
                        for process in self.running:
                            self._show(process)
            finally:
                for process in self.running:
                    process.stop()
                for process in self.running:
                    process.end()
        if seen:
            raise Preempted("stopped, each run with a checkpoint; the same command goes on")
        return self.failures

    def _count_on(self, device: Device) -> int:
        """Return how many runs are under way on a device."""
        return sum(process.device == device for process in self.running)

    def _free_devices(self) -> list[Device]:
        """Return the devices that take another run, the emptiest first."""
        return sorted((d for d in self.limits if self._count_on(d) < self.limits[d]), key=self._count_on)

    def _finish(self, process: _Process, *, stopping: bool) -> None:
        """Print how a run ended, and note its failure or put it back."""
        if process.task is not None:
            self.progress.remove_task(process.task)
        code, reason = process.end()
        name, device = process.path.name, process.device
        if code == 0:
            self.progress.advance(self.overall)
            self._print(_describe(process.path))
            self.on_finish()
        elif stopping and code in (75, OUT_OF_MEMORY):
            return
        elif code == OUT_OF_MEMORY and (others := self._count_on(device)):
            self.limits[device] = others
            self.waiting.appendleft(process.job)
            where = "the CPU" if device is None else f"GPU {device}"
            self._print(
                f"[yellow]{escape(name)}: {escape(reason)}. It is put back, and {where} takes {counted(others, 'run')} "
                "at a time from now on[/]"
            )
        else:
            self.failures[process.path] = RunFailed(reason, 2 if code == 2 else 1)
            self._print(f"[red]{escape(name)} failed:[/] {escape(reason)}")

    def _print(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)

    def _show(self, process: _Process) -> None:
        """Update the bar of a run from its folder."""
        try:
            record = read_run(process.path)
        except RunError:  # not begun yet, or a file of it is damaged, which its own process deals with
            return
        if not record.timings or record.task is None:
            return
        if process.task is None:
            passes = count_passes(process.job.run)
            process.task = self.progress.add_task(f"  {process.path.name}", total=passes.epochs + passes.extra, info="")
        metric = record.task.primary
        scores = record.curve("test", metric.key)
        info = metric.describe(scores[-1][1]) if scores else ""
        self.progress.update(process.task, completed=record.timings[-1]["epoch"], info=info)


def _describe(path: Path) -> str:
    """Return one line on a finished run."""
    model = read_run(path).model
    if model is None:
        raise RuntimeError(f"{path} ended without a model.json")
    metric = tasks.load(model["task"]).primary
    last, best = (model[which][metric.key] for which in ("last", "best"))
    return (
        f"{escape(path.name)}: last {metric.describe(last)}, best {metric.text(best)}, "
        f"{seconds_in_words(model['seconds'])}"
    )


def _make_progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[info]}")
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)


# ---- a run's process, seen from the pool -----------------------------------------------------------------------------


@dataclass
class _Process:
    """A run in a process of its own; it starts when this object is made."""

    job: Resolved
    device: Device
    task: TaskID | None = None

    def __post_init__(self) -> None:
        """Start the process. It has its own process group: Ctrl-C reaches the pool alone, which passes it on once."""
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        if self.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.device
        # Not the run's folder: that may not exist yet, or its disk may be full, which must not stop the run.
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (end() closes it)
        self.popen = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )
        assert self.popen.stdin is not None
        job = {"run": self.job.run.model_dump(mode="json"), "sources": self.job.sources}
        with suppress(BrokenPipeError):  # it has ended, which the pool will see
            self.popen.stdin.write(json.dumps(job).encode() + b"\n")
            self.popen.stdin.flush()

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.job.run.run

    def stop(self, *, at_once: bool = False) -> None:
        """Make the run stop with a checkpoint, or kill it."""
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):
            self.popen.stdin.close()
        if at_once:
            self.popen.kill()

    def end(self) -> tuple[int, str]:
        """Wait for the process; return its exit code and, unless it is 0, the reason. Append its output to the folder.

        A process ended by a signal to stop counts as stopped (75). One ended by SIGKILL counts as out of memory: that
        is how Linux ends processes when memory is short.
        """
        self.stop()
        code = self.popen.wait()
        with self.output:
            self.output.seek(0)
            printed = self.output.read()
        lines = printed.decode(errors="replace").split("\n")
        reason = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        if code < 0:
            reason = f"killed by {signal.Signals(-code).name}"
            code = OUT_OF_MEMORY if code == -signal.SIGKILL else 75 if -code in STOP_SIGNALS else 1
        try:
            if is_run(self.path):
                with (self.path / "output.txt").open("ab") as file:
                    file.write(printed)
                reason += f" (all it printed is in {self.path / 'output.txt'})"
        except OSError as error:
            reason += f" ({self.path / 'output.txt'} cannot be written: {error.strerror})"
        return code, reason
