"""What is measured: which words are taken, which refused, and what they make of a run."""

from __future__ import annotations

import pytest

from vrm import methods
from vrm.bench.subjects import Settings, list_subjects, resolve_run
from vrm.config import ConfigError
from vrm.config.words import split_words

from .small import TINY, settings


def test_settings_are_words() -> None:
    assert settings("methods=vrm").methods == ("vrm",)
    assert settings("methods=[kd,kd,ce]").methods == ("kd", "ce")
    assert settings("methods=all").methods == methods.names()
    assert settings("against=naive").against == ("naive",)
    assert settings("against=[compile=true,batch_size=8]").against == ("compile=true", "batch_size=8")
    own, rest = split_words(["methods=kd", "steps=3", "batch_size=8", "pair=a/b"], Settings.model_fields)
    assert (own, rest) == (["methods=kd", "steps=3"], ["batch_size=8", "pair=a/b"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=[kdd]"], "methods=kdd: did you mean 'kd'"),
        (["methods=[]"], "methods=: name one, or all"),
        (["against=fast"], "against=fast: give naive, or settings"),
        (["against=compile=true+fast"], r"against=compile=true\+fast: give naive, or settings"),
        (["rounds=0"], "rounds=0"),
        (["warmup=-1"], "warmup=-1"),
        (["round=3"], "unknown key 'round'.*did you mean 'rounds'"),
    ],
)
def test_settings_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(*words)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run=runs/a", "run has no effect on a step"),
        ("epochs=3", "epochs has no effect"),
        ("schedule=cosine", "schedule has no effect"),
        ("checkpoint.every=3", "checkpoint.every has no effect"),
        ("nan=skip", "nan has no effect"),
        ("timeout=9", "timeout has no effect"),
        ("tensorboard=true", "tensorboard has no effect"),
        ("teacher.cache=here", "teacher.cache has no effect"),
        ("teacher.cache_precision=float16", "teacher.cache_precision has no effect"),
        ("teacher.allow_weak=true", "teacher.allow_weak has no effect"),
        ("method=kd", r"methods=\[..\]"),
        ("method.alpha=3", "NAME.alpha=VALUE"),
        ("pair=resnet8", "pair=TEACHER/STUDENT"),
        ("batch_sise=8", "did you mean 'batch_size'"),
        ("precision=float3", "precision"),
        ("against=[epochs=3]", "epochs has no effect"),
        ("against=naive", "name it in methods"),
        *((f"against=[{word}]", r"the same .*; measure twice")
          for word in ("device=cpu", "data=digits", "data.size=16", "data.labels_per_class=3", "ema=0.9+device=cpu")),
    ],
)  # fmt: skip
def test_words_that_are_refused(word: str, message: str) -> None:
    own, rest = split_words([word], Settings.model_fields)
    kept = [w for w in TINY if w.partition("=")[0] != word.partition("=")[0]]
    with pytest.raises(ConfigError, match=message):
        list_subjects("cifar100", [*kept, *rest], settings("methods=[kd]", *own))


def test_any_pair_and_options_by_method(examples: None) -> None:
    words = ["pair=resnet14/resnet8", "example.scale=3"]
    run = resolve_run("cifar100", words, "example")
    assert (run.teacher.name, run.student.name) == ("resnet14", "resnet8")  # type: ignore[union-attr]
    assert run.method == {"name": "example", "refuse": False, "breaks": False, "scale": 3.0}
    alone = resolve_run("cifar100", words, "alone")
    assert alone.teacher is None
    assert alone.method == {"name": "alone"}
    with pytest.raises(ConfigError, match="needs a teacher: give pair="):
        resolve_run("cifar100", ["student=resnet8"], "example")
