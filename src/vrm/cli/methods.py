"""``vrm methods``."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def methods(
        name: Annotated[str | None, typer.Argument(help="A method, to show its page.")] = None,
    ) -> None:
        """List the distillation methods, or show one with its formula, options, published settings and cost."""
        from rich.box import SIMPLE
        from rich.markdown import Markdown
        from rich.table import Table

        from vrm.bench.method_cost import BATCH, STUDENT, TEACHER, measure_cost
        from vrm.cli._show import console
        from vrm.config import ConfigError
        from vrm.methods import load, names
        from vrm.methods._page import needs_in_words, page, venue_in_words

        if name is not None:
            try:
                text = page(name)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            try:
                price = f"On {TEACHER} to {STUDENT} with batches of {BATCH}: {measure_cost(load(name)())}."
            except ValueError as error:
                price = f"Not measured: it does not work on {TEACHER} to {STUDENT} ({error})."
            console().print(Markdown(f"{text}\n## Cost\n\n{price}\n"))
            return
        table = Table("method", "venue", "family", "needs", box=SIMPLE, pad_edge=False)
        for each in names():
            method = load(each)
            table.add_row(each, venue_in_words(method), method.family, needs_in_words(method()))
        console().print(table)
        console().print("vrm methods NAME shows the page of a method: title, formula, options, cost.")
