"""How the settings of a run are put together and checked: recipe, published settings, the user's own.

Settings resolve in this order, later ones win: the defaults, the recipe, the published settings for the data set, the
published settings for the pair, the command line or the Python call.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from vrm import methods
from vrm.config.recipes import complete_sections, read_recipe
from vrm.config.schema import ConfigError, Evaluation, Run
from vrm.config.words import parse_words, read_yaml
from vrm.contract import Method
from vrm.wording import nearest

Model = TypeVar("Model", bound=BaseModel)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, section by section; a new ``name`` in a section drops what belonged to the old one."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            changed = "name" in value and "name" in below and value["name"] != below["name"]
            result[key] = (
                dict(value) if changed and key in ("teacher", "student", "method", "data") else merge(below, value)
            )
        else:
            result[key] = value
    return result


def _explain(error: ValidationError, schema: type[BaseModel], prefix: str) -> ConfigError:
    """One clear paragraph for the first of pydantic's findings."""
    found = error.errors()[0]
    parts = [str(part) for part in found["loc"]]
    key = ".".join([*([prefix] if prefix else []), *parts])
    given = found.get("input")
    if found["type"] == "extra_forbidden":
        fields = schema.model_fields
        for part in parts[:-1]:
            annotation = fields[part].annotation
            inner = [
                a for a in (*typing.get_args(annotation), annotation) if inspect.isclass(a) and issubclass(a, BaseModel)
            ]
            fields = inner[0].model_fields if inner else {}
        return ConfigError(f"unknown key {key!r} (given: {given!r}); {nearest(parts[-1], fields)}")
    if found["type"] == "missing":
        return ConfigError(f"{key} is missing; give {key}=VALUE")
    if found["type"] == "value_error":
        return ConfigError(str(found["ctx"]["error"]))
    return ConfigError(f"{key}={given}: {found['msg'][0].lower()}{found['msg'][1:]}")


def checked(schema: type[Model], content: Mapping[str, Any], *, prefix: str = "") -> Model:
    """``content`` as ``schema`` has it. ``ConfigError`` explains the first setting that cannot be."""
    try:
        return schema(**content)
    except ValidationError as error:
        raise _explain(error, schema, prefix) from None


