"""The schema of a run, how its settings are resolved, and what a user is told when they do not fit.

A run is described by ``key=value`` words over a recipe (YAML shipped in ``vrm/recipes``, or a path to one). Settings
of the method resolve in this order, later ones win: the class's defaults, the recipe, the published settings for the
data set, the published settings for the pair, the command line.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from vrm import methods
from vrm.contract import Method

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A setting that cannot be: the message names the key, the value, what is allowed, and the fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Network(_Section):
    """A network: a registered name, or a run folder (a value with a slash) that brings its weights."""

    name: str
    weights: Path | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class Teacher(Network):
    """The network to learn from; it needs weights.

    ``allow_weak`` goes on with one that is weaker than recorded. ``cache``: a folder in which its logits on every view
    are kept, once for all runs with the same views; ``cache_precision`` is how.
    """

    allow_weak: bool = False
    cache: Path | None = None
    cache_precision: Literal["float32", "float16"] = "float32"

    @model_validator(mode="after")
    def _has_a_cache(self) -> Self:
        if self.cache is None and self.cache_precision != "float32":
            raise ValueError(
                f"teacher.cache_precision={self.cache_precision} has no effect without teacher.cache=FOLDER"
            )
        return self


class Data(_Section):
    """The data set and where it lies.

    ``seed`` rules order and views; by default it is the run's seed. ``views`` names another view policy than the
    data's own. ``size`` brings images to a square of that side; ``labels_per_class`` keeps only so many training
    samples of each class. ``bad_images``: an image that cannot be read stops the start (``error``), is left out
    (``skip``), or all of them are listed before the start stops (``report``). ``placement``: decoded images lie on the
    training device, in the host's memory, or are decoded anew for every batch (``stream``), by ``workers`` processes;
    ``auto`` takes the first that fits. ``decoder``: what decodes the training images of a stream; NVIDIA's, on a GPU,
    gives pixels that differ from the CPU's by some levels. ``download`` fetches data of a known address into ``root``.
    """

    name: str
    root: Path | None = None
    seed: int | None = Field(None, ge=0)
    views: str | None = None
    size: int | None = Field(None, gt=0)
    labels_per_class: int | None = Field(None, gt=0)
    bad_images: Literal["error", "skip", "report"] = "error"
    placement: Literal["auto", "device", "host", "stream"] = "auto"
    workers: int | None = Field(None, ge=0)
    decoder: Literal["cpu", "nvidia"] = "cpu"
    download: bool = False


class Optimizer(_Section):
    """SGD (momentum, optionally Nesterov) or AdamW."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)


class Schedule(_Section):
    """The learning rate over the epochs: steps down after ``milestones``, or a cosine to ``min_lr``.

    The first ``warmup_epochs`` rise linearly, step by step.
    """

    name: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)
    warmup_epochs: int = Field(0, ge=0)
    min_lr: float = Field(0.0, ge=0)


class Checkpoint(_Section):
    """When the run is kept.

    ``every``: steps between checkpoints (by default one at the end of each epoch); ``keep``: how many stay;
    ``on_error``: a checkpoint that cannot be written, as on a full disk, stops the run or lets it go on, warned.
    """

    every: int | None = Field(None, gt=0)
    keep: int = Field(2, gt=0)
    on_error: Literal["stop", "continue"] = "stop"


