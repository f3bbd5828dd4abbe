"""``vrm distill``."""

from __future__ import annotations

import typer

from vrm.cli import Recipe, Words, resumable
from vrm.cli._settings import DistillCommand


def register(app: typer.Typer) -> None:
    @app.command(cls=DistillCommand)
    @resumable()
    def distill(recipe: Recipe, words: Words = None) -> None:
        """Train a student with a teacher and a method.

        For example: vrm distill digits teacher=runs/teacher/ student=resnet8 method=vrm
        """
        from vrm.cli._show import console, show_result
        from vrm.config import resolve
        from vrm.runs.api import start

        show_result(start(resolve("distill", recipe, words or []), console=console()))
