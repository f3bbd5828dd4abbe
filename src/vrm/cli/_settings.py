"""The help of the verbs that start a run: the most used settings, each with its meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.core


class DistillCommand(typer.core.TyperCommand):
    """Appends the most used settings to a verb's help. They are read from the schema only when the help is shown."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write an example of each setting that the schema marks as common, and its meaning."""
        with formatter.section("Settings most used, each with an example"):
            formatter.write_dl(list(self.rows()))
        formatter.write_paragraph()
        formatter.write_text("docs/settings.md explains all settings, `vrm methods NAME` the options of a method.")

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield an example of each setting and the first sentence of its meaning."""
        from vrm.config import settings

        for setting in settings():
            if setting.role.common:
                yield setting.example, setting.meaning.replace("``", "").partition(". ")[0].removesuffix(".") + "."


class TrainCommand(DistillCommand):
    """The same for ``vrm train``, which calls its network ``model`` and learns from labels."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the rows without those of teacher and method."""
        for example, meaning in super().rows():
            if not example.startswith(("teacher", "method")):
                yield example.replace("student", "model", 1), meaning
