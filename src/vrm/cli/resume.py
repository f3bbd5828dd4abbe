"""``vrm resume``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vrm.cli import Words, resumable


def register(app: typer.Typer) -> None:
    @app.command()
    @resumable()
    def resume(run: Annotated[Path, typer.Argument(help="The folder of a run.")], words: Words = None) -> None:
        """Go on with a run that was interrupted, from its newest whole checkpoint.

        Settings that may change can be given anew, for example: vrm resume runs/student log_every=100
        """
        from vrm.cli._show import console, show_result
        from vrm.runs.api import resume as go_on

        show_result(go_on(run, words or [], console=console()))
