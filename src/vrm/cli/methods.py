"""``vrm methods``."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def methods(name: Annotated[str | None, typer.Argument(help="One method, to read its page.")] = None) -> None:
        """List the distillation methods, or show the page of one: formula, options, published settings."""
        from rich.box import SIMPLE
        from rich.markdown import Markdown
        from rich.table import Table

        from vrm.bench.method_cost import BATCH, STUDENT, TEACHER, cost
        from vrm.cli._show import console
        from vrm.config import ConfigError
        from vrm.methods import load, names
        from vrm.methods._page import needs_in_words, page

        if name is not None:
            try:
                text = page(name)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            console().print(Markdown(text))
            return
        table = Table(
            "method", "title", "venue", "family", "needs", f"cost ({TEACHER} to {STUDENT}, batch {BATCH})", box=SIMPLE
        )
        for each in names():
            method = load(each)
            table.add_row(
                each,
                method.title,
                f"{method.venue} {method.year}",
                method.family,
                needs_in_words(method()),
                str(cost(method())),
            )
        console().print(table)
