"""``vrm data``: read a data set and describe it; make a pack of it, or check one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vrm.cli import Words

if TYPE_CHECKING:
    from rich.console import Console

    from vrm.config import Data
    from vrm.data import DataSet

Recipe = Annotated[
    str, typer.Argument(help="A shipped recipe, a path to a YAML file, or a data set (folder, packed, ..).")
]


def register(app: typer.Typer) -> None:
    @app.command()
    def data(recipe: Recipe, words: Words = None) -> None:
        """Read a data set and describe it: vrm data cifar100 data.root=PATH. A pack is checked completely.

        pack=FOLDER decodes it once, into a pack that data.root=FOLDER then reads: vrm data folder data.root=PATH
        data.size=256 pack=FOLDER.
        """
        from vrm.cli._show import console
        from vrm.data.formats.pack import is_pack
        from vrm.runs.assembly import load_data

        out = console()
        folder, settings = _settings(recipe, words or [])
        if folder is not None:
            _pack(settings, folder, out)
            settings = settings.model_copy(update={"root": folder, "size": None, "labels_per_class": None})
        elif settings.root is not None and is_pack(settings.root):
            _verify(settings.root, out)
        _show(load_data(settings, out), out)


def _settings(recipe: str, words: Sequence[str]) -> tuple[Path | None, Data]:
    """Return the folder of the pack to make, if any, and the data's settings."""
    from vrm import config
    from vrm.config.words import split_words
    from vrm.data import SOURCES
    from vrm.files import user_path
    from vrm.wording import nearest

    own, others = split_words(words, ["pack"])
    packs = [word.partition("=")[2] for word in own]
    if len(packs) > 1 or not all(packs):
        raise config.ConfigError(f"pack={packs[-1]}: give pack=FOLDER once, the folder that the pack is made in")
    folder = user_path(packs[0]) if packs else None
    if recipe in SOURCES and recipe not in config.recipes():
        named = config.merge({"data": {"name": recipe}}, config.parse_words(others))
        return folder, config.checked(config.Evaluation, named).data
    known = (*config.recipes(), *SOURCES)
    if recipe not in known and not recipe.endswith((".yaml", ".yml")):
        raise config.ConfigError(
            f"unknown recipe or data set {recipe!r}; {nearest(recipe, known)}. A pack is made of any by "
            "pack=FOLDER: vrm data folder data.root=PATH data.size=256 pack=FOLDER"
        )
    return folder, config.resolve_evaluation(recipe, others).data


def _pack(settings: Data, folder: Path, out: Console) -> None:
    """Make a pack, or complete the one there, with a progress bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vrm.config import ConfigError
    from vrm.data.datasets.load import find
    from vrm.data.stores.pack import write_pack
    from vrm.data.stores.stream import are_image_files
    from vrm.runs.assembly import load_data
    from vrm.wording import counted

    try:
        found = find(settings.name, root=settings.root, download=settings.download)
        # Image files are decoded while the pack is written: they need not fit into memory.
        where = {"placement": "stream" if are_image_files(found) else "device"}
        dataset = load_data(settings.model_copy(update=where), out)
        columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
            task = bar.add_task("", total=None)
            made = write_pack(
                dataset, folder, progress=lambda done, total: bar.update(task, completed=done, total=total)
            )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"pack={folder}: {error}") from None
    out.print(f"{counted(made, 'shard')} made" if made else "the pack is complete already")


def _verify(folder: Path, out: Console) -> None:
    """Check all of a pack, with a progress bar."""
    from rich.progress import Progress

    from vrm.config import ConfigError
    from vrm.data.formats.pack import verify
    from vrm.wording import counted

    with Progress(console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("checking shards", total=None)
        try:
            count = verify(folder, progress=lambda done, total: bar.update(task, completed=done, total=total))
        except ValueError as error:
            raise ConfigError(f"data.root={folder}: {error}") from None
    out.print(f"all {counted(count, 'shard')} are undamaged")


def _show(found: DataSet, out: Console) -> None:
    """Print images, classes and sizes of both splits, then views and channel statistics."""
    from rich.table import Table

    from vrm.data import describe_spread

    table = Table("split", "images", "classes", "pixels", "images a class", title=found.name, title_justify="left")
    for split, store in (("train", found.train), ("test", found.test)):
        height, width = store.image_size
        table.add_row(split, f"{len(store):,}", str(store.num_classes), f"{height}x{width}", describe_spread(store))
    out.print(table)
    if found.origin:
        out.out(found.origin)
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in (found.mean, found.std))
    out.out(f"views: {found.view_policy}; mean ({mean}); std ({std})")
