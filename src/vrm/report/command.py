"""The command that repeats a run, derived from its settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from typing import Any, Literal

from vrm import config
from vrm.config.words import in_words
from vrm.runs.folder import Record


def command(record: Record) -> str | None:
    """Return the ``vrm distill ...`` or ``vrm train ...`` that gives this run's settings.

    Settings that follow from the recipe are left out, unless the recipe is gone or has changed. Return ``None`` for a
    run that was started from Python, with modules that no command line can name.
    """
    settings = record.config
    recipe = str(settings["recipe"])
    if recipe == "python":
        return None
    verb: Literal["train", "distill"] = "train" if settings["teacher"] is None else "distill"
    unused = {key.removesuffix(".name") for key in _without_effect(settings)}
    words = {key: text for key, text in _words(settings).items() if key not in unused}
    if verb == "train":
        words = {re.sub(r"^student\b", "model", key): text for key, text in words.items()}
    names = ("run", "model") if verb == "train" else ("run", "student", "teacher", "method")
    known = {key: text for key, text in words.items() if key in names}
    short = known
    if (plain := _resolved(verb, recipe, known)) is not None:
        given = _words(plain)
        short = {key: text for key, text in words.items() if key in known or given.get(key) != text}
    if _resolved(verb, recipe, short) == settings:
        words = short
    return " ".join(["vrm", verb, shlex.quote(recipe), *(shlex.quote(f"{key}={text}") for key, text in words.items())])


def _words(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return keys and values as the command line takes them, without the recipe and what is not set."""
    values = {key: value for key, value in config.flat(settings).items() if key != "recipe" and value is not None}
    return {key.removesuffix(".name"): in_words(value) for key, value in values.items()}


def _without_effect(settings: Mapping[str, Any]) -> Collection[str]:
    """Return the keys that a command may not give, as they have no effect; none for settings of another version."""
    try:
        return config.without_effect(config.validate(settings), config.flat(settings))
    except config.ConfigError:
        return ()


def _resolved(verb: Literal["train", "distill"], recipe: str, words: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the settings that these words give, or ``None`` if they are refused."""
    try:
        return config.resolve(verb, recipe, [f"{key}={text}" for key, text in words.items()]).run.model_dump(
            mode="json"
        )
    except config.ConfigError:
        return None
