"""How the settings of a run are put together: recipe, published settings, the user's own.

Settings resolve in this order, later ones win: the defaults, the recipe, the published settings for the data set, the
published settings for the pair, a variant of the recipe, the command line or the Python call.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from vrm import methods
from vrm.config.check import checked, refuse_unknown
from vrm.config.effects import without_effect
from vrm.config.methods import method_settings
from vrm.config.recipes import complete_sections, read_recipe
from vrm.config.roles import differing, flat
from vrm.config.schema import PYTHON, ConfigError, Evaluation, Optimizer, Run, Schedule
from vrm.config.words import NAMED_SECTIONS, in_python, in_words, parse_words, read_yaml
from vrm.data.formats.pack import is_pack
from vrm.files import user_path
from vrm.models.card import Card
from vrm.models.kinds import Kind, kind_of
from vrm.wording import nearest

Verb = Literal["train", "distill"]
DEFAULT_NAMES = {
    section: schema.model_fields["name"].default
    for section, schema in (("optimizer", Optimizer), ("schedule", Schedule))
}


class Resolved(NamedTuple):
    """A run's settings, and where each one came from that is not a default.

    ``sources`` maps keys (``optimizer.lr``) to ``"recipe digits"``, ``"recipe cifar100 (mobilenetv2)"``, ``"published
    cifar100/*"``, ``"variant long"``, ``"command line"`` or ``"Python call"``.
    """

    run: Run
    sources: dict[str, str]


def resolve(verb: Verb, recipe: str, words: Sequence[str]) -> Resolved:
    """Return all settings of a run from a recipe and ``key=value`` words. Raise ``ConfigError`` for what is refused."""
    return _resolve(verb, recipe, read_recipe(recipe), parse_words(words), "command line")


def resolve_mapping(settings: Mapping[str, Any]) -> Resolved:
    """Return all settings of a run on given networks and data, from a nested mapping; see :func:`resolve`."""
    given = {
        key: {"name": value} if key in NAMED_SECTIONS and isinstance(value, str) else value
        for key, value in settings.items()
        if value is not None
    }
    try:
        return _resolve("distill", PYTHON, {}, given, "Python call")
    except ConfigError as error:
        error.args = (in_python(str(error)),)
        raise


def _resolve(verb: Verb, recipe: str, content: Mapping[str, Any], settings: Mapping[str, Any], origin: str) -> Resolved:
    """Lay the settings on each other, check them, and refuse those without effect."""
    base, given = dict(content), dict(settings)
    by_student, pairs, variants = base.pop("students", {}), base.pop("pairs", []), base.pop("variants", {})
    by_kind: dict[str, Any] = {key: base.pop(key) for key in ("transformers", "inputs") if key in base}
    variant, changes = given.pop("variant", None), {}
    if "recipe" in given:
        raise ConfigError(f"recipe={given['recipe']}: the recipe is the first word of the command, not a setting")
    if variant is not None:
        if variant not in variants:
            raise ConfigError(f"variant={variant}: recipe {recipe!r} has no such variant; {nearest(variant, variants)}")
        changes = complete_sections(variants[variant], f"{recipe}, variant {variant}")
    given = _with_networks(verb, recipe, pairs, given)
    default = {"method": {"name": "ce"}} if verb == "train" else {}
    if verb == "train":
        base.pop("teacher", None)

    chosen = merge(merge(merge(base, changes), default), given)
    also, typed = ("variant", *(["pair"] if verb == "distill" else [])), partial(_typed, verb)
    refuse_unknown(Run, chosen, also=also, typed=typed)
    student, teacher, method, data = (_name(chosen, section) for section in ("student", "teacher", "method", "data"))
    if student is None:
        raise ConfigError("no network to train: give " + ("model=NAME" if verb == "train" else "student=NAME"))
    if method is None:
        raise ConfigError(f"no method: give method=NAME, one of {', '.join(methods.names())}")
    try:
        method_class = methods.load(method)
    except ValueError as error:
        raise ConfigError(f"method={method}: {error}") from None
    if _name(changes, "method") not in (None, method):
        raise ConfigError(f"variant={variant} is one of method={_name(changes, 'method')}, not of method={method}")

    pair = f"{architecture(teacher or '')}/{architecture(student)}"
    published = methods.published(method_class, data or "", pair, chosen["method"])
    layers: list[tuple[str, Mapping[str, Any]]] = [
        (f"recipe {recipe}", _of_method(base, method)),
        (f"recipe {recipe} ({student})", _of_method(by_student.get(student, {}), method)),
        *_of_kinds(recipe, by_kind, chosen, {_typed(verb, role): role for role in ("student", "teacher")}),
        *((f"published {source}", {"method": values}) for source, values in published),
        (f"variant {variant}", changes),
        (f"vrm {verb}", default),
    ]
    before, origins = _overlay(layers)
    scaled = _scale_schedule(before, origins, given)
    merged, sources = _overlay([*layers, *scaled, (origin, given)])
    options = {key: value for key, value in merged.get("method", {}).items() if key != "name"}
    merged["method"] = {"name": method, **method_settings(method, options)}
    merged["recipe"] = recipe
    merged.setdefault("run", _default_run(recipe, method, student, merged.get("seed", 0)))
    run = checked(Run, merged, also=also, typed=typed)

    _refuse_without_effect(verb, run, {key: source for key, source in sources.items() if source == origin})
    unused = without_effect(run, sources)
    # A setting of the recipe that what was given made useless is dropped; one that never had an effect is refused.
    inherited = {key: sources[key] for key in unused if not sources[key].startswith("published ")}
    needed: dict[str, Any] = {
        key: merged[key] for key in ("recipe", "run", "student", "teacher", "method") if key in merged
    }
    if inherited and (alone := _validated({"epochs": merged["epochs"], **before, **needed})):
        _refuse_without_effect(verb, alone, inherited)
    return Resolved(run, {key: source for key, source in sources.items() if key not in unused})


def _of_kinds(
    recipe: str, by_kind: Mapping[str, Any], chosen: Mapping[str, Any], roles: Mapping[str, str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the layers of a recipe that depend on how the networks are built.

    ``transformers`` holds settings for students that are; ``inputs``, by the side of the larger network's input, those
    where neither size nor views of the images are given. Without an entry the images get that side. ``roles`` names
    the sections of the networks by the keys that the user types, the student first.
    """
    kinds = (
        {}
        if not by_kind
        else {key: _kind(key, chosen[role]) for key, role in roles.items() if key and _name(chosen, role) is not None}
    )
    if "transformers" in by_kind and next(iter(kinds.values())).transformer:
        yield f"recipe {recipe} (transformers)", by_kind["transformers"]
    images = chosen.get("data", {})
    if "inputs" in by_kind and kinds and "size" not in images and not _is_pack(images.get("root")):
        side = max(kind.side for kind in kinds.values())
        entry = {} if "views" in images else by_kind["inputs"].get(side, {})
        yield f"recipe {recipe} (input of {side} pixels)", entry or {"data": {"size": side}}


def _kind(key: str, network: Mapping[str, Any]) -> Kind:
    """Return the kind of a network in settings. Raise ``ConfigError``, which names ``key``, for one that is unknown."""
    name, options = network["name"], network.get("options", {})
    try:
        if "/" not in name:
            return kind_of(name, **options)
        card = Card.read(user_path(name))
        return kind_of(card.architecture, **card.options)._replace(side=max(card.input_size))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}={name}: {error}") from None


def _is_pack(root: Any) -> bool:
    return isinstance(root, str | Path) and is_pack(user_path(root))


def _scale_schedule(
    inherited: Mapping[str, Any], sources: Mapping[str, str], given: Mapping[str, Any]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return layers that scale what is inherited of a schedule in proportion to the epochs that are given.

    A scaled milestone falls between two epochs: the whole epoch in which it falls has the rate of its greater part. So
    drops may fall together, and one that would come at the end is left out.
    """
    old, new = inherited.get("epochs"), given.get("epochs")
    schedule, own = inherited.get("schedule", {}), given.get("schedule", {})
    if not (type(old) is type(new) is int and old > 0 and new > 0 and old != new and isinstance(own, Mapping)):
        return []
    if not isinstance(schedule, Mapping) or own.get("name", schedule.get("name")) != schedule.get("name"):
        return []
    layers: list[tuple[str, dict[str, Any]]] = []
    milestones, warmup = (schedule.get(key) for key in ("milestones", "warmup_epochs"))
    if isinstance(milestones, list) and all(type(m) is int for m in milestones) and "milestones" not in own:
        moved = [-(-(2 * m * new + old) // (2 * old)) - 1 for m in milestones]
        layers.append((sources["schedule.milestones"], {"milestones": [m for m in moved if m < new]}))
    if type(warmup) is int and "warmup_epochs" not in own:
        layers.append((sources["schedule.warmup_epochs"], {"warmup_epochs": warmup * new // old}))
    return [(f"{source}, scaled from {old} to {new} epochs", {"schedule": part}) for source, part in layers]


def _with_networks(verb: Verb, recipe: str, pairs: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Return the given settings with ``pair`` as teacher and student, and ``model`` of ``vrm train`` as student."""
    if (pair := given.pop("pair", None)) is not None:
        if pair not in pairs:
            raise ConfigError(f"pair={pair}: recipe {recipe!r} has no such pair; {nearest(pair, pairs)}")
        teacher, student = pair.split("/")
        if _name(given, "teacher") and _name(given, "student"):
            raise ConfigError(f"pair={pair} has no effect: teacher and student are given; leave it out")
        given = merge({"teacher": {"name": teacher}, "student": {"name": student}}, given)
    if verb == "train":
        if "student" in given or "teacher" in given:
            raise ConfigError(
                "`vrm train` trains one network: give model=NAME; `vrm distill` takes teacher and student"
            )
        if "model" in given:
            given["student"] = given.pop("model")
    elif "model" in given:
        raise ConfigError("`vrm distill` takes student=NAME and teacher=NAME, not model=NAME")
    return given


def _name(settings: Mapping[str, Any], section: str) -> str | None:
    """Return the name that a section gives, or None if it gives none. Raise ``ConfigError`` if it is not a text."""
    below = settings.get(section, {})
    name = below.get("name") if isinstance(below, Mapping) else below
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{section}={name}: give a name, as {section}=NAME")
    return name


def _of_method(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return the settings without those of another method."""
    return {key: value for key, value in settings.items() if key != "method" or _name(settings, key) in (None, method)}


def _overlay(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of all layers, the later ones on top, and the name of the layer that each came from."""
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        merged, given = merge(merged, layer), flat(layer)
        sources = {key: source if key in given else sources[key] for key in flat(merged)}
    return merged, sources


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``over`` laid on ``base``, section by section.

    A new ``name`` in a section drops what belonged to the old one: another method's options, another schedule's
    milestones.
    """
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            old = below.get("name", DEFAULT_NAMES.get(key))
            new = key in NAMED_SECTIONS and old is not None and value.get("name", old) != old
            result[key] = dict(value) if new else merge(below, value)
        else:
            result[key] = value
    return result


def _typed(verb: Verb, key: str) -> str:
    """Return a setting's key as the user of a verb types it.

    ``vrm train`` calls the student ``model``, and there a setting of the teacher gives an empty text.
    """
    if verb == "train":
        return "" if re.match(r"teacher\b", key) else re.sub(r"^student\b", "model", key)
    return key


def _refuse_without_effect(verb: Verb, run: Run | Evaluation, sources: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` for the first setting in ``sources`` that changes nothing about the run."""
    values = flat(run.model_dump(mode="json"))
    for key, reason in without_effect(run, sources).items():
        origin = f" (from {sources[key]})" if sources[key].startswith(("recipe ", "variant ")) else ""
        given = f"{_typed(verb, key).removesuffix('.name')}={in_words(values.get(key))}{origin}"
        raise ConfigError(f"{given} has no effect: {reason}; leave it out")


def _validated(content: Mapping[str, Any]) -> Run | None:
    """Return the settings of a run, or None if they do not make one."""
    try:
        return validate(content)
    except ConfigError:
        return None


def as_typed(text: str, resolved: Resolved) -> str:
    """Return a message about a run with its settings named as the user wrote them."""
    if resolved.run.recipe == PYTHON:
        return in_python(text)
    return re.sub(r"\bstudent(?=[.=])", "model", text) if "vrm train" in resolved.sources.values() else text


def describe_sources(resolved: Resolved) -> list[str]:
    """Return lines that say for each setting that is not a default where it came from, in the order of precedence."""
    run, sources = resolved
    order = ("recipe", "published", "variant", "vrm")
    groups: dict[str, list[str]] = {}
    for key, source in sources.items():
        setting = f"{key.removesuffix('.name')}={in_words(flat(run).get(key))}"
        groups.setdefault(source, []).append(as_typed(setting, resolved))
    ranked = sorted(groups, key=lambda source: [*order, source.split()[0]].index(source.split()[0]))
    lines = [f"settings from {source}: {', '.join(groups[source])}" for source in ranked]
    drops = Counter(run.schedule.milestones)
    lines += [
        f"{count} drops fall together: the rate is multiplied by {run.schedule.gamma**count:.3g} after epoch {epoch}"
        for epoch, count in sorted(drops.items())
        if count > 1
    ]
    return [*lines, *_unpublished(run), "all other settings: defaults"]


def _unpublished(run: Run) -> Iterator[str]:
    """Yield a line if nothing is published for this method on this pair."""
    if run.teacher is None:
        return
    pair = f"{architecture(run.teacher.name)}/{architecture(run.student.name)}"
    method = run.method["name"]
    found = [source for source, _ in methods.published(methods.load(method), run.data.name, pair, run.method)]
    if not any(source.endswith(f"/{pair}") for source in found):
        yield f"no published value for this pair: {method}, {pair} on {run.data.name}"


def resolve_evaluation(recipe: str, words: Sequence[str]) -> Evaluation:
    """Return network, data and device of an evaluation. Raise ``ConfigError`` for what is refused."""
    given = parse_words(words)
    content = read_recipe(recipe)
    chosen = merge({"data": content.get("data", {})}, given)
    refuse_unknown(Evaluation, chosen)
    by_kind = {"inputs": content["inputs"]} if "inputs" in content else {}
    layers = [layer for _, layer in _of_kinds(recipe, by_kind, chosen, {"model": "model"})]
    found = checked(Evaluation, reduce(merge, [{"data": content.get("data", {})}, *layers, given]))
    _refuse_without_effect("distill", found, dict.fromkeys(flat(given), "command line"))
    return found


def changed(run: Run, words: Sequence[str]) -> Run:
    """Return the settings with which a run goes on, from those of its folder and ``key=value`` words.

    Raise ``ConfigError`` for a setting that decides the result, or has no effect.
    """
    given = parse_words(words)
    content = run.model_dump(mode="json")
    for section, value in given.items():
        below = content.get(section)
        content[section] = {**below, **value} if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    if given.keys() & {"run", "recipe"}:
        key = min(given.keys() & {"run", "recipe"})
        raise ConfigError(f"{key}={given[key]}: `vrm resume RUN` names the run by its folder; leave {key} out")
    found = validate(content)
    if decisive := differing(run, found):
        there = ", ".join(f"{key}={in_words(flat(run).get(key))}" for key in decisive)
        raise ConfigError(
            f"{', '.join(decisive)}: these decide the result and stay as they were when the run began ({there}); give "
            "run=ANOTHER_FOLDER to `vrm train` or `vrm distill` for a run with other settings"
        )
    _refuse_without_effect("distill", found, dict.fromkeys(flat(given), "command line"))
    return found


def architecture(name: str) -> str:
    """Return the name of a network's architecture: for a run folder, the one in its ``model.json``."""
    try:
        if "/" in name and ((folder := user_path(name)) / "model.json").is_file():
            return Card.read(folder).architecture
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return name


def _default_run(recipe: str, method: str, student: str, seed: object) -> str:
    start, network = (Path(name).name if "/" in name else name.replace(":", "-") for name in (recipe, student))
    return f"runs/{start.removesuffix('.yaml')}-{network}-{method}-seed{seed}"


def validate(content: Mapping[str, Any]) -> Run:
    """Return a run's complete settings, checked. Raise ``ConfigError`` for the first that does not fit."""
    return checked(Run, content)


def dump(run: Run) -> str:
    """Return the resolved settings as YAML."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def restore(path: Path) -> Run:
    """Return the settings of an earlier run from its ``config.yaml``. ``ConfigError`` names the file."""
    content = read_yaml(path.read_bytes(), str(path))
    try:
        return validate(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
