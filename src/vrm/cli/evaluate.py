"""``vrm eval``."""

from __future__ import annotations

import typer

from vrm.cli import Recipe, Words
from vrm.wording import counted


def register(app: typer.Typer) -> None:
    @app.command("eval")
    def evaluate(recipe: Recipe, words: Words = None) -> None:
        """Measure a network on the test images of a data set.

        For example: vrm eval cifar100 model=resnet56 model.weights=FILE data.root=PATH
        """
        from vrm import tasks
        from vrm.cli._show import console
        from vrm.runs.api import evaluate_model

        out = console()
        card, scores, count = evaluate_model(recipe, words or [], console=out)
        text = tasks.load(card.task).describe(scores)
        on = f"on the {counted(count, 'test image')} of {card.data}"
        out.out(f"{card.architecture} {on}: {text}")
