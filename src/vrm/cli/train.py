"""``vrm train``."""

from __future__ import annotations

import typer

from vrm.cli import Recipe, Words, resumable
from vrm.cli._settings import TrainCommand


def register(app: typer.Typer) -> None:
    @app.command(cls=TrainCommand)
    @resumable()
    def train(recipe: Recipe, words: Words = None) -> None:
        """Train one network on labels, for example a teacher.

        For example: vrm train digits model=resnet56 run=runs/teacher
        """
        from vrm.cli._show import console, show_result
        from vrm.config import resolve
        from vrm.runs.api import start

        show_result(start(resolve("train", recipe, words or []), console=console()))
