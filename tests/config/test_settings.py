"""Each setting is documented and has a role, and what follows from the roles."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from vrm import config
from vrm.cli import main
from vrm.config import ConfigError, Run, changed, differing, identity, resolve, settings
from vrm.config.roles import Setting
from vrm.config.schema import Trained

WORDS = ("student=resnet8", "method=kd", "teacher=runs/t/", "teacher.cache=c", "steps=10")
PLACES = {"teacher.allow_weak", "teacher.cache", "data.root", "data.placement", "data.workers", "data.download"}


def run(*words: str) -> Run:
    """A run of these words, of which a later one replaces an earlier one."""
    given = dict(word.split("=", 1) for word in (*WORDS, *words))
    return resolve("distill", "digits", [f"{key}={text}" for key, text in given.items()]).run


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.key)
def test_a_setting_is_explained(setting: Setting) -> None:
    assert setting.decides in ("trained", "kept", "placed")
    assert setting.meaning.endswith("."), "give the field a docstring of its own, in whole sentences"
    assert len(setting.meaning) > 10
    assert setting.type
    assert setting.example.startswith(setting.key.removesuffix(".name"))
    assert setting.example.partition("=")[2] != setting.default


def test_the_committed_page_is_up_to_date() -> None:
    """As ``make docs`` writes it, with every setting."""
    docs = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("generate", docs / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = (docs / "settings.md").read_text(encoding="utf-8")
    assert page == generate.settings_page(), "run `make docs`"
    for setting in settings():
        assert f"### `{setting.key.removesuffix('.name')}`" in page
        assert setting.key == "recipe" or f"`{setting.example}`" in page


@pytest.mark.parametrize("verb", ["distill", "train"])
def test_the_help_of_a_verb_shows_the_common_settings(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vrm", verb, "--help"])
    with pytest.raises(SystemExit):
        main()
    text = " ".join(capsys.readouterr().out.split())
    network = "student=resnet8x4" if verb == "distill" else "model=resnet8x4"
    assert f"{network} The network, by name or run folder." in text
    assert "optimizer.lr=0.1 The learning rate at its highest." in text
    assert ("teacher=" in text, "method=vrm" in text) == (verb == "distill", verb == "distill")
    assert "docs/settings.md" in text


def test_keys_are_those_of_a_run() -> None:
    assert set(config.flat(run("student.options={}"))) == {
        key for setting in settings() for key in ([setting.key] if setting.key != "method" else method_keys())
    } - {"student.options", "teacher.options"}


def method_keys() -> list[str]:
    return [f"method.{key}" for key in run().method]


def test_roles() -> None:
    decides = {setting.key: setting.decides for setting in settings()}
    assert {key for key, role in decides.items() if role == "kept"} == {
        *("recipe", "run", "checkpoint.every", "checkpoint.keep", "checkpoint.on_error", "log_every", "tensorboard")
    }
    assert {key for key, role in decides.items() if role == "placed"} == {
        *(*PLACES, "device", "threads", "capture", "timeout")
    }
    free = {s.key for s in settings() if isinstance(s.role, Trained) and s.role.resume == "free"}
    weights = {f"{role}.{key}" for role in ("student", "teacher") for key in ("weights", "weights_key")}
    assert free == {"steps", "nan", *weights}


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["steps=20", "nan=skip", "log_every=3", "tensorboard=true", "checkpoint.keep=9", "run=moved"], []),
        (["teacher.weights=w", "teacher.cache=d", "data.root=r", "timeout=3", "device=cpu", "threads=1"], []),
        (["capture=off", "data.workers=2", "student.weights=w"], []),
        (["data.bad_images=report"], []),
        (["data.bad_images=skip"], ["data.bad_images"]),
        (["optimizer.lr=1", "seed=2", "method.temperature=9"], ["method.temperature", "optimizer.lr", "seed"]),
        (["views=2"], ["views"]),
    ],
)
def test_what_forbids_to_go_on(words: list[str], keys: list[str]) -> None:
    assert differing(run(), run(*words)) == keys


def test_a_run_folder_may_move_but_no_network_is_exchanged() -> None:
    moved, other = ({"teacher.name": name} for name in ("elsewhere/t/", "resnet20"))
    assert differing({"teacher.name": "runs/t/"}, moved) == []
    assert differing({"teacher.name": "runs/t/"}, other) == ["teacher.name"]
    assert differing({"teacher": None}, {"teacher": {"name": "resnet20"}}) == ["teacher.name"]
    assert differing({"of_another_version": 1}, {}) == ["of_another_version"]


def test_the_runs_of_a_table_row_share_what_decides_the_result() -> None:
    assert identity(run()) == identity(run("seed=4", "data.seed=5", "run=b", "device=cpu", "log_every=9"))
    assert identity(run()) == identity(run("data.bad_images=report"))
    for word in ("data.bad_images=skip", "steps=20", "teacher.cache_precision=float16", "teacher.weights=w", "ema=0.9"):
        assert identity(run()) != identity(run(word)), word


def test_what_decides_the_teachers_logits() -> None:
    expected = {"data.seed", "batch_size", "accumulate", "precision", "deterministic", "compile", "channels_last"}
    expected.add("teacher.logits_key")
    assert set(config.teacher_outputs(run())) == expected
    assert config.teacher_outputs(run("seed=7"))["data.seed"] == 7


def test_what_a_single_step_depends_on() -> None:
    for key in ("epochs", "schedule", "schedule.gamma", "checkpoint", "nan", "run", "teacher.cache", "timeout"):
        assert not config.affects_step(key)
    for key in ("batch_size", "optimizer", "teacher", "teacher.name", "data", "method.alpha", "threads", "pair"):
        assert config.affects_step(key)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["steps=null"], {"steps": None}),
        (["log_every=3", "checkpoint.every=5"], {"log_every": 3, "checkpoint.every": 5}),
        (["teacher=moved/t/"], {"teacher.name": "moved/t/"}),  # with its cache
        (["seed=0"], {}),
    ],
)
def test_settings_that_change_when_a_run_goes_on(words: list[str], found: dict[str, Any]) -> None:
    before = config.flat(run())
    after = config.flat(changed(run(), words))
    assert {key: value for key, value in after.items() if before[key] != value} == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lr=1", "epochs=3"], r"epochs, optimizer.lr: these decide the result .*\(epochs=40, optimizer.lr"),
        (["run=x"], "run=x: `vrm resume RUN` names the run by its folder"),
        (["log_evry=1"], "did you mean 'log_every'"),
        (["optimizer.betas=[0.9,0.999]"], "has no effect: only optimizer=adamw"),
        (["teacher=resnet20"], "teacher.name: these decide the result"),
    ],
)
def test_settings_that_stay_when_a_run_goes_on(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(run(), words)


@pytest.mark.parametrize(("words", "rate"), [([], 0.001), (["optimizer.lr=0.002"], 0.002)])
def test_adamw_does_not_start_at_the_rate_of_sgd(words: list[str], rate: float) -> None:
    run = resolve("distill", "cifar100", ["pair=resnet56/resnet20", "method=kd", "optimizer=adamw", *words]).run
    assert run.optimizer.lr == rate
