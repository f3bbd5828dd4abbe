"""Each setting changes something in each run that accepts it, and is refused with the reason in all others."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vrm
from vrm import config
from vrm.config import ConfigError, Run, resolve, resolve_evaluation, resolve_mapping
from vrm.config.effects import CONDITIONS, PYTHON_CONDITIONS
from vrm.contract import Phase
from vrm.engine.optimizers import build_optimizer, learning_rate

OPTIMIZERS = ([], ["optimizer=adamw"])
SCHEDULES = (["schedule=step"], ["schedule=step", "schedule.milestones=[60]"], ["schedule=cosine"])
SUBJECTS = (
    ["method=kd", "teacher=resnet20", "device=cpu"],
    ["method=kd", "teacher=runs/t/", "teacher.cache=c", "student=runs/s/"],
    ["method=vrm", "teacher=resnet20", "views=1"],
    ["method=kdsvd", "teacher=resnet20"],
    ["method=dot", "teacher=resnet20"],
)
CONTEXTS = [
    *((*optimizer, *schedule, "method=ce") for optimizer, schedule in itertools.product(OPTIMIZERS, SCHEDULES)),
    *map(tuple, SUBJECTS),
]
OTHERS = {"optimizer.name": "sgd", "schedule.name": "step", "device": "auto", "method": "pkt", "views": "1"}
"""A value for a context that has the setting's example already."""


def resolved(words: Sequence[str]) -> Run:
    """A run of these words, of which a later one replaces an earlier one."""
    given = dict(word.split("=", 1) for word in ("student=resnet8", "epochs=240", *words))
    return resolve("distill", "digits", [f"{key}={text}" for key, text in given.items()]).run


def tried(words: Sequence[str]) -> tuple[Run | None, str]:
    """The run of these words, or why there is none."""
    try:
        return resolved(words), ""
    except ConfigError as error:
        return None, str(error)


def observed(run: Run) -> dict[str, Any]:
    """What a run makes of its settings: the optimizer, the rates and the cache; all other settings as they are."""
    optimizer = build_optimizer(run.optimizer, [nn.Parameter(torch.zeros(2))], config.build_method(run.method))
    (group,) = optimizer.param_groups
    lr = run.optimizer.lr
    rates = [
        learning_rate(run.schedule, lr, Phase(), epoch=epoch, step=epoch - 1, epochs=240, steps_per_epoch=1)
        for epoch in range(1, 241)
    ]
    hyper = {key: float(value) if key == "lr" else value for key, value in group.items() if key != "params"}
    cached = run.teacher is not None and run.teacher.cache is not None
    others = {
        key: value
        for key, value in config.flat(run).items()
        if not key.startswith(("optimizer.", "schedule.")) and (cached or key != "teacher.cache_precision")
    }
    return {"optimizer": type(optimizer), "hyper": hyper, "rates": rates, **others}


@pytest.mark.parametrize("words", CONTEXTS, ids=" ".join)
def test_a_setting_gives_another_run_or_is_refused(words: tuple[str, ...]) -> None:
    run = resolved(words)
    before, values = observed(run), config.flat(run)
    for setting in config.settings():
        key, _, text = setting.example.partition("=")
        if setting.key == "recipe" or (key.startswith("teacher") and "teacher" in values):
            continue
        if key == "method" and run.method["name"] == text:
            text = OTHERS["method"]
        elif str(values.get(setting.key)) == text:
            text = OTHERS[setting.key]
        if key == "student.options":
            key, text = "student.options.width", "2"
        elif key == "teacher.options":
            key, text = "teacher.options.width", "2"
        after, message = tried((*words, f"{key}={text}"))
        if after is None:
            refused = re.match(r"([\w.]+)=.* has no effect: \w.*; leave it out$", message)
            assert refused, message
            if refused[1] != key:  # it took the effect of a word that was there
                assert refused[1] in dict(word.split("=", 1) for word in words)
                continue
            rate = [f"optimizer.lr={run.optimizer.lr}"] if key == "optimizer" else []  # AdamW starts at another one
            tree = config.parse_words([f"{key}={text}", *rate])
            forced = config.validate(config.merge(run.model_dump(), tree))
            if key.startswith(("optimizer", "schedule", "teacher.cache_precision")):
                assert observed(forced) == before, f"{key}={text} is refused, but has an effect"
        else:
            assert observed(after) != before, f"{key}={text} is accepted, but changes nothing"


def test_every_condition_is_one_of_a_setting() -> None:
    known = {setting.key for setting in config.settings()}
    assert {condition.key for condition in (*CONDITIONS, *PYTHON_CONDITIONS)} <= known


def test_every_setting_is_read_somewhere() -> None:
    """A field that nothing outside of the settings' own room reads would have no effect."""
    package = Path(vrm.__file__).parent
    files = [path for path in package.rglob("*.py") if "config" not in path.relative_to(package).parts]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    unread = [s.key for s in config.settings() if not re.search(rf"\.{s.key.rpartition('.')[2]}\b", source)]
    assert set(unread) <= {"data.seed"}  # by way of Run.data_seed
    assert ".data_seed" in source


