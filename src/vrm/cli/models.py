"""``vrm models``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command()
    def models(
        name: Annotated[str | None, typer.Argument(help="One network, also timm:NAME or torchvision:NAME.")] = None,
        size: Annotated[int, typer.Option(help="Input height and width in pixels.")] = 32,
        classes: Annotated[int, typer.Option(help="Number of classes.")] = 100,
    ) -> None:
        """List the networks with parameters, FLOPs and taps, or describe one."""
        from rich.table import Table

        from vrm.cli._show import console
        from vrm.config import ConfigError
        from vrm.models import describe, names

        table = Table(
            "network", "parameters", "MFLOPs", "taps (channels@height)", title=f"{size}x{size}, {classes} classes"
        )
        for each in [name] if name is not None else names():
            try:
                found = describe(each, num_classes=classes, input_size=(size, size))
            except (ValueError, ModuleNotFoundError) as error:
                raise ConfigError(str(error)) from None
            table.add_row(each, f"{found.parameters:,}", f"{found.flops / 1e6:,.1f}", _taps(found.taps))
        console().print(table)


def _taps(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """``stage1 16@32, ..`` for maps; channels alone for vectors and tokens."""
    chosen = {name: shape for name, shape in shapes.items() if ":" not in name and name != "logits"}
    return ", ".join(f"{n} {s[0]}@{s[1]}" if len(s) == 3 else f"{n} {s[-1]}" for n, s in chosen.items())
