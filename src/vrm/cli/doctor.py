"""``vrm doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from vrm.cli import Words


def register(app: typer.Typer) -> None:
    @app.command()
    def doctor(
        target: Annotated[str, typer.Argument(help="A recipe, followed by the settings of a run, or a run's folder.")],
        words: Words = None,
    ) -> None:
        """Check a run before it starts, or examine the folder of a run.

        A check of a run takes its settings as train and distill do, and trains nothing. Neither changes any file.
        """
        from vrm.cli._show import console
        from vrm.config import ConfigError, recipes, resolve
        from vrm.files import user_path
        from vrm.runs.checks.folder import examine_run, examine_start

        out, given = console(), words or []
        recipe = target in recipes() or target.endswith((".yaml", ".yml"))
        folder = user_path(target)
        if not recipe and ("/" in target or folder.is_dir()):
            if given:
                raise ConfigError(f"{target} is the folder of a run and holds its settings; leave {given[0]!r} out")
            report = examine_run(folder, console=out)
        else:
            trains = any(word.startswith(("model=", "model.")) for word in given)
            report = examine_start(resolve("train" if trains else "distill", target, given).run, console=out)
        report.show(out)
        if report.failures:
            raise typer.Exit(1)
