"""What a run shows while it works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FIRST_LINE, NEXT_LINE = 1.0, 10.0
"""Seconds after which a piece of work is told without a terminal, and those between its further lines."""


class Display:
    """The progress of one long piece of work, and what is said beside it. Nothing of it is kept."""

    def __init__(
        self,
        console: Console,
        *,
        title: str,
        total: int,
        done: int = 0,
        unit: str = "images",
        announce: bool = False,
        quiet: bool = False,
    ) -> None:
        """Show ``done`` of ``total`` in ``unit``; ``announce`` the work also without a terminal when it begins."""
        self.console = console
        self.title, self.total, self.done, self.unit, self.announce = title, total, done, unit, announce
        self.quiet = quiet
        self.live = console.is_terminal and not quiet
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task = self.progress.add_task(title, total=total, completed=done, info="")
        self.text = ""
        self.due = time.monotonic() + FIRST_LINE

    def __enter__(self) -> Display:
        """Start the bar."""
        self.progress.start()
        if self.announce and not self.live:
            self.note(self.title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar."""
        self.progress.stop()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.quiet:
            self.progress.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning above the bar."""
        if not self.quiet:
            self.progress.console.print(text, highlight=False, soft_wrap=True, markup=False, style="yellow")

    def step(self, count: int = 1) -> None:
        """Count that many more as done; without a terminal print where the work stands, if a line is due."""
        self.done += count
        self.progress.advance(self.task, count)
        beside = f"  {self.text}" if self.text else ""
        self._tell(f"{self.title}: {self.done:,} of {self.total:,} {self.unit}{beside}")

    def reach(self, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` is done, whatever was said before; without a terminal as a percentage."""
        self.progress.update(self.task, completed=done, total=total)
        self._tell(f"{self.title}: {done / max(total, 1):.0%}")

    def info(self, text: str, *, line: bool) -> None:
        """Show ``text`` beside the bar; without a terminal print it if ``line`` is set or a line is due."""
        self.text = text
        self.progress.update(self.task, info=text)
        self._tell(text, due=line)

    def _tell(self, text: str, *, due: bool = False) -> None:
        """Print a line where there is no terminal, if one is ``due``."""
        if not self.live and (due or time.monotonic() >= self.due):
            self.note(text)
            self.due = time.monotonic() + NEXT_LINE

    def count(self, title: str, total: int) -> Callable[[int], None]:
        """Begin a part of the work; return what counts its ``total`` images and shows how far it is."""
        done = 0
        self.due = min(self.due, time.monotonic() + FIRST_LINE)

        def step(images: int) -> None:
            nonlocal done
            done += images
            text = f"{title}: {done:,} of {total:,} images"
            self.progress.update(self.task, info=text)
            self._tell(text)

        return step
