"""``vrm data``."""

from __future__ import annotations

import typer

from vrm.cli import Recipe, Words


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def data(recipe: Recipe, words: Words = None) -> None:
        """Read a recipe's data and say what was found: vrm data cifar100 data.root=PATH."""
        from rich.table import Table

        from vrm.cli._show import console
        from vrm.config import resolve_evaluation
        from vrm.training.assembly import load_data

        out = console()
        found = load_data(resolve_evaluation(recipe, words or []).data, out)
        table = Table("split", "images", "classes", "pixels", "images a class", title=found.name, title_justify="left")
        for split, store in (("train", found.train), ("test", found.test)):
            counts = store.targets.bincount(minlength=store.num_classes)
            height, width = store.image_size
            spread = f"{int(counts.min())} to {int(counts.max())}"
            table.add_row(split, f"{len(store):,}", str(store.num_classes), f"{height}x{width}", spread)
        out.print(table)
        out.print(f"views: {found.view_policy}; mean {found.mean}; std {found.std}", highlight=False, soft_wrap=True)