def method_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method, checked and converted by the types of its ``__init__``; ``ConfigError`` otherwise."""
    try:
        options = methods.options(methods.load(name))
    except ValueError as error:
        raise ConfigError(f"method={name}: {error}") from None
    fields: dict[str, Any] = {
        option: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
        for option, parameter in options.items()
    }
    schema = create_model("Options", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)
    found = checked(schema, given, prefix="method")
    return {option: getattr(found, option) for option in options}


def build_method(settings: Mapping[str, Any]) -> Method:
    """The method of a resolved run, from ``{"name": .., option: ..}``."""
    options = {key: value for key, value in settings.items() if key != "name"}
    try:
        return methods.load(settings["name"])(**options)
    except ValueError as error:
        raise ConfigError(f"method={settings['name']}: {error}") from None


def _short(name: str) -> str:
    """The part of a network's name that can stand in a folder's name."""
    return Path(name).name if "/" in name else name.replace(":", "-")


class Resolved(typing.NamedTuple):
    """A run's settings and where the method's came from."""

    run: Run
    sources: tuple[str, ...]


def resolve(verb: Literal["train", "distill"], recipe: str, words: Sequence[str]) -> Resolved:
    """All settings of a run from a recipe and ``key=value`` words. ``ConfigError`` for what cannot be."""
    content = read_recipe(recipe)
    by_student = content.pop("students", {})
    pairs = content.pop("pairs", [])
    variants = content.pop("variants", {})
    recipe_method = content.get("method", {})
    given = parse_words(words)

    variant, changes = given.pop("variant", None), {}
    if variant is not None:
        if variant not in variants:
            raise ConfigError(f"variant={variant}: recipe {recipe!r} has no such variant; {nearest(variant, variants)}")
        changes = complete_sections(variants[variant], f"{recipe}, variant {variant}")
    content, variant_method = merge(content, changes), changes.get("method", {})
    if (pair := given.pop("pair", None)) is not None:
        if pair not in pairs:
            raise ConfigError(f"pair={pair}: recipe {recipe!r} has no such pair; {nearest(pair, pairs)}")
        teacher_name, student_name = pair.split("/")
        given = merge({"teacher": {"name": teacher_name}, "student": {"name": student_name}}, given)
    if verb == "train":
        if "student" in given or "teacher" in given:
            raise ConfigError(
                "`vrm train` trains one network: give model=NAME; `vrm distill` takes teacher and student"
            )
        if "model" in given:
            given["student"] = given.pop("model")
        content.pop("teacher", None)
        given = merge({"method": {"name": "ce"}}, given)
    elif "model" in given:
        raise ConfigError("`vrm distill` takes student=NAME and teacher=NAME, not model=NAME")

    student = merge(content, given).get("student", {}).get("name")
    merged = merge(merge(content, by_student.get(student, {})), given)
    if student is None:
        raise ConfigError("no network to train: give " + ("model=NAME" if verb == "train" else "student=NAME"))
    method = merged.setdefault("method", {}).get("name")
    if method is None:
        raise ConfigError(f"no method: give method=NAME, one of {', '.join(methods.names())}")
    try:
        method_class = methods.load(method)
    except ValueError as error:
        raise ConfigError(f"method={method}: {error}") from None
    teacher = merged.get("teacher", {}).get("name")
    if variant_method.get("name", method) != method:
        raise ConfigError(f"variant={variant} is one of method={variant_method['name']}, not of method={method}")

    settings = dict(recipe_method) if recipe_method.get("name", method) == method else {}
    sources = ["class defaults"] + ([f"recipe {recipe}"] if set(settings) - {"name"} else [])
    data_name = merged.get("data", {}).get("name", "")
    applied = list(methods.published(method_class, data_name, f"{architecture(teacher or '')}/{architecture(student)}"))
    for source, values in applied:
        settings.update(values)
        sources.append(f"published {source}")
    if not any(not source.endswith("/*") for source, _ in applied) and teacher is not None:
        sources.append("no published value for this pair")
    if set(variant_method) - {"name"}:
        settings.update(variant_method)
        sources.append(f"variant {variant}")
    own = {key: value for key, value in given.get("method", {}).items() if key != "name"}
    if own:
        sources.append("command line")
    settings.pop("name", None)
    merged["method"] = {"name": method, **method_settings(method, {**settings, **own})}
    merged["recipe"] = recipe
    merged.setdefault("run", _default_run(recipe, method, student, merged.get("seed", 0)))
    return Resolved(validate(merged), tuple(sources))


def resolve_evaluation(recipe: str, words: Sequence[str]) -> Evaluation:
    """Network, data and device of an evaluation. ``ConfigError`` for what cannot be."""
    given = parse_words(words)
    content = {"data": read_recipe(recipe).get("data", {})}
    return checked(Evaluation, merge(content, given))


def architecture(name: str) -> str:
    """A network's own name: for a run folder, the one on its ``model.json``."""
    card = Path(name) / "model.json"
    if "/" in name and card.is_file():
        try:
            return str(json.loads(card.read_bytes()).get("architecture", name))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{card} is damaged: {error}") from None
    return name


def _default_run(recipe: str, method: str, student: str, seed: object) -> str:
    return f"runs/{_short(recipe).removesuffix('.yaml')}-{_short(student)}-{method}-seed{seed}"


def validate(content: Mapping[str, Any]) -> Run:
    """A run's settings, checked. ``ConfigError`` for the first that cannot be."""
    return checked(Run, content)


def dump(run: Run) -> str:
    """The resolved settings as YAML."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def restore(path: Path) -> Run:
    """The settings of an earlier run from its ``config.yaml``. ``ConfigError`` names the file."""
    content = read_yaml(path.read_bytes(), str(path))
    try:
        return validate(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
