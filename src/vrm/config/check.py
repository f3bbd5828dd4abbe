"""Settings against their schema, and what a user reads of the first that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vrm import methods
from vrm.config.roles import section_of
from vrm.config.schema import ConfigError, Run
from vrm.wording import closest

Model = TypeVar("Model", bound=BaseModel)


def checked(
    schema: type[Model],
    content: Mapping[str, Any],
    *,
    prefix: str = "",
    also: Iterable[str] = (),
    typed: Callable[[str], str] = str,
) -> Model:
    """Return ``content`` as ``schema`` has it. Raise ``ConfigError`` for the first setting that does not fit.

    Args:
        schema: What is allowed.
        content: Nested settings.
        prefix: The section that they belong to.
        also: Keys that are no settings of the schema but could be meant.
        typed: Turns a key of the schema into the one that the user types; into an empty text if no key is typed for it.
    """
    try:
        return schema(**content)
    except ValidationError as error:
        _refuse_unknown(error, schema, content, prefix=prefix, also=also, typed=typed)
        found = error.errors()[0]
    key, given = typed(_dotted(prefix, found)), found.get("input")
    if found["type"] == "missing":
        raise ConfigError(f"{key} is missing; give {key.removesuffix('.name')}=VALUE")
    if found["type"] == "value_error":
        raise ConfigError(str(found["ctx"]["error"]))
    raise ConfigError(f"{key}={given}: {found['msg'][0].lower()}{found['msg'][1:]}")


def refuse_unknown(
    schema: type[BaseModel],
    content: Mapping[str, Any],
    *,
    also: Iterable[str] = (),
    typed: Callable[[str], str] = str,
) -> None:
    """Raise ``ConfigError`` for the first key that ``schema`` does not have, whatever else is wrong or missing."""
    try:
        schema(**content)
    except ValidationError as error:
        _refuse_unknown(error, schema, content, prefix="", also=also, typed=typed)


def _refuse_unknown(
    error: ValidationError,
    schema: type[BaseModel],
    content: Mapping[str, Any],
    *,
    prefix: str,
    also: Iterable[str],
    typed: Callable[[str], str],
) -> None:
    for found in error.errors():
        if found["type"] == "extra_forbidden":
            key, known = typed(_dotted(prefix, found)), {*_keys(schema, prefix), *also}
            if schema is Run:
                known.update(_options(content))
            raise ConfigError(f"unknown key {key!r} (given: {found['input']!r}); {_suggest(key, map(typed, known))}")


def _dotted(prefix: str, found: ErrorDetails) -> str:
    """Return the key that an error is about."""
    return ".".join(map(str, (prefix, *found["loc"]))).removeprefix(".")


def _keys(schema: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield the dotted keys of a schema, its sections included."""
    for name, field in schema.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        yield key
        if (section := section_of(field)) is not None:
            yield from _keys(section, key)


def _options(content: Mapping[str, Any]) -> list[str]:
    """Return the keys of the options of the method that is chosen, or of all methods if none is."""
    method = content.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    chosen = (name,) if name in methods.names() else methods.names()
    return [f"method.{option}" for each in chosen for option in methods.options(methods.load(each))]


def _suggest(key: str, known: Iterable[str]) -> str:
    """Return the keys that may be meant, which end like this key, abbreviate or resemble it; else what is allowed.

    An empty name in ``known`` stands for none.
    """
    section, _, word = key.rpartition(".")
    names = sorted({*known} - {"recipe", ""})
    here = [name for name in names if name.rpartition(".")[0] == section]
    anywhere = [*here, *(name for name in names if name not in here and not name.endswith(".name"))]
    meant = (
        [name for name in anywhere if name.rpartition(".")[2] == word]
        or [name for name in anywhere if _abbreviates(word, name.rpartition(".")[2])]
        or _similar(word, anywhere, 0.75)
        or _similar(word, here, 0.6)
    )
    if meant:
        return f"did you mean {' or '.join(map(repr, meant[:3]))}?"
    return f"allowed: {', '.join(here)}" if here else "no such key exists"


def _abbreviates(one: str, other: str) -> bool:
    """Return whether one word is short for the other: ``lr`` for ``learning_rate``, ``temp`` for ``temperature``."""
    return any(
        short == "".join(part[:1] for part in long.split("_")) != long or (len(short) > 2 and long.startswith(short))
        for short, long in ((one, other), (other, one))
    )


def _similar(word: str, names: Iterable[str], similarity: float) -> list[str]:
    """Return the names whose last part resembles a word, the most similar first."""
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(name.rpartition(".")[2], []).append(name)
    return [name for found in closest(word, by_word, similarity) for name in by_word[found]]
