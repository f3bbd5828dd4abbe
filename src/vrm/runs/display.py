"""What a run shows while it trains: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """The progress of one long piece of work, and what is said beside it. Nothing of it is kept."""

    def __init__(self, console: Console, *, title: str, total: int, done: int, quiet: bool = False) -> None:
        """``total`` and ``done`` count steps, or images."""
        self.console = console
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
        self.last_line = time.monotonic()

    def __enter__(self) -> Display:
        """Start the bar."""
        self.progress.start()
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
        """Count that many more steps as done."""
        self.progress.advance(self.task, count)

    def info(self, text: str, *, line: bool) -> None:
        """Show ``text`` beside the bar; without a terminal print it if ``line`` is set or ten seconds have passed."""
        if self.live:
            self.progress.update(self.task, info=text)
        elif not self.quiet and (line or time.monotonic() - self.last_line > 10):
            self.console.print(text, highlight=False, soft_wrap=True)
            self.last_line = time.monotonic()
