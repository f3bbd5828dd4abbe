"""Many runs from one line: a list in a ``key=value`` word spans its values, several lists all combinations of theirs.

``method=[kd,vrm] seed=[0,1,2]`` are six runs. A setting that is a list itself (``schedule.milestones``) is spanned by a
list of lists alone. In a path, ``{teacher}`` stands for the run's own teacher, and so for every key that is given:
``pair=[resnet56/resnet20,vgg13/vgg8] teacher.weights=weights/{teacher}.safetensors``. A method that learns from no
teacher is run without one, once for each student.
"""

from __future__ import annotations

import collections.abc
import hashlib
import inspect
import itertools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from vrm import config, methods
from vrm.config import NAMED_SECTIONS, PLAIN_TEXT, ConfigError, Resolved, Run

LONGEST_NAME = 120
"""Characters of a folder's name; what is longer ends in a hash."""


def span(recipe: str, words: Sequence[str], *, folder: Path) -> list[Resolved]:
    """The runs that these words describe, each in a folder below ``folder`` that is named by what varies.

    The first list varies slowest. ``ConfigError`` for a value that cannot be, naming the run it belongs to.
    """
    config.parse_words(words)  # for its errors: not key=value, given twice
    texts: dict[str, str] = dict(word.split("=", 1) for word in words)
    values = dict(zip(texts, _spanned(recipe, texts), strict=True))
    spanned = [key for key, found in values.items() if found is not None]
    found: dict[Path, Resolved] = {}
    for chosen in itertools.product(*(values[key] or (texts[key],) for key in texts)):
        job = _resolve(recipe, dict(zip(texts, chosen, strict=True)), spanned, folder)
        path = job.run.run
        if path in found and found[path].run != job.run:
            raise ConfigError(f"two runs would be called {path.name}; give values that differ in more than punctuation")
        found[path] = job
    return list(found.values())


def _spanned(recipe: str, texts: Mapping[str, str]) -> Iterator[tuple[str, ...] | None]:
    """For each word its values, as texts; ``None`` for one that varies nothing."""
    names = _values(texts["method"], plain=True, nested=False) if "method" in texts else None
    given = names or ((texts["method"],) if "method" in texts else ())
    for key, text in texts.items():
        plain = key in NAMED_SECTIONS or key.rpartition(".")[2] in PLAIN_TEXT
        values = _values(text, plain=plain, nested=_is_list(_annotation(recipe, key, given)))
        for value in values or ():
            if values is not None and values.count(value) > 1:
                raise ConfigError(f"{key}={text} has {value} twice; give it once")
        yield values


def _values(text: str, *, plain: bool, nested: bool) -> tuple[str, ...] | None:
    """The parts of ``[a, b]`` as they were written; ``None`` if it is none, or none of lists where it must be."""
    if not text.lstrip().startswith("["):
        return None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{text} is no list: {' '.join(str(error).split())}. Put quotes around a value that holds any of []{{}},"
        ) from None
    if not isinstance(node, yaml.SequenceNode):
        return None
    if nested and not all(isinstance(part, yaml.SequenceNode) for part in node.value):
        return None
    if not node.value:
        raise ConfigError(f"{text} is an empty list: it would span no run")
    return tuple(
        str(part.value)
        if plain and isinstance(part, yaml.ScalarNode)
        else text[part.start_mark.index : part.end_mark.index].strip()
        for part in node.value
    )


def _annotation(recipe: str, key: str, names: Sequence[str]) -> Any:
    """The type of a setting; ``None`` for one that is unknown here. ``names``: the methods that are spanned."""
    path = key.split(".")
    if path[0] == "method" and len(path) == 2:
        named = names or [str(config.read_recipe(recipe).get("method", {}).get("name"))]
        options = [methods.options(methods.load(name)) for name in named if name in methods.names()]
        return next((option[path[1]].annotation for option in options if path[1] in option), None)
    schema: type[BaseModel] = Run
    for part in path[:-1]:
        found = schema.model_fields.get("student" if part == "model" else part)
        inner = [a for a in _parts(found.annotation if found else None) if inspect.isclass(a)]
        schema = next((a for a in inner if issubclass(a, BaseModel)), BaseModel)
    last = schema.model_fields.get(path[-1])
    return last.annotation if last else None


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)


