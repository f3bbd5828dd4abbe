"""Independent runs side by side, each in a process of its own; what is done already is not done again.

A run that fails, or is killed, takes no other one with it. One that runs out of memory beside others is put back, and
its device takes one run fewer from then on: it goes on from its checkpoint, and nothing is lost.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vrm import config, tasks
from vrm.config import ConfigError, Resolved
from vrm.runs.checkpoint import Damaged, NotWritten, read_json
from vrm.runs.folder import Record, RunError, check_settings, read_run
from vrm.runs.trainer import NonFinite, Preempted
from vrm.tasks import Metric

HEADROOM = 0.1
"""The share of a GPU's memory that must be free for a run to start there beside others."""

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals at which a run stops."""

LONGEST_MESSAGE = 10_000
"""Characters of an error; a report fits into a pipe."""

PROGRAM = "from vrm.sweeps.local import work; work()"
"""What a run's process executes."""

EXPLAINED = (ConfigError, RunError, NonFinite, Damaged, NotWritten)
"""Failures of which the message says all."""

Device = str | None
"""A GPU as ``CUDA_VISIBLE_DEVICES`` names it; ``None`` is the CPU."""


class RunFailed(RuntimeError):
    """A run ended in a way that nobody expected; the message holds what its process said."""


class SomeFailed(RuntimeError):
    """Several runs were asked for, and some failed; the others came to their end."""

    def __init__(self, failures: Mapping[Path, Exception]) -> None:
        """``failures``: what happened, by run folder."""
        self.failures = dict(failures)
        listed = "".join(f"\n  {path}: {_first_line(error)}" for path, error in failures.items())
        super().__init__(f"{len(failures)} run(s) failed; the same command tries them again:{listed}")


def run_all(
    jobs: Sequence[Resolved],
    *,
    console: Console,
    num_workers: int | None = None,
    devices: Sequence[Device] | None = None,
    on_failure: Literal["raise", "stop", "continue"] = "raise",
) -> list[Record]:
    """Train every job, finished ones excepted and interrupted ones from where they were; returns all records in order.

    On the CPU each process computes on one thread (or as many as the run's ``threads``), so that a run's result does
    not depend on how many run beside it.

    Args:
        jobs: Resolved runs, each with a folder of its own.
        console: Shows one bar a run on a terminal, a line at the end of each elsewhere.
        num_workers: Runs side by side on each device. By default one on a GPU, and on the CPU as many as there are
            processors for.
        devices: Where; see :func:`find_devices`, which is the default.
        on_failure: ``continue`` goes on with the other runs; else what has not begun is left, and what is running comes
            to its end. Then ``raise`` raises the first failure itself, the others :class:`SomeFailed` with all.

    Raises:
        ConfigError, RunError: Two jobs share a folder, or a folder holds other settings; nothing was started.
        SomeFailed: Runs failed, see ``on_failure``.
        Preempted: SIGTERM, SIGUSR1 or Ctrl-C came; all runs have stopped, each with a checkpoint.
    """
    for path, count in Counter(job.run.run for job in jobs).items():
        if count > 1:
            raise ConfigError(f"{count} runs would share the folder {path}; give each its own")
    for job in jobs:
        check_settings(job.run)
    waiting = deque(job for job in jobs if not (job.run.run / "model.json").is_file())
    if waiting:
        devices = find_devices(jobs) if devices is None else devices
        room = {device: num_workers or _default_workers(jobs, device) for device in devices}
        with _display(console) as progress:
            overall = progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(waiting), info="")
            failures = _Pool(waiting, room, progress, overall, keep_going=on_failure == "continue").run()
        if failures:
            raise next(iter(failures.values())) if on_failure == "raise" else SomeFailed(failures)
    return [read_run(job.run.run) for job in jobs]


def find_devices(jobs: Sequence[Resolved]) -> list[Device]:
    """Every visible GPU, or the CPU if there is none or all jobs ask for it."""
    return (visible_gpus() if any(job.run.device != "cpu" for job in jobs) else []) or [None]


def visible_gpus() -> list[Device]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them. Touches none of them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    return [*names][:count]