class Evaluation(_Section):
    """What ``vrm eval`` and ``vrm data`` read of a recipe."""

    model: Network | None = None
    data: Data
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Run(_Section):
    """Everything that decides a run's result, and where it is kept.

    ``batch_size`` counts the samples of one update, over all processes and all ``accumulate`` parts in which each
    process goes through its share. ``nan``: a step that meets NaN or infinity is taken back, and the run stops, goes on
    (``skip``), or returns to the newest checkpoint with half the learning rate (``rollback``). ``ema``: also keep a
    moving average of the weights with this decay. ``capture``: ``auto`` records the step as a CUDA graph where that can
    be. ``compile`` gives both networks to torch.compile, on a GPU also views and losses; ``channels_last`` lays maps
    out so. ``timeout``: seconds after which a silent process of a distributed run is given up.
    """

    recipe: str
    run: Path
    seed: int = Field(0, ge=0)
    epochs: int = Field(gt=0)
    batch_size: int = Field(64, gt=0)
    steps: int | None = Field(None, gt=0)
    views: Literal[1, 2] = 1
    student: Network
    teacher: Teacher | None = None
    method: dict[str, Any]
    data: Data
    optimizer: Optimizer = Field(default_factory=lambda: Optimizer.model_validate({}))
    schedule: Schedule = Field(default_factory=lambda: Schedule.model_validate({}))
    checkpoint: Checkpoint = Field(default_factory=lambda: Checkpoint.model_validate({}))
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    accumulate: int = Field(1, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    nan: Literal["stop", "skip", "rollback"] = "stop"
    deterministic: bool = False
    threads: int | None = Field(None, gt=0)
    capture: Literal["auto", "off"] = "auto"
    compile: bool = False
    channels_last: bool = False
    timeout: float = Field(600, gt=0)
    log_every: int = Field(50, gt=0)
    tensorboard: bool = False

    @model_validator(mode="after")
    def _milestones_lie_in_the_run(self) -> Run:
        late = [m for m in self.schedule.milestones if m >= self.epochs]
        if self.schedule.name == "step" and late:
            raise ValueError(
                f"schedule.milestones {late} lie at or after the last epoch ({self.epochs}), so the rate would never "
                f"drop; give milestones below {self.epochs}, for example schedule.milestones="
                f"[{self.epochs * 5 // 8},{self.epochs * 3 // 4},{self.epochs * 7 // 8}]"
            )
        return self

    @property
    def data_seed(self) -> int:
        """The seed of order and views."""
        return self.seed if self.data.seed is None else self.data.seed


PLAIN_TEXT = ("name", "weights", "root", "run", "pair", "variant", "cache")
"""Keys whose value is taken as it stands, never as a number."""
LARGEST_YAML = 200_000
"""Characters of a recipe or a value; the longest shipped recipe has two thousand."""
NAMED_SECTIONS = ("teacher", "student", "model", "method", "data", "optimizer", "schedule")


def near(word: str, allowed: Iterable[str]) -> str:
    """``did you mean ...?`` for a misspelt word, or the list of what is allowed."""
    allowed = sorted(allowed)
    found = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else f"allowed: {', '.join(allowed)}"


def recipes() -> tuple[str, ...]:
    """The names of the shipped recipes."""
    folder = resources.files("vrm") / "recipes"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def read_recipe(name: str) -> dict[str, Any]:
    """A shipped recipe by name, or any YAML file by a path that ends in ``.yaml``."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            shipped = ", ".join(recipes())
            raise ConfigError(f"recipe {name!r} is not a file; give a path to a YAML file or one of {shipped}")
        return _sections(read_yaml(Path(name).read_bytes(), f"recipe {name!r}"), name)
    if name not in recipes():
        raise ConfigError(f"unknown recipe {name!r}; {near(name, recipes())}")
    content = (resources.files("vrm") / "recipes" / f"{name}.yaml").read_bytes()
    return _sections(read_yaml(content, f"recipe {name!r}"), name)


def _sections(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A recipe whose sections are mappings: ``data: digits`` is short for ``data: {name: digits}``."""
    for key, value in content.items():
        if key in NAMED_SECTIONS and isinstance(value, str):
            content[key] = {"name": value}
        elif key in (*NAMED_SECTIONS, "students", "variants") and not isinstance(value, dict):
            raise ConfigError(f"recipe {name!r}: {key} must hold keys and values, got {value!r}")
        elif key in ("students", "variants") and not all(isinstance(inner, dict) for inner in value.values()):
            raise ConfigError(f"recipe {name!r}: each entry of {key} must hold keys and values, got {value!r}")
        elif key == "pairs" and not (isinstance(value, list) and all(str(pair).count("/") == 1 for pair in value)):
            raise ConfigError(f"recipe {name!r}: pairs must be a list of TEACHER/STUDENT, got {value!r}")
    return content


class _PlainLoader(yaml.SafeLoader):
    """Numbers, words, lists and keys alone: no tags, no references (a few of them can stand for gigabytes)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, "anchors and aliases are refused", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the tag {event.tag!r} is refused", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice", node.start_mark)
        return cast(dict[Any, Any], found)


# "off", "on", "yes" and "no" are words, as in YAML 1.2: capture=off. Where a truth value is asked for they give it too.
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:bool"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _plain(text: str) -> Any:
    """What plain YAML says. ``yaml.YAMLError`` for all else."""
    if len(text) > LARGEST_YAML:
        raise yaml.YAMLError(f"it has {len(text):,} characters, at most {LARGEST_YAML:,} are read")
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (ValueError, RecursionError, OverflowError) as error:  # no date, too many digits, too deep
        raise yaml.YAMLError(str(error)) from None


def read_yaml(content: bytes, what: str) -> dict[str, Any]:
    """Keys and values of plain YAML: tags are refused, nothing is executed. ``ConfigError`` names ``what``."""
    try:
        found = _plain(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{what} must hold keys and values")
    return found


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """``["method=vrm", "method.alpha=20"]`` to a nested dictionary; ``X=v`` of a named section is ``X.name=v``."""
    tree: dict[str, Any] = {}
    seen: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not of the form key=value, for example method=vrm or method.alpha=20")
        path = [*key.split("."), "name"] if key in NAMED_SECTIONS else key.split(".")
        if ".".join(path) in seen:
            raise ConfigError(f"{key} is given twice; give it once")
        seen.add(".".join(path))
        try:
            value = text if path[-1] in PLAIN_TEXT else _plain(text)
        except yaml.YAMLError:
            raise ConfigError(
                f"{key}={text}: the value is not plain YAML (a number, a word, true/false or [a, b])"
            ) from None
        here = tree
        for part in path[:-1]:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise ConfigError(f"{key}={text}: {part} already has a plain value")
        here[path[-1]] = value
    return tree


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
        return ConfigError(f"unknown key {key!r} (given: {given!r}); {near(parts[-1], fields)}")
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
            raise ConfigError(f"variant={variant}: recipe {recipe!r} has no such variant; {near(variant, variants)}")
        changes = _sections(variants[variant], f"{recipe}, variant {variant}")
    content, variant_method = merge(content, changes), changes.get("method", {})
    if (pair := given.pop("pair", None)) is not None:
        if pair not in pairs:
            raise ConfigError(f"pair={pair}: recipe {recipe!r} has no such pair; {near(pair, pairs)}")
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
