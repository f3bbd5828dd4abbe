"""The rows of a check, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vrm.runs.errors import RunError

Result = Literal["ok", "note", "fail"]

STYLES: Mapping[Result, str] = {"ok": "green", "note": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Check:
    """One row: what was checked, the result, what was found, and (if it failed) what to do."""

    name: str
    result: Result
    detail: str
    fix: str = ""

    @property
    def text(self) -> str:
        """Finding and fix."""
        return f"{self.detail}; {self.fix}" if self.fix else self.detail


@dataclass(frozen=True)
class CheckReport:
    """All rows. ``teacher`` is what was measured of the teacher, as ``teacher.json`` keeps it."""

    title: str
    checks: tuple[Check, ...]
    seconds: float
    teacher: dict[str, Any] | None = None

    @property
    def failures(self) -> tuple[Check, ...]:
        """The rows that failed."""
        return tuple(check for check in self.checks if check.result == "fail")

    def require(self) -> None:
        """Raise ``RunError`` with every failure, if there is one."""
        if self.failures:
            raise RunError("; ".join(check.text for check in self.failures))

    def show(self, console: Console) -> None:
        """Print a table on a terminal, a line for each check elsewhere."""
        title = f"{self.title}: checked in {self.seconds:.1f} s"
        if not console.is_terminal:
            for line in (title, *(f"  {c.name:<16}{c.result:<6}{c.text}" for c in self.checks)):
                console.print(line, highlight=False, soft_wrap=True, markup=False)
            return
        table = Table("check", "result", "found", box=SIMPLE, title=escape(title), title_justify="left")
        for check in self.checks:
            style = STYLES[check.result]
            fix = f"\n{check.fix}" if check.fix else ""
            table.add_row(check.name, f"[{style}]{check.result}[/]", f"{escape(check.detail)}[{style}]{escape(fix)}[/]")
        console.print(table, highlight=False)