def test_of_a_replaced_optimizer_or_schedule_nothing_is_left() -> None:
    words = ["pair=resnet56/resnet20", "method=kd", "optimizer=adamw", "schedule=cosine"]
    run = resolve("distill", "cifar100", words).run
    assert (run.optimizer.name, run.schedule.name, run.schedule.milestones) == ("adamw", "cosine", ())


def test_a_recipe_is_named_with_its_setting_without_effect(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: digits\nepochs: 3\nschedule: {name: cosine, milestones: [1]}\n")
    message = rf"schedule.milestones=\[1\] \(from recipe {recipe}\) has no effect: only schedule=step"
    with pytest.raises(ConfigError, match=message):
        resolve("distill", str(recipe), ["student=resnet8", "method=ce"])
    recipe.write_text("data: digits\nepochs: 3\nschedule: {milestones: [1]}\n")  # of the step schedule, unnamed
    run = resolve("distill", str(recipe), ["student=resnet8", "method=ce", "schedule=cosine"]).run
    assert run.schedule.milestones == ()


def test_a_setting_of_the_recipe_that_was_made_useless_is_dropped(tmp_path: Path) -> None:
    words = ["pair=resnet56/resnet20", "method=kd"]
    found = resolve("distill", "cifar100", [*words, "schedule.milestones=[]"])
    assert "schedule.gamma" not in found.sources
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: digits\nepochs: 3\ndeterministic: true\noptimizer: {nesterov: true}\n")
    words = ["student=resnet8", "teacher=resnet20", "device=cpu"]
    assert "deterministic" not in resolve("distill", str(recipe), [*words, "method=kd"]).sources
    with pytest.raises(ConfigError, match=r"optimizer.nesterov=true .from recipe .* a method's own optimizer"):
        resolve("distill", str(recipe), [*words, "method=dot"])
    assert resolve("distill", str(recipe), [*words, "method=dot", "optimizer.nesterov=false"])


@pytest.mark.parametrize(
    ("word", "because", "more"),
    [
        ("method.delta=2", "only method.matching=huber", "method.matching=huber"),
        ("method.joint_entropy=cross", "method.keep=1 prunes no edge", "method.keep=0.5"),
        ("method.temperature=2", "features are not softened", "method.keep=0.5"),
        ("teacher.cache_precision=float16", "nothing is stored without teacher.cache=FOLDER", "teacher.cache=c"),
    ],
)
def test_a_setting_that_needs_another_is_refused_without_it(word: str, because: str, more: str) -> None:
    words = ["method=vrm", "method.keep=1", "method.vertices=features", "teacher=resnet20", word]
    with pytest.raises(ConfigError, match=f"{word}.* has no effect: {because}"):
        resolved(words)
    resolved([*words, more])


@pytest.mark.parametrize(
    ("settings", "because"),
    [
        (
            {"optimizer": {"betas": (0.8, 0.9)}},
            r'optimizer={"betas": \[0.8, 0.9\]} has no effect: only optimizer="adamw"',
        ),
        ({"data": {"root": "/data"}}, 'data_settings={"root": "/data"} has no effect: the call is given a data set'),
        (
            {"student": {"weights": "w"}},
            'student_settings={"weights": "w"} has no effect: the call is given the network',
        ),
        ({"lr": 0.1}, r"unknown key 'lr'.*did you mean optimizer={\"lr\": ..}"),
    ],
)
def test_the_python_call_refuses_the_same(settings: dict[str, Any], because: str) -> None:
    call = {"run": "r", "epochs": 2, "student": {"name": "Net"}, "data": {"name": "own"}, "method": {"name": "ce"}}
    assert resolve_mapping(call).run.recipe == "python"
    with pytest.raises(ConfigError, match=because):
        resolve_mapping(config.merge(call, settings))


@pytest.mark.parametrize(
    ("words", "because"),
    [
        (["data.seed=1"], "data.seed=1 has no effect: nothing is shuffled"),
        (["model=resnet8", "data.labels_per_class=3"], "data.labels_per_class=3 has no effect"),
        (["model=runs/a/", "model.options.width=3"], "model.options.width=3 has no effect: a run folder"),
    ],
)
def test_an_evaluation_refuses_the_same(words: list[str], because: str) -> None:
    with pytest.raises(ConfigError, match=because):
        resolve_evaluation("digits", words)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["method=vrm", "method.alpha=0", "method.beta=0", "method.keep=0.5"], "method.keep=0.5"),
        (["method=kd", "method.kd_weight=0", "method.temperature=2"], "method.temperature=2.0"),
    ],
)
def test_an_option_of_a_term_without_weight_is_refused(words: list[str], refused: str) -> None:
    with pytest.raises(ConfigError, match=rf"{refused} has no effect: .* leaves? out the"):
        resolved([*words, "teacher=resnet20"])
    resolved([*words[:-1], "teacher=resnet20"])
