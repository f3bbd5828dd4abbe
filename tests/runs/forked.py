"""Command lines in processes of their own that start at once: forked from one that has imported everything.

They are there to be killed. A :class:`Pause` makes one stop and wait at a place in the code, so that a signal meets it
just there.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("pytest", "sklearn.datasets", "torch._inductor"),  # torch imports the last late, and it takes a second
        *("vrm.cli.distill", "vrm.cli.resume", "vrm.methods.vrm", "vrm.runs.api"),
    ]
)


@dataclass(frozen=True)
class Pause:
    """Wait before (or ``after``) a call of a function: the ``number``-th that has an argument ending in ``argument``.

    ``seconds`` is for how long, unless it is killed before.

    ``place`` is ``module:function`` or ``module:Class.method``, as the code under test looks it up.
    """

    place: str
    number: int = 1
    argument: str = ""
    after: bool = False
    seconds: float = 60.0

    def install(self, here: Path) -> None:
        """In the process that shall wait; it makes the file ``here`` when it does."""
        module, _, path = self.place.partition(":")
        *owners, name = path.split(".")
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        function = getattr(owner, name)
        left = self.number

        def paused(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= any(str(argument).endswith(self.argument) for argument in arguments)
            now, left = left == 0, left or -1
            if now and not self.after:
                self._wait(here)
            result = function(*arguments, **options)
            if now and self.after:
                self._wait(here)
            return result

        setattr(owner, name, paused)

    def _wait(self, here: Path) -> None:
        here.touch()
        time.sleep(self.seconds)


def _run(words: tuple[str, ...], output: Path, threads: int, pause: Pause | None) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from vrm.cli import main

    torch.set_num_threads(threads)
    if pause is not None:
        pause.install(output.with_suffix(".here"))
    sys.argv = ["vrm", *words]
    main()


class Forked:
    """``vrm WORDS`` in a process; what it prints goes to a file beside the run."""

    def __init__(self, *words: str, output: Path, threads: int = 1, pause: Pause | None = None) -> None:
        """Start it."""
        output.unlink(missing_ok=True)
        self.output, self.here = output, output.with_suffix(".here")
        self.here.unlink(missing_ok=True)
        arguments = (words, output, threads, pause)
        self.process: ForkServerProcess = CONTEXT.Process(target=_run, args=arguments, daemon=True)
        self.process.start()

    def wait_for_pause(self) -> None:
        """Until it waits where it was told to."""
        deadline = time.monotonic() + 120
        while not self.here.exists():
            assert self.process.is_alive(), f"it ended before its pause:\n{self.text}"
            assert time.monotonic() < deadline, f"it never came to its pause:\n{self.text}"
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        """A signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float | None = 120) -> int | None:
        """The exit code once it has ended (the negative number of the signal that ended it); ``None`` if it has not."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self) -> bool:
        """``kill -9``; whether it was still there to be killed."""
        if self.process.is_alive():
            self.send(signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    @property
    def text(self) -> str:
        """What it printed."""
        return self.output.read_text() if self.output.exists() else ""
