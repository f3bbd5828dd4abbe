"""What follows from the roles of settings: what may change, what must be equal, and what to tell a user about each."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vrm.config.schema import Role, Run, Trained
from vrm.config.words import in_words

REQUIRED = "required"
"""The default of a setting that has none."""


class Setting(NamedTuple):
    """One setting, as a user reads of it."""

    key: str
    type: str
    default: str
    role: Role
    meaning: str
    example: str

    @property
    def decides(self) -> str:
        """The name of the role: ``trained``, ``kept`` or ``placed``."""
        return type(self.role).__name__.lower()


@cache
def settings() -> tuple[Setting, ...]:
    """Return all settings of a run, in the order of the schema."""
    return tuple(_settings(Run, ""))


def _settings(schema: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in schema.model_fields.items():
        if (section := section_of(field)) is not None:
            yield from _settings(section, f"{prefix}{name}.")
            continue
        role = next(each for each in field.metadata if isinstance(each, Role))
        key = f"{prefix}{name}"
        meaning = " ".join((field.description or "").split())
        example = f"{key.removesuffix('.name')}={role.example}"
        yield Setting(key, _type_in_words(field), _default_in_words(field), role, meaning, example)


def _parts(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the schema of a field that is a section, or None for a setting."""
    parts = (part for part in _parts(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel))
    return next(parts, None)


def _type_in_words(field: FieldInfo) -> str:
    return " or ".join(_in_words(part) for part in _parts(field.annotation) if part is not type(None)) + _limits(field)


def _in_words(annotation: Any) -> str:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Annotated:
        return _in_words(arguments[0])
    if typing.get_origin(annotation) is Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(annotation) is tuple:
        each = {"integer": "integers", "number": "numbers"}[_in_words(arguments[0])]
        return f"list of {each}" if Ellipsis in arguments else f"list of {len(arguments)} {each}"
    if typing.get_origin(annotation) is dict:
        return "keys and values"
    words = {bool: "true or false", int: "integer", float: "number", str: "text"}
    return words.get(annotation, "path")


def _limits(field: FieldInfo) -> str:
    words = {Gt: "above", Ge: "at least", Lt: "below", Le: "at most"}
    found = [
        f"{words[kind]} {getattr(limit, kind.__name__.lower()):g}"
        for limit in field.metadata
        for kind in words
        if isinstance(limit, kind)
    ]
    return f", {' and '.join(found)}" if found else ""


def _default_in_words(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    default = field.get_default(call_default_factory=True, validated_data={})
    return "none" if default is None else in_words(default)


# ---- two runs --------------------------------------------------------------------------------------------------------


def flat(settings: Run | Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` as ``{"a.b": 1}``; a run's settings with their values as JSON has them."""
    if isinstance(settings, Run):
        settings = settings.model_dump(mode="json")
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in flat(value).items()}
        else:
            found[key] = value
    return found


@cache
def role(key: str) -> Role | None:
    """Return the role of a setting, or of the one that it is an option of; None for an unknown key."""
    roles = {setting.key: setting.role for setting in settings()}
    parts = key.split(".")
    known = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((roles[name] for name in known if name in roles), None)


def differing(then: Run | Mapping[str, Any], now: Run | Mapping[str, Any]) -> list[str]:
    """Return the keys that forbid a run with the settings ``then`` to go on with the settings ``now``."""
    there, here = flat(then), flat(now)
    return [
        key
        for key in sorted({*there, *here})
        if _when_resumed(key, there.get(key)) != _when_resumed(key, here.get(key))
    ]


def _when_resumed(key: str, value: Any) -> Any:
    """Return a value that two runs share if one may go on as the other."""
    decided = role(key)
    if decided is not None and (not isinstance(decided, Trained) or decided.resume == "free"):
        return None
    if isinstance(decided, Trained) and decided.resume == "folder" and "/" in str(value):
        return "/"
    return _effective(decided, value)


def _effective(decided: Role | None, value: Any) -> Any:
    """Return the value, or None for one that changes no result."""
    return None if isinstance(decided, Trained) and decided.matters and value not in decided.matters else value


def identity(settings: Run | Mapping[str, Any]) -> dict[str, Any]:
    """Return what the runs of one table row share: all settings that decide the result, without the seeds."""
    found = {}
    for key, value in flat(settings).items():
        decided = role(key)
        if decided is None or (isinstance(decided, Trained) and not decided.seed):
            found[key] = _effective(decided, value)
    return found


# ---- a teacher's logits, a single step -------------------------------------------------------------------------------


def teacher_outputs(run: Run) -> dict[str, Any]:
    """Return the settings that decide the bits of the teacher's logits, beside its weights, the data and the machine.

    ``data.seed`` is the seed in force; ``deterministic`` matters on a GPU only.
    """
    found = {key: value for key, value in flat(run).items() if getattr(role(key), "teacher_output", False)}
    return found | {"data.seed": run.data_seed}


def affects_step(key: str) -> bool:
    """Return whether a setting, by its key or its section, can change a single training step or its speed."""
    roles = [setting.role for setting in settings() if f"{setting.key}.".startswith(f"{key}.")]
    decided = role(key)
    return any(each.step for each in roles) if roles else decided is None or decided.step
