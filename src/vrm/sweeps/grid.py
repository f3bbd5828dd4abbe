"""Many runs from one line: a list in a ``key=value`` word gives one run for each of its values.

Several lists give all combinations: ``method=[kd,vrm] seed=[0,1,2]`` are six runs. A setting that takes a list
(``schedule.milestones``) varies only over a list of lists. In a path, ``{teacher}`` stands for the run's own teacher,
and so does every other key that is given: ``pair=[resnet56/resnet20,vgg13/vgg8]
teacher.weights=weights/{teacher}.safetensors``. A method that learns from no teacher is run without one, once for each
student.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, Field

from vrm import config, methods
from vrm.config import ConfigError, Resolved, Run
from vrm.config.schema import UserPath
from vrm.config.words import NAMED_SECTIONS, PLAIN_TEXT
from vrm.runs.checkpoint import list_checkpoints
from vrm.runs.folder import is_run, read_card

LONGEST_NAME = 120
"""The most characters of a folder's name; a longer one is cut and ends in a hash."""


class Settings(BaseModel, extra="forbid"):
    """The settings of a sweep beside those of its runs."""

    run: UserPath | None = None
    workers: int | None = Field(None, ge=1)
    devices: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    on_failure: typing.Literal["continue", "stop"] = "continue"
    dry: bool = False


def expand(recipe: str, words: Sequence[str], *, folder: Path) -> list[Resolved]:
    """Return the runs that these words describe, each in a folder below ``folder`` that is named by what varies.

    The first list varies slowest. Raise ``ConfigError`` for a value that is refused, naming the run it belongs to.
    """
    config.parse_words(words)  # refuses words that are not key=value, or that are given twice
    texts: dict[str, str] = dict(word.split("=", 1) for word in words)
    values = dict(zip(texts, _split_lists(recipe, texts), strict=True))
    varying = [key for key, found in values.items() if found is not None]
    found: dict[Path, Resolved] = {}
    for chosen in itertools.product(*(values[key] or (texts[key],) for key in texts)):
        job = _resolve(recipe, dict(zip(texts, chosen, strict=True)), varying, folder)
        path = job.run.run
        if path in found and found[path].run != job.run:
            raise ConfigError(f"two runs would be called {path.name}; give values that differ in more than punctuation")
        found[path] = job
    return list(found.values())


def _split_lists(recipe: str, texts: Mapping[str, str]) -> Iterator[tuple[str, ...] | None]:
    """Yield for each word its values as texts, or ``None`` if it does not vary."""
    names = _list_items(texts["method"], plain=True, nested=False) if "method" in texts else None
    methods_given = names or ((texts["method"],) if "method" in texts else ())
    for key, text in texts.items():
        values = _list_items(text, plain=_is_plain_text(key), nested=_takes_list(recipe, key, methods_given))
        for value in values or ():
            if values is not None and values.count(value) > 1:
                raise ConfigError(f"{key}={text} has {value} twice; give it once")
        yield values


def _is_plain_text(key: str) -> bool:
    """Return whether the value of a key is taken as it stands, without reading it as YAML."""
    return key in NAMED_SECTIONS or key.rpartition(".")[2] in PLAIN_TEXT


