"""The command line, one small file for each verb. Heavy imports stay inside the verbs: ``--help`` answers at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from vrm.runs.signals import STOP_SIGNALS

Words = Annotated[list[str] | None, typer.Argument(help="Settings, in any order.", metavar="KEY=VALUE")]
Recipe = Annotated[str, typer.Argument(help="The name of a shipped recipe (digits, cifar100, ..) or a YAML file.")]

HELP = """Knowledge distillation for PyTorch: train a small network (the student) with a large one (the teacher).

Settings are key=value words in any order, for example method=vrm seed=3. `vrm VERB --help` says more about a verb.
"""


class _Verbs(typer.core.TyperGroup):
    """Lists the verbs with the whole first sentence of their help, where click would cut it to fit a line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.get_short_help_str(limit=500)) for name, verb in self.commands.items()])


def build() -> typer.Typer:
    """Return the command line with all its verbs."""
    from vrm.cli import bench, data, demo, distill, doctor, evaluate, methods, models, resume, sweep, train

    app = typer.Typer(
        name="vrm",
        cls=_Verbs,
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for verb in (demo, train, distill, resume, sweep, bench, evaluate, methods, models, data, doctor):
        verb.register(app)
    return app


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal and resumable."""
    try:
        build()(prog_name="vrm")
    except SystemExit as ended:
        _end(ended.code)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:  # a fault of the program: show its traceback
            raise
        typer.echo(f"vrm: {error}", err=True)
        _end(code)


def _end(code: str | int | None) -> NoReturn:
    """Exit.

    A process that has met others leaves at once: their threads could outlive the interpreter. So does one that was told
    to stop: to take down all that it holds may last seconds.
    """
    distribution = sys.modules.get("vrm.engine.distribution")
    if distribution is not None and (code == _Stopped.exit_code or distribution.joined()):
        distribution.leave(code)
    sys.exit(code)


class _Stopped(SystemExit):
    """A signal to stop came while nothing was being trained."""

    exit_code = 75


STOPPED = "vrm: stopped before or after training; `vrm resume RUN`, or the same command, goes on"


GRACE = 3.0
"""Seconds after a signal to stop in which a verb ends in order; it is ended then, unless a run trains."""


@contextmanager
def _ended_if_busy(handler: Callable[[int, FrameType | None], NoReturn]) -> Iterator[None]:
    """End this process with exit code 75 if ``handler``, in force when a signal to stop comes, does not end it in time.

    Python calls a handler between two of its own instructions: a long operation of PyTorch delays it.
    """
    came, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)  # Python writes the number of each signal there
    ended = threading.Event()

    def watch() -> None:
        while numbers := os.read(came, 1 << 10):
            obeyed = [number for number in numbers if number in STOP_SIGNALS and signal.getsignal(number) is handler]
            if obeyed and not ended.wait(GRACE):
                os.write(2, f"{STOPPED}\n".encode())
                os._exit(_Stopped.exit_code)
        os.close(came)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(wakeup)


@contextmanager
def resumable() -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and Ctrl-C end a verb that trains with exit code 75, also before and after training.

    The disk holds whole files at any instant. While a run trains, the handlers of its loop, or of the pool, take over
    and let the step end. After the verb signals are ignored: a process that is ending keeps its exit code.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Stopped(_Stopped.exit_code)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    try:
        with _ended_if_busy(stop):
            yield
    except _Stopped:
        typer.echo(STOPPED, err=True)
        raise
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # Python drops its own handlers before the last modules
