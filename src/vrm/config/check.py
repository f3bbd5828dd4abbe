"""Settings against their schema, and what a user reads of the first that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

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
        typed: Turns a key of the schema into the one that the user types.
    """
    try:
        return schema(**content)
    except ValidationError as error:
        found = error.errors()[0]
    path = ".".join(map(str, (prefix, *found["loc"]))).removeprefix(".")
    key, given = typed(path), found.get("input")
    if found["type"] == "extra_forbidden":
        known = {*_keys(schema, prefix), *also}
        if schema is Run or prefix == "method":
            known |= {*_keys(Run, ""), *_options(content)}
        raise ConfigError(f"unknown key {key!r} (given: {given!r}); {_suggest(key, map(typed, known))}")
    if found["type"] == "missing":
        raise ConfigError(f"{key} is missing; give {key.removesuffix('.name')}=VALUE")
    if found["type"] == "value_error":
        raise ConfigError(str(found["ctx"]["error"]))
    raise ConfigError(f"{key}={given}: {found['msg'][0].lower()}{found['msg'][1:]}")


def _keys(schema: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield the dotted keys of a schema, its sections included."""
    for name, field in schema.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        yield key
        if (section := section_of(field)) is not None:
            yield from _keys(section, key)


def _options(content: Mapping[str, Any]) -> list[str]:
    """Return the keys of the options of the method that is chosen."""
    method = content.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    return [f"method.{option}" for option in methods.options(methods.load(name))] if name in methods.names() else []


def _suggest(key: str, known: Iterable[str]) -> str:
    """Return the keys that may be meant: one that ends like this key, or resembles it; else what is allowed here."""
    section, _, word = key.rpartition(".")
    names = sorted(name for name in {*known} if name != "recipe")
    here = [name for name in names if name.rpartition(".")[0] == section]
    anywhere = [*here, *(name for name in names if name not in here and not name.endswith(".name"))]
    meant = (
        [name for name in anywhere if name.rpartition(".")[2] == word]
        or _similar(word, anywhere, 0.75)
        or _similar(word, here, 0.5)
    )
    if meant:
        return f"did you mean {' or '.join(map(repr, meant[:3]))}?"
    return f"allowed: {', '.join(here)}" if here else "no such key exists"


def _similar(word: str, names: Iterable[str], similarity: float) -> list[str]:
    """Return the names whose last part resembles a word, the most similar first."""
    by_word: dict[str, list[str]] = {}
    for name in names:
        by_word.setdefault(name.rpartition(".")[2], []).append(name)
    return [name for found in closest(word, by_word, similarity) for name in by_word[found]]