def _list_items(text: str, *, plain: bool, nested: bool) -> tuple[str, ...] | None:
    """Return the items of a YAML list as text, or ``None`` if ``text`` is not a list.

    ``plain`` items lose their quotes. ``nested``: only a list whose items are all lists counts as one.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{text} is not plain YAML: {' '.join(str(error).split())}. Put quotes around a value that holds any of "
            "[]{},"
        ) from None
    if not isinstance(node, yaml.SequenceNode):
        return None
    if nested and not all(isinstance(part, yaml.SequenceNode) for part in node.value):
        return None
    if not node.value:
        raise ConfigError(f"{text} is an empty list: there would be no run")
    return tuple(
        str(part.value)
        if plain and isinstance(part, yaml.ScalarNode)
        else text[part.start_mark.index : part.end_mark.index].strip()
        for part in node.value
    )


def _takes_list(recipe: str, key: str, names: Sequence[str]) -> bool:
    """Return whether the value of a setting is a list in a single run; ``names`` are the methods that are given."""
    section, _, option = key.partition(".")
    if section == "method" and option:
        named = names or [str(config.read_recipe(recipe).get("method", {}).get("name"))]
        options = [methods.options(methods.load(name)) for name in named if name in methods.names()]
        annotation = next((each[option].annotation for each in options if option in each), None)
        return any(typing.get_origin(part) is tuple for part in (annotation, *typing.get_args(annotation)))
    known = f"student.{option}" if section == "model" else key
    return any(each.key == known and each.type.startswith("list") for each in config.settings())


def _resolve(recipe: str, given: dict[str, str], varying: Sequence[str], folder: Path) -> Resolved:
    """Return one run of the grid, with its folder."""
    texts = _fill_in(given)
    verb: typing.Literal["train", "distill"] = "train" if "model" in texts else "distill"
    name = _folder_name(given, varying)
    try:
        job = config.resolve(verb, recipe, [f"{key}={text}" for key, text in texts.items()])
        if verb == "distill" and job.run.teacher is not None and not config.build_method(job.run.method).needs.teacher:
            given = _without_teacher(given)
            name = _folder_name(given, ["student" if key == "pair" else key for key in varying])
            job = config.resolve(verb, recipe, [f"{key}={text}" for key, text in _fill_in(given).items()])
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}" if name else str(error)) from None
    name = name or f"{job.run.method['name']}_seed={job.run.seed}"
    return Resolved(job.run.model_copy(update={"run": folder / name}), job.sources)


def _fill_in(given: Mapping[str, str]) -> dict[str, str]:
    """Replace ``{key}`` in plain values by the value of that key."""
    known = dict(given)
    if given.get("pair", "").count("/") == 1:
        known["teacher"], known["student"] = given["pair"].split("/")

    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ConfigError(f"{match[0]} stands for nothing; known here: {', '.join(f'{{{key}}}' for key in known)}")
        return known[match[1]]

    return {key: re.sub(r"\{([a-z_.]+)\}", value, text) if _is_plain_text(key) else text for key, text in given.items()}


def _without_teacher(given: Mapping[str, str]) -> dict[str, str]:
    """Leave out the words about a teacher; a pair becomes its student."""
    kept = {key: text for key, text in given.items() if key.partition(".")[0] not in ("teacher", "pair")}
    if "pair" in given:
        kept.setdefault("student", given["pair"].partition("/")[2])
    return kept


def _folder_name(given: Mapping[str, str], varying: Sequence[str]) -> str:
    """Return the values of what varies; those that are not names have their key with them."""
    parts = []
    for key in varying:
        if key in given:
            text = re.sub(r"[^A-Za-z0-9.+-]+", "-", given[key].strip(" /[]{}\"'")) or "-"
            parts.append(text if key in (*NAMED_SECTIONS, "pair", "variant") else f"{key}={text}")
    name = re.sub(r"^\.+", "-", "_".join(parts))  # neither hidden nor the folder above
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


# ---- what a run costs, and how far it is -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """Passes over each training image: how often each network sees it in an epoch, and in how many epochs.

    ``extra`` counts the epochs that phases add to the run's own.
    """

    student: int
    teacher: int
    epochs: int
    extra: int

    @property
    def total(self) -> int:
        """The student's passes over each training image in the whole run."""
        return self.student * (self.epochs + self.extra)

    def __str__(self) -> str:
        """The student's passes as tables show them: ``2 × 240``, ``1 × (240 + 30)``."""
        return f"{self.student} × {f'({self.epochs} + {self.extra})' if self.extra else self.epochs}"


def count_passes(run: Run) -> Passes:
    """Return what a run will take if it goes through all its epochs; ``steps`` may stop it earlier."""
    method = config.build_method(run.method)
    views = 1 + (method.needs.virtual_views or run.views - 1)
    return Passes(
        student=views,
        teacher=views if method.needs.teacher else 0,
        epochs=run.epochs,
        extra=sum(phase.epochs or 0 for phase in method.phases),
    )


def is_finished(run: Run) -> bool:
    """Return whether a run has come to the end that its settings ask for."""
    card = read_card(run.run)
    return card is not None and bool(card["steps"] == min(run.steps or card["all_steps"], card["all_steps"]))


def describe_progress(run: Run) -> str:
    """Return how far a run is, by what lies in its folder."""
    if is_finished(run):
        return "finished"
    for newest in list_checkpoints(run.run / "checkpoints")[:1]:
        return f"stopped at step {int(newest.name.removeprefix('step-'))}"
    return "stopped before its first checkpoint" if is_run(run.run) else "new"
