"""The command that repeats a run, made of its resolved settings."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml

from vrm import config
from vrm.training.run_folder import Record


def command(record: Record) -> str | None:
    """``vrm distill ...`` (or ``vrm train ...``) with the fewest words that give this run's settings.

    ``None`` for a run that was started from Python, on modules that no command line can name.
    """
    settings = record.config
    recipe = str(settings["recipe"])
    if recipe == "python":
        return None
    verb: Literal["train", "distill"] = "train" if settings["teacher"] is None else "distill"
    words = list(_words({key: value for key, value in settings.items() if key != "recipe"}))
    if verb == "train":
        words = ["model" + word.removeprefix("student") if word.startswith("student") else word for word in words]
    if _resolves(verb, recipe, words, settings):  # else the recipe is gone or changed: every setting stays written out
        for word in reversed(words):
            fewer = [other for other in words if other != word]
            if not word.startswith("run=") and _resolves(verb, recipe, fewer, settings):
                words = fewer
    return " ".join(["vrm", verb, shlex.quote(recipe), *map(shlex.quote, words)])


def _words(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """``key=value`` words of a section, its ``name`` first; what is not set is left out."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _words(value, f"{prefix}{key}.")
        elif key == "name":
            yield f"{prefix.removesuffix('.')}={value}"
        elif value is not None:
            text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=2**16)
            yield f"{prefix}{key}=" + text.removesuffix("...\n").strip()


def _resolves(verb: Literal["train", "distill"], recipe: str, words: list[str], settings: Mapping[str, Any]) -> bool:
    """Whether the words give exactly these settings."""
    try:
        return config.resolve(verb, recipe, words).run.model_dump(mode="json") == settings
    except config.ConfigError:
        return False
