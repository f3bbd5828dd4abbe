"""When a setting has an effect: one that has none in its run is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from vrm import methods
from vrm.config.methods import build_method
from vrm.config.schema import PYTHON, Evaluation, Run


class Condition(NamedTuple):
    """When a setting, or everything below it, has an effect."""

    key: str
    holds: Callable[[Any], bool]
    otherwise: str
    """Why there is none if the condition does not hold."""


def _own_optimizer(run: Run) -> bool:
    return methods.load(run.method["name"]).optimizer is not None


def _by_name(run: Run) -> bool:
    return run.recipe != PYTHON


CONDITIONS = (
    Condition("schedule.milestones", lambda run: run.schedule.name == "step", "only schedule=step has milestones"),
    Condition(
        "schedule.gamma",
        lambda run: run.schedule.name == "step" and run.schedule.milestones != (),
        "it is the factor of the drops that schedule=step makes after schedule.milestones, and there are none",
    ),
    Condition(
        "schedule.min_lr", lambda run: run.schedule.name == "cosine", "only schedule=cosine ends at a given rate"
    ),
    Condition(
        "optimizer.name",
        lambda run: run.optimizer.name == "sgd" or not _own_optimizer(run),
        "the method brings its own optimizer, a form of SGD",
    ),
    Condition("optimizer.momentum", lambda run: run.optimizer.name == "sgd", "only optimizer=sgd has a momentum"),
    Condition(
        "optimizer.nesterov",
        lambda run: run.optimizer.name == "sgd" and not (run.optimizer.nesterov and _own_optimizer(run)),
        "only optimizer=sgd has Nesterov's momentum, and a method's own optimizer has none",
    ),
    Condition("optimizer.betas", lambda run: run.optimizer.name == "adamw", "only optimizer=adamw has betas"),
    Condition(
        "teacher.cache_precision",
        lambda run: run.teacher is not None and run.teacher.cache is not None,
        "nothing is stored without teacher.cache=FOLDER",
    ),
    Condition(
        "student.weights_key", lambda run: run.student.weights is not None, "it chooses in the file student.weights"
    ),
    Condition(
        "teacher.weights_key",
        lambda run: run.teacher is None or run.teacher.weights is not None,
        "it chooses in the file teacher.weights",
    ),
    Condition("student.options", lambda run: "/" not in run.student.name, "a run folder brings its own options"),
    Condition(
        "teacher.options",
        lambda run: run.teacher is None or "/" not in run.teacher.name,
        "a run folder brings its own options",
    ),
    Condition(
        "views",
        lambda run: run.views == 1 or not build_method(run.method).needs.virtual_views,
        "the method already trains on virtual views of its own",
    ),
    Condition(
        "deterministic",
        lambda run: not run.deterministic or run.device != "cpu",
        "a CPU gives the same bits every time, at the same number of threads",
    ),
    Condition(
        "capture",
        lambda run: run.capture == "auto" or run.device != "cpu",
        "only a GPU records steps as CUDA graphs",
    ),
)
"""The settings of a run that have an effect in some runs only.

They depend on settings alone. What depends on the data, the machine or the number of processes is refused where that is
known, or not at all.
"""


PYTHON_CONDITIONS = (
    *(
        Condition(f"data.{key}", _by_name, "the call is given a data set that is loaded already")
        for key in ("root", "size", "labels_per_class", "bad_images", "workers", "download")
    ),
    *(
        Condition(f"{network}.{key}", _by_name, "the call is given the network itself")
        for network in ("student", "teacher")
        for key in ("weights", "weights_key", "options")
    ),
)
"""The settings that have no effect where networks and data are given as objects."""

EVALUATION = (
    Condition("data.seed", lambda settings: False, "nothing is shuffled or augmented here"),
    Condition(
        "data.labels_per_class",
        lambda settings: settings.model is None,
        "it selects training images, and the test images are measured",
    ),
    Condition(
        "model.weights_key",
        lambda settings: settings.model is None or settings.model.weights is not None,
        "it chooses in the file model.weights",
    ),
    Condition(
        "model.options",
        lambda settings: settings.model is None or "/" not in settings.model.name,
        "a run folder brings its own options",
    ),
)
"""The same for ``vrm eval`` and ``vrm data``."""


def without_effect(settings: Run | Evaluation, keys: Iterable[str]) -> dict[str, str]:
    """Return those of ``keys`` (``a.b``) that change nothing here, each with the reason."""
    keys, found = tuple(keys), dict[str, str]()
    conditions = (*CONDITIONS, *PYTHON_CONDITIONS) if isinstance(settings, Run) else EVALUATION
    for key in keys:
        for condition in conditions:
            if f"{key}.".startswith(f"{condition.key}.") and not condition.holds(settings):
                found.setdefault(key, condition.otherwise)
    options = [key for key in keys if key.startswith("method.") and key != "method.name"]
    if options and isinstance(settings, Run):
        unused = build_method(settings.method).unused_options()
        found |= {f"method.{option}": reason for option, reason in unused.items() if f"method.{option}" in options}
    return found