def _default_workers(jobs: Sequence[Resolved], device: Device) -> int:
    return processors() // max(job.run.threads or 1 for job in jobs) or 1 if device is None else 1


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- the side of the pool ------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """One run in its process."""

    job: Resolved
    device: Device
    process: subprocess.Popen[bytes]
    requests: IO[bytes]
    report: IO[bytes]
    output: IO[bytes]
    task: TaskID | None = None
    metric: Metric | None = None
    logs: dict[str, Tail] = field(default_factory=dict)

    @staticmethod
    def start(job: Resolved, device: Device, *, beside_others: bool) -> Worker:
        """Begin a job, or go on with it."""
        task = {"run": job.run.model_dump(mode="json"), "sources": job.sources, "beside_others": beside_others}
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        output = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the result)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=environment,
            process_group=0,  # a terminal's Ctrl-C reaches the pool alone, which passes it on once
        )
        assert process.stdin is not None
        assert process.stdout is not None
        worker = Worker(job, device, process, process.stdin, process.stdout, output)
        worker._send(json.dumps(task))
        return worker

    def stop(self) -> None:
        """Ask the run to stop with a checkpoint; asked a second time, it stops at once."""
        self._send("stop")

    def _send(self, line: str) -> None:
        try:
            self.requests.write(line.encode() + b"\n")
            self.requests.flush()
        except BrokenPipeError:  # it has ended, which the pool will see
            pass

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.job.run.run

    def result(self) -> dict[str, Any]:
        """What the ended process reported, once. What it printed goes to its folder.

        Of an error ``kind`` and ``message``; ``memory`` in use on its GPU and the ``total`` there, in bytes.
        """
        with suppress(BrokenPipeError):
            self.requests.close()
        self.process.wait()
        with self.report, self.output:
            # A pipe holds all of a short report. A process that the run left behind may still hold its other end.
            os.set_blocking(self.report.fileno(), False)
            try:
                told = os.read(self.report.fileno(), 1 << 16)
            except BlockingIOError:
                told = b""
            self.output.seek(0)
            printed = self.output.read()
        if (self.path / "config.yaml").is_file():
            try:
                with (self.path / "output.txt").open("ab") as file:
                    file.write(printed)
            except OSError as error:  # the other runs must not suffer from it
                warnings.warn(f"{self.path / 'output.txt'} cannot be written ({error.strerror})", stacklevel=2)
        if told:
            found: dict[str, Any] = json.loads(told)
            return found
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = "\n".join(printed.decode(errors="replace").splitlines()[-20:])
        kind = "memory" if code == -signal.SIGKILL else "stopped" if -code in STOP else "unexpected"
        return {"kind": kind, "message": f"{self.path} was {how}\n{tail}".strip(), "memory": 0, "total": 0}

    def read(self, log: str) -> list[dict[str, Any]]:
        """The lines that were added to one of the run's logs since the last call."""
        return self.logs.setdefault(log, Tail(self.path / log)).read()


class Tail:
    """Reads a growing file of JSON lines bit by bit; one that was cut is read anew."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet; the file need not be there."""
        self.path = path
        self.offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The whole lines that are new."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.offset:
                self.offset = 0
            file.seek(self.offset)
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        self.offset += sum(map(len, whole))
        return [json.loads(line) for line in whole]


class Signals:
    """How many signals to stop have come."""

    def __init__(self) -> None:
        """None yet."""
        self.count = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Count SIGTERM, SIGUSR1 and Ctrl-C; only the main thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self.count += 1

        before = {n: signal.signal(n, note) for n in STOP}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Pool:
    """Starts what waits where there is room, and sees to what ends."""

    def __init__(
        self,
        waiting: deque[Resolved],
        room: dict[Device, int],
        progress: Progress,
        overall: TaskID,
        *,
        keep_going: bool,
    ) -> None:
        """``room``: how many runs each device takes at once."""
        self.waiting, self.room, self.keep_going = waiting, room, keep_going
        self.progress, self.overall = progress, overall
        self.running: list[Worker] = []
        self.failures: dict[Path, Exception] = {}

    def run(self) -> dict[Path, Exception]:
        """Go through all jobs; what failed, by folder."""
        signals, passed_on, shown = Signals(), 0, 0.0
        with signals.caught():
            try:
                while self.waiting or self.running:
                    if signals.count > passed_on:  # the first: stop with a checkpoint; the second: at once
                        passed_on = signals.count
                        self.waiting.clear()
                        for worker in self.running:
                            worker.stop()
                    if self.failures and not self.keep_going:
                        self.waiting.clear()
                    while self.waiting and (free := self._free()):
                        self._start(free[0])
                    time.sleep(0.1)
                    for worker in [worker for worker in self.running if worker.process.poll() is not None]:
                        self.running.remove(worker)
                        self._end(worker, stopping=passed_on > 0)
                    if not self.progress.disable and time.monotonic() - shown > 0.5:
                        shown = time.monotonic()
                        for worker in self.running:
                            self._watch(worker)
            finally:
                for worker in self.running:
                    worker.stop()
                for worker in self.running:
                    worker.process.wait()
                    worker.result()
        if passed_on:
            raise Preempted("stopped, each run with a checkpoint; the same command goes on")
        return self.failures

    def _load(self, device: Device) -> int:
        return sum(worker.device == device for worker in self.running)

    def _free(self) -> list[Device]:
        """The devices with room, the emptiest first."""
        return sorted((d for d in self.room if self._load(d) < self.room[d]), key=self._load)

    def _start(self, device: Device) -> None:
        job = self.waiting.popleft()
        self.running.append(Worker.start(job, device, beside_others=self._load(device) > 0))

    def _end(self, worker: Worker, *, stopping: bool) -> None:
        if worker.task is not None:
            self.progress.remove_task(worker.task)
        result = worker.result()
        if worker.process.returncode == 0:
            self.progress.advance(self.overall)
            self._print_end(worker.path)
        elif result["kind"] == "stopped" and stopping:
            return
        elif result["kind"] == "memory" and self._load(worker.device):
            self.room[worker.device] = self._load(worker.device)
            self.waiting.appendleft(worker.job)
            self._say(
                f"[yellow]{worker.path.name}: {_first_line(RunFailed(result['message']))}. It is put back, and "
                f"{'the CPU' if worker.device is None else f'GPU {worker.device}'} takes {self.room[worker.device]} "
                "run(s) at a time from now on[/]"
            )
        else:
            kinds = {kind.__name__: kind for kind in EXPLAINED} | {"stopped": Preempted}
            self.failures[worker.path] = kinds.get(result["kind"], RunFailed)(result["message"])
            self._say(f"[red]{worker.path.name} failed:[/] {escape(result['message'])}")

    def _say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)

    def _watch(self, worker: Worker) -> None:
        """Show how far a run has come, as its logs tell."""
        steps = worker.read("timings.jsonl")
        if not steps:
            return
        if worker.task is None:
            method = config.build_method(worker.job.run.method)
            epochs = sum(phase.epochs or worker.job.run.epochs for phase in method.phases)
            worker.task = self.progress.add_task(f"  {worker.path.name}", total=epochs, info="")
            worker.metric = tasks.load(read_json(worker.path / "environment.json")["task"]).primary
        self.progress.update(worker.task, completed=steps[-1]["epoch"])
        for line in worker.read("metrics.jsonl"):
            if worker.metric is not None and (line["split"], line["name"]) == ("test", worker.metric.key):
                self.progress.update(worker.task, info=worker.metric.describe(line["value"]))

    def _print_end(self, path: Path) -> None:
        model = read_run(path).model
        if model is None:
            raise RuntimeError(f"{path} ended without a model.json")
        metric = tasks.load(model["task"]).primary
        self._say(
            f"{escape(path.name)}: last {metric.describe(model['last'][metric.key])}, "
            f"best {metric.text(model['best'][metric.key])}, {model['seconds']:.0f} s"
        )