def _is_list(annotation: Any) -> bool:
    kinds = [typing.get_origin(part) or part for part in _parts(annotation)]
    return any(
        inspect.isclass(kind) and issubclass(kind, collections.abc.Collection) and not issubclass(kind, str | dict)
        for kind in kinds
    )


def _resolve(recipe: str, given: dict[str, str], spanned: Sequence[str], folder: Path) -> Resolved:
    """One run of the grid."""
    texts = _filled(given)
    verb: typing.Literal["train", "distill"] = "train" if "model" in texts else "distill"
    name = _name(given, spanned)
    try:
        job = config.resolve(verb, recipe, [f"{key}={text}" for key, text in texts.items()])
        if verb == "distill" and job.run.teacher is not None and not config.build_method(job.run.method).needs.teacher:
            given = _without_teacher(given)
            name = _name(given, ["student" if key == "pair" else key for key in spanned])
            job = config.resolve(verb, recipe, [f"{key}={text}" for key, text in _filled(given).items()])
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}" if name else str(error)) from None
    name = name or f"{job.run.method['name']}_seed={job.run.seed}"
    return Resolved(job.run.model_copy(update={"run": folder / name}), job.sources)


def _filled(given: Mapping[str, str]) -> dict[str, str]:
    """Texts in which ``{key}`` stands for another's, where the value is one."""
    known = dict(given)
    if given.get("pair", "").count("/") == 1:
        known["teacher"], known["student"] = given["pair"].split("/")

    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ConfigError(f"{match[0]} stands for nothing; known here: {', '.join(f'{{{key}}}' for key in known)}")
        return known[match[1]]

    return {
        key: re.sub(r"\{([a-z_.]+)\}", value, text)
        if key in NAMED_SECTIONS or key.rpartition(".")[2] in PLAIN_TEXT
        else text
        for key, text in given.items()
    }


def _without_teacher(given: Mapping[str, str]) -> dict[str, str]:
    kept = {key: text for key, text in given.items() if key.partition(".")[0] not in ("teacher", "pair")}
    if "pair" in given:
        kept.setdefault("student", given["pair"].partition("/")[2])
    return kept


def _name(given: Mapping[str, str], spanned: Sequence[str]) -> str:
    """A folder's name: the values of what varies, those that are no names with their key."""
    parts = []
    for key in spanned:
        if key in given:
            text = re.sub(r"[^A-Za-z0-9.+-]+", "-", given[key].strip(" /[]{}\"'")) or "-"
            parts.append(text if key in (*NAMED_SECTIONS, "pair", "variant") else f"{key}={text}")
    name = re.sub(r"^\.+", "-", "_".join(parts))  # never hidden, never the folder above
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


# ---- what it costs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Passes of the networks for each training image and epoch, and epochs; ``extra`` ones are those of more phases."""

    student: int
    teacher: int
    epochs: int
    extra: int

    @property
    def passes(self) -> int:
        """Passes of the student for each training image."""
        return self.student * (self.epochs + self.extra)

    def __str__(self) -> str:
        """As tables write it: ``2 × 240``, ``1 × (240 + 30)``."""
        return f"{self.student} × {f'({self.epochs} + {self.extra})' if self.extra else self.epochs}"


def budget(run: Run) -> Budget:
    """What a run will take, by its settings; ``steps`` may stop it earlier."""
    method = config.build_method(run.method)
    views = 1 + (method.needs.virtual_views or run.views - 1)
    return Budget(
        student=views,
        teacher=views if method.needs.teacher else 0,
        epochs=run.epochs,
        extra=sum(phase.epochs or 0 for phase in method.phases),
    )


def state(run: Run) -> str:
    """How far a run has come, as its folder tells."""
    if (run.run / "model.json").is_file():
        return "finished"
    steps = [int(path.name.partition("-")[2]) for path in (run.run / "checkpoints").glob("step-*") if path.is_dir()]
    if steps:
        return f"stopped at step {max(steps)}"
    return "stopped before its first checkpoint" if (run.run / "config.yaml").is_file() else "new"
