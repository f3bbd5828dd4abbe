"""What several verbs print in the same way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from vrm.wording import counted, seconds_in_words


def console() -> Console:
    """Return a console on standard output. Of several processes of one run only the first prints."""
    return Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False)


def show_result(model: Mapping[str, Any]) -> None:
    """Print the scores and the cost of a finished run, and what a whole run would take if it was stopped early."""
    from vrm import tasks

    task = tasks.load(model["task"])
    last, best, extra = model["last"], model["best"], model["extra_epochs"]
    passes = f"{model['student_views']} × {model['epochs']:.3g} student passes of each image"
    if model["epochs"] % 1:
        views = counted(model["student_views"], "student pass", "student passes")
        passes = f"{counted(model['steps'], 'step')} with {views} of each of their images"
    passes += f" ({extra} of the epochs are extra ones of the method's phases)" if extra else ""
    out = console()
    out.out(
        f"{model['architecture']}: last {task.describe(last)} (epoch {last['epoch']}); "
        f"best {task.primary.describe(best[task.primary.key])} (epoch {best['epoch']}); "
        f"{passes}; {seconds_in_words(model['seconds'])} on {model['device']}"
    )
    if model["steps"] < model["all_steps"]:
        out.out(
            f"stopped after {model['steps']:,} of {counted(model['all_steps'], 'step')}, as asked; at this speed "
            f"({model['images_per_second']:,.0f} images/s) the whole run takes "
            f"{seconds_in_words(model['full_run_seconds'])}"
        )