def _display(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[info]}")
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)


# ---- the side of the run -------------------------------------------------------------------------------------------


def work() -> None:
    """Train the job in the first line of standard input, in this process of its own; report on standard output."""
    line, _, rest = _read_line(0)
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed goes to the run's output.txt
    _obey(len(rest.splitlines()))
    task = json.loads(line)
    error: dict[str, Any] = {}
    code = 0
    try:
        _train(Resolved(config.validate(task["run"]), tuple(task["sources"])), beside_others=task["beside_others"])
    except Preempted as stopped:
        code, error = 75, {"kind": "stopped", "message": str(stopped)}
    except (torch.OutOfMemoryError, MemoryError, _NoRoom) as full:
        code, error = 1, {"kind": "memory", "message": f"out of memory ({_first_line(full)})"}
    except EXPLAINED as explained:
        kind = next(kind for kind in EXPLAINED if isinstance(explained, kind))
        code, error = 1, {"kind": kind.__name__, "message": str(explained)[:LONGEST_MESSAGE]}
    except Exception as unexpected:
        traceback.print_exc()
        text = f"{type(unexpected).__name__}: {_first_line(unexpected)}\n{traceback.format_exc()[-LONGEST_MESSAGE:]}"
        code, error = 1, {"kind": "unexpected", "message": text}
    on_gpu = code in (0, 75) and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    free, total = torch.cuda.mem_get_info() if on_gpu else (0, 0)
    with report:
        json.dump(error | {"memory": total - free, "total": total}, report)
    sys.exit(code)


class _NoRoom(Exception):
    """The device is full before the run has begun."""


def _train(job: Resolved, *, beside_others: bool) -> None:
    from vrm.runs.api import resume, start

    if beside_others and torch.cuda.is_available() and job.run.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        if free < HEADROOM * total:
            raise _NoRoom(f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free")
    torch.set_num_threads(1)
    console = Console(file=sys.stderr, width=120)
    if (job.run.run / "config.yaml").is_file():
        resume(job.run.run, console=console)
    else:
        start(job, console=console)


def _read_line(descriptor: int) -> tuple[bytes, bytes, bytes]:
    """The first line, a line break, and what came with it."""
    content = b""
    while b"\n" not in content:
        if not (more := os.read(descriptor, 1 << 16)):
            sys.exit(75)  # the pool is gone already
        content += more
    return content.partition(b"\n")


def _obey(asked: int) -> None:
    """Stop when the pool asks for it on standard input, or is no more; ``asked`` times it did already.

    The run itself knows signals alone: this sends them. One that came from elsewhere counts as what the pool asks for,
    so that a scheduler that signals every process of a job, and the pool that passes it on, make one stop of it.
    """
    own, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def listen(asked: int) -> None:
        came, sent, watched = 0, 0, [0, own]
        while True:
            if asked > max(came, sent):
                sent += 1
                os.kill(os.getpid(), signal.SIGTERM)  # before the run has begun, this ends the process
                continue
            ready, _, _ = select.select(watched, [], [])
            if own in ready:
                came += sum(number in STOP for number in os.read(own, 1 << 10))
            if 0 in ready:
                told = os.read(0, 1 << 10)
                asked += told.count(b"\n")
                if not told:
                    asked, watched = max(asked, 1), [own]

    threading.Thread(target=listen, args=(asked,), daemon=True).start()
