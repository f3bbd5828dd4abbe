"""``vrm models``."""

from __future__ import annotations

from typing import Annotated

import typer

from vrm.wording import counted, shape_in_words


def register(app: typer.Typer) -> None:
    @app.command()
    def models(
        name: Annotated[
            str | None, typer.Argument(help="A network, to show its taps; timm:NAME and torchvision:NAME work too.")
        ] = None,
        size: Annotated[int, typer.Option(help="Height and width of the input in pixels.")] = 32,
        classes: Annotated[int, typer.Option(help="Number of classes.")] = 100,
    ) -> None:
        """List the networks with parameters, FLOPs and feature shapes, or show one with all its taps."""
        from rich.box import SIMPLE
        from rich.table import Table

        from vrm.cli._show import console
        from vrm.config import ConfigError
        from vrm.models import Description, describe, names

        def described(each: str) -> Description:
            try:
                return describe(each, num_classes=classes, input_size=(size, size))
            except (ValueError, ModuleNotFoundError) as error:
                raise ConfigError(str(error)) from None

        on = f"on {size}x{size} images, {counted(classes, 'class', 'classes')}"
        out = console()
        if name is not None:
            found = described(name)
            table = Table("tap", "shape", box=SIMPLE, pad_edge=False)
            for tap, shape in found.taps.items():
                table.add_row(tap, _shape(shape))
            cost = f"{found.parameters:,} parameters, {found.flops / 1e6:,.1f} MFLOPs an image"
            out.print(f"{name} {on}: {cost}", table)
            return
        table = Table("network", box=SIMPLE, pad_edge=False)
        table.add_column("parameters", justify="right")
        table.add_column("MFLOPs", justify="right")
        table.add_column("stem, stages and pooled features")
        for found in map(described, names()):
            features = [_shape(s) for tap, s in found.taps.items() if ":" not in tap and tap != "logits"]
            table.add_row(found.name, f"{found.parameters:,}", f"{found.flops / 1e6:,.1f}", " ".join(features))
        out.print(table)
        out.print(f"Shapes are channels@height, {on}. vrm models NAME shows all taps of a network.")


def _shape(shape: tuple[int, ...]) -> str:
    """Return ``16@32`` for a map of 16 channels and 32x32 pixels, ``64`` for a vector, ``50x192`` for 50 tokens."""
    if len(shape) == 3:
        channels, height, width = shape
        return f"{channels}@{height}" if height == width else f"{channels}@{height}x{width}"
    return shape_in_words(shape)
