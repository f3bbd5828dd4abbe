"""``vrm eval``."""

from __future__ import annotations

import typer

from vrm.cli import Recipe, Words


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("eval")
    def evaluate(recipe: Recipe, words: Words = None) -> None:
        """Measure a network on a test split: vrm eval cifar100 model=resnet56 model.weights=FILE data.root=PATH."""
        from vrm import tasks
        from vrm.cli._show import console
        from vrm.runs.api import measure

        out = console()
        card, found, count = measure(recipe, words or [], console=out)
        out.print(
            f"{card.architecture} on the {count:,} test images of {card.data}: {tasks.load(card.task).describe(found)}",
            highlight=False,
            soft_wrap=True,
        )
