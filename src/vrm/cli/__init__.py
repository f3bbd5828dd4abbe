"""The command line: one small file a verb. Heavy imports stay inside the verbs, so that ``--help`` answers at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, NoReturn

import typer

Words = Annotated[list[str] | None, typer.Argument(help="Settings, as key=value.", metavar="[KEY=VALUE]...")]
Recipe = Annotated[str, typer.Argument(help="A shipped recipe (digits, cifar100, ..) or a path to a YAML file.")]


def build() -> typer.Typer:
    """The command line with all its verbs."""
    from vrm.cli import bench, data, demo, distill, doctor, evaluate, methods, models, resume, sweep, train

    app = typer.Typer(
        name="vrm",
        help="Knowledge distillation for PyTorch. Settings are key=value words in any order, e.g. method=vrm seed=3.",
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
        build()()
    except SystemExit as ended:
        _end(ended.code)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:  # a fault of the program: its traceback is wanted
            raise
        typer.echo(f"vrm: {error}", err=True)
        _end(code)


def _end(code: str | int | None) -> NoReturn:
    """Exit; at once, if other processes were met."""
    if (distribution := sys.modules.get("vrm.engine.distribution")) is not None and distribution.joined():
        distribution.leave(code)
    sys.exit(code)


class _Stopped(SystemExit):
    """A signal came while nothing was being trained."""


@contextmanager
def resumable() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C end a verb that trains with exit code 75, also while it starts and after training.

    What is on the disk is whole at any instant. While it trains, the handlers of the loop, or of the pool, take their
    place, which let the step end. Behind the verb signals are ignored: a process on its way out keeps its code.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Stopped(75)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    except _Stopped:
        typer.echo("vrm: stopped outside of a step; `vrm resume RUN`, or the same command, goes on", err=True)
        raise
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # Python gives its own handlers up before the last modules are gone
