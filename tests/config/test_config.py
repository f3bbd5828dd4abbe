from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vrm import methods
from vrm.config import (
    ConfigError,
    build_method,
    describe_sources,
    dump,
    flat,
    merge,
    parse_words,
    read_recipe,
    recipes,
    resolve,
    resolve_mapping,
    restore,
)
from vrm.config.words import in_python
from vrm.contract import Method

PAIR = ("teacher=resnet56", "teacher.weights=t.safetensors", "student=resnet20", "method=kd")


def test_words_in_any_order_give_the_same_run() -> None:
    forward = resolve("distill", "cifar100", [*PAIR, "method.temperature=2", "seed=3"])
    backward = resolve("distill", "cifar100", [*reversed([*PAIR, "method.temperature=2", "seed=3"])])
    assert forward == backward
    assert forward.run.seed == 3
    assert forward.run.method["temperature"] == 2.0


class Example(Method):
    """Published settings for a data set and for a pair."""

    title, venue, year, family = "Example", "-", 2026, "logit"
    published: ClassVar = {
        "cifar100": {"*": {"beta": 8.0}, "vgg13/vgg8": {"beta": 6.0}},
        "imagenet": {"*": {"beta": 0.5}},
    }

    def __init__(self, alpha: float = 1.0, beta: float = 2.0) -> None:
        super().__init__()


def test_off_is_a_word_and_where_asked_for_a_truth_value(tmp_path: Path) -> None:
    words = ["method=ce", "student=resnet8", "capture=off", "deterministic=on", "tensorboard=no", "run=a"]
    run = resolve("distill", "digits", words).run
    assert (run.capture, run.deterministic, run.tensorboard) == ("off", True, False)
    (tmp_path / "config.yaml").write_text(dump(run))
    assert restore(tmp_path / "config.yaml") == run


def test_settings_resolve_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class default < recipe < published for the data < published for the pair < command line."""
    load = methods.load
    monkeypatch.setattr(methods, "load", lambda name: Example if name == "example" else load(name))
    pair = ("teacher=resnet32x4", "teacher.weights=t", "student=resnet8x4", "method=example")
    other = ("teacher=vgg13", "teacher.weights=t", "student=vgg8", "method=example")
    assert resolve("distill", "digits", pair).run.method == {"name": "example", "alpha": 1.0, "beta": 2.0}
    assert resolve("distill", "cifar100", pair).run.method["beta"] == 8.0
    assert resolve("distill", "cifar100", other).run.method["beta"] == 6.0
    recipe = tmp_path / "mine.yaml"
    content = read_recipe("cifar100") | {"method": {"name": "example", "beta": 3.0, "alpha": 0.5}}
    recipe.write_text(yaml.safe_dump(content))
    found = resolve("distill", str(recipe), other)
    assert found.run.method == {"name": "example", "alpha": 0.5, "beta": 6.0}
    assert found.sources["method.alpha"] == f"recipe {recipe}"
    assert found.sources["method.beta"] == "published cifar100/vgg13/vgg8"
    found = resolve("distill", str(recipe), [*other, "method.beta=1.5"])
    assert found.run.method["beta"] == 1.5
    assert found.sources["method.beta"] == "command line"
    unpublished = resolve("distill", str(recipe), [*other, "data=digits"])
    assert unpublished.run.method["beta"] == 3.0
    assert "no published value for this pair: example, vgg13/vgg8 on digits" in describe_sources(unpublished)


def test_mobile_students_have_the_lower_rate() -> None:
    for student, rate in (("mobilenetv2", 0.01), ("shufflenetv1", 0.01), ("shufflenetv2", 0.01), ("vgg8", 0.05)):
        words = ["teacher=vgg13", "teacher.weights=t", f"student={student}", "method=kd"]
        found = resolve("distill", "cifar100", words)
        assert found.run.optimizer.lr == rate
        assert found.sources["optimizer.lr"] == "recipe cifar100" + f" ({student})" * (rate == 0.01)
        assert resolve("distill", "cifar100", [*words, "optimizer.lr=0.3"]).run.optimizer.lr == 0.3


def test_every_setting_given_or_applied_says_where_it_came_from() -> None:
    words = ["pair=vgg13/mobilenetv2", "teacher.weights=t", "method=kd", "variant=long", "seed=2"]
    found = resolve("distill", "cifar100", words)
    assert describe_sources(found) == [
        "settings from recipe cifar100: data=cifar100, batch_size=64, optimizer=sgd, optimizer.momentum=0.9, "
        "optimizer.weight_decay=0.0005, schedule=step, schedule.gamma=0.1",
        "settings from recipe cifar100 (mobilenetv2): optimizer.lr=0.01",
        "settings from published cifar100/*: method.temperature=4.0, method.ce_weight=0.1, method.kd_weight=0.9",
        "settings from variant long: epochs=360, schedule.milestones=[150, 180, 210, 270]",
        "settings from command line: method=kd, teacher=vgg13, teacher.weights=t, student=mobilenetv2, seed=2",
        "no published value for this pair: kd, vgg13/mobilenetv2 on cifar100",
        "all other settings: defaults",
    ]
    trained = resolve("train", "digits", ["model=resnet8"]).sources
    assert (trained["method.name"], trained["student.name"]) == ("vrm train", "command line")


def test_the_python_call_applies_the_published_settings() -> None:
    call = {"run": "r", "epochs": 3, "data": {"name": "cifar100"}, "student": {"name": "resnet8x4"}}
    call |= {"teacher": {"name": "resnet32x4"}, "method": {"name": "rkd", "angle_weight": 7.0}}
    found = resolve_mapping(call)
    assert (found.run.recipe, found.run.method["angle_weight"]) == ("python", 7.0)
    assert found.sources["method.distance_weight"] == "published cifar100/*"
    assert found.sources["method.angle_weight"] == "Python call"
    assert found.run.optimizer.lr == 0.05
    assert "optimizer.lr" not in found.sources


def test_the_twelve_pairs_and_the_long_schedule() -> None:
    pairs = read_recipe("cifar100")["pairs"]
    assert len(pairs) == len(set(pairs)) == 12
    for pair in pairs:
        run = resolve("distill", "cifar100", [f"pair={pair}", "teacher.weights=t", "method=kd"]).run
        assert run.teacher is not None
        assert f"{run.teacher.name}/{run.student.name}" == pair
    long = resolve("distill", "cifar100", [*PAIR, "variant=long"]).run
    assert (long.epochs, long.schedule.milestones) == (360, (150, 180, 210, 270))


ABLATIONS = {
    "variant=long": {"epochs": 360, "schedule.milestones": (150, 180, 210, 270)},  # Table 15
    "variant=no_virtual_cross_entropy": {"method.virtual_cross_entropy": False},  # Table 14
    "variant=redundant": {"method.prune_redundant": False},  # Table 17
    "variant=features": {"method.vertices": "features"},  # Table 18
    "variant=unpruned": {"method.keep": 1.0},
    "variant=huber": {"method.matching": "huber"},
    "variant=two_virtual_views": {"method.num_virtual_views": 2},
    "method.keep=0.5": {"method.keep": 0.5},
    **{f"method.temperature={t}": {"method.temperature": float(t)} for t in (1, 2, 3, 5, 6)},  # Table 16
}


@pytest.mark.parametrize("word", ABLATIONS)
def test_an_ablation_of_vrm_is_one_word_and_changes_what_it_says(word: str) -> None:
    pair = ["pair=resnet32x4/resnet8x4", "teacher.weights=t", "method=vrm"]
    before, after = (flat(resolve("distill", "cifar100", words).run.model_dump()) for words in (pair, [*pair, word]))
    assert {key: value for key, value in after.items() if before[key] != value} == ABLATIONS[word]
    assert before.keys() == after.keys()


def test_every_variant_is_tested() -> None:
    assert {f"variant={name}" for name in read_recipe("cifar100")["variants"]} <= set(ABLATIONS)


def test_a_variant_names_its_method_goes_before_published_settings_and_behind_the_command_line(tmp_path: Path) -> None:
    words = ["pair=resnet32x4/resnet8x4", "teacher.weights=t"]
    found = resolve("distill", "cifar100", [*words, "variant=redundant"])
    assert found.run.method["name"] == "vrm"
    assert found.sources["method.prune_redundant"] == "variant redundant"
    with pytest.raises(ConfigError, match="variant=redundant is one of method=vrm, not of method=kd"):
        resolve("distill", "cifar100", [*words, "variant=redundant", "method=kd"])
    path = tmp_path / "own.yaml"
    path.write_text("data: {name: cifar100}\nepochs: 1\nvariants: {cold: {method: {name: vrm, temperature: 1.0}}}\n")
    for more, temperature in (([], 4.0), (["variant=cold"], 1.0), (["variant=cold", "method.temperature=3"], 3.0)):
        run = resolve("distill", str(path), ["teacher=resnet8", "student=resnet8", "method=vrm", *more]).run
        assert run.method["temperature"] == temperature
    path.write_text("data: {name: cifar100}\nepochs: 1\nvariants: {cold: {method: 3}}\n")
    with pytest.raises(ConfigError, match="variant cold': method must hold keys and values, got 3"):
        resolve("distill", str(path), ["teacher=resnet8", "student=resnet8", "variant=cold"])


@pytest.mark.parametrize("recipe", recipes())
def test_a_run_is_restored_from_its_yaml(recipe: str, tmp_path: Path) -> None:
    run = resolve("distill", recipe, PAIR).run
    (tmp_path / "config.yaml").write_text(dump(run))
    assert restore(tmp_path / "config.yaml") == run


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]", b"a: [", b"", b"1: 2", b"epochs: 3"])
def test_a_damaged_yaml_is_explained(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"some\.yaml|missing"):
        restore(path)
    with pytest.raises(ConfigError):
        resolve("distill", str(path), PAIR)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["metod=kd"], "unknown key 'metod'.*did you mean 'method'"),
        (["optimizer.lrr=1"], "unknown key 'optimizer.lrr'.*did you mean 'optimizer.lr'"),
        (["method.temprature=4"], "unknown key 'method.temprature'.*did you mean 'method.temperature'"),
        (["method.temp=4"], "unknown key 'method.temp'.*did you mean 'method.temperature'"),
        (
            ["method=kd", "method.beta=2"],
            "unknown key 'method.beta'.*; allowed: method.ce_weight, method.kd_weight, method.temperature$",
        ),
        (["lr=1"], "unknown key 'lr'.*did you mean 'optimizer.lr'"),
        (["weights=w"], "did you mean 'student.weights' or 'teacher.weights'"),
        (["temprature=4"], "unknown key 'temprature'.*did you mean 'method.temperature'"),
        (["schedule.lr=4"], "unknown key 'schedule.lr'.*did you mean 'optimizer.lr'"),
        (["recipe=digits"], "the recipe is the first word"),
        (["pair=resnet56/resnet20"], "pair=resnet56/resnet20 has no effect: teacher and student are given"),
        (["optimizer.nesterov=true", "optimizer.momentum=0"], "optimizer.nesterov=true needs a momentum"),
        (["method=kdd"], "unknown method 'kdd'; did you mean .*kd"),
        (["epochs=many"], "epochs=many: .*integer"),
        (["epochs=0"], "epochs=0: .*greater than 0"),
        (["optimizer.momentum=1.5"], "optimizer.momentum=1.5: .*less than 1"),
        (["method.temperature=-1"], "temperature must be above 0"),
        (["batch_size=2.5"], "batch_size=2.5: .*integer"),
        (["device=gpu"], "device=gpu: .*'auto', 'cpu' or 'cuda'"),
        (["views=3"], "views=3"),
        (["seed"], "'seed' is not of the form key=value"),
        (["seed=1", "seed=2"], "seed is given twice"),
        (["method=kd", "method.name=vrm"], "method.name is given twice"),
        (["seeds=1"], "unknown key 'seeds'.*did you mean 'seed' or 'data.seed'"),
        (["model=resnet8"], "takes student=NAME and teacher=NAME"),
        (["pair=resnet56/resnet21"], "no such pair; did you mean 'resnet56/resnet20'"),
        (["variant=longer"], "no such variant; did you mean 'long'"),
        (
            ["epochs=4", "schedule.milestones=[150]"],
            r"^schedule.milestones=\[150\] lie at or after the last epoch.*milestones=\[2,3\]$",
        ),
        (["learning_rate=1"], "did you mean 'optimizer.lr'"),
        (["wd=1"], "did you mean 'optimizer.weight_decay'"),
        (["cache=c"], "did you mean 'teacher.cache'"),
        (["milestones=[1]"], "did you mean 'schedule.milestones'"),
        (["data.root=[", "seed=["], "seed=.: the value is not plain YAML"),
        (["optimizer=rmsprop"], "optimizer.name=rmsprop: .*'sgd' or 'adamw'"),
    ],
)
def test_mistakes_are_explained(words: list[str], message: str) -> None:
    keys = {word.partition("=")[0] for word in words}
    base = [word for word in PAIR if word.partition("=")[0] not in keys]
    with pytest.raises(ConfigError, match=message):
        build_method(resolve("distill", "cifar100", [*base, *words]).run.method)


@pytest.mark.parametrize(
    ("verb", "word", "meant"),
    [
        ("distill", "methd=vrm", "'method'"),
        ("train", "methd=vrm", "'method'"),
        ("train", "lr=0.01", "'optimizer.lr'"),
        ("distill", "lr=0.01", "'optimizer.lr'"),
        ("distill", "temperature=2", "'method.temperature'"),
        ("distill", "weights=w", "'student.weights' or 'teacher.weights'"),
        ("train", "weights=w", "'model.weights'"),
    ],
)
def test_an_unknown_key_is_named_before_what_is_missing(verb: Any, word: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(verb, "digits", [word])
    assert str(refused.value).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("words", "milestones"),
    [
        (["epochs=24"], (15, 18, 21)),
        (["epochs=480"], (300, 360, 420)),
        (["epochs=5"], (3, 4, 4)),
        (["epochs=2"], (1, 1)),
        (["epochs=1"], ()),
        (["epochs=36", "variant=long"], (15, 18, 21, 27)),
        (["epochs=24", "schedule.milestones=[12]"], (12,)),
        (["epochs=24", "schedule=step"], (15, 18, 21)),
        (["epochs=24", "schedule=cosine"], ()),
        (["epochs=240"], (150, 180, 210)),
    ],
)
def test_milestones_follow_the_epochs(words: list[str], milestones: tuple[int, ...]) -> None:
    resolved = resolve("distill", "cifar100", [*PAIR, *words])
    assert resolved.run.schedule.milestones == milestones
    scaled = resolved.sources.get("schedule.milestones", "").partition(", scaled from ")[2]
    assert bool(scaled) == (words[0] != "epochs=240" and words[1:] in ([], ["variant=long"], ["schedule=step"]))


def test_every_epoch_has_the_rate_of_its_greater_part() -> None:
    """The rate at the middle of each epoch is that at the same share of the whole recipe."""
    for epochs in range(1, 100):
        scaled = resolve("distill", "cifar100", [*PAIR, f"epochs={epochs}"]).run.schedule.milestones
        for epoch in range(1, epochs + 1):
            whole = sum((epoch - 0.5) / epochs >= milestone / 240 for milestone in (150, 180, 210))
            assert sum(epoch > milestone for milestone in scaled) == whole, (epochs, epoch)


def test_drops_that_fall_together_are_told(tmp_path: Path) -> None:
    lines = describe_sources(resolve("distill", "cifar100", [*PAIR, "epochs=4"]))
    assert "settings from recipe cifar100, scaled from 240 to 4 epochs: schedule.milestones=[2, 3, 3]" in lines
    assert "2 drops fall together: the rate is multiplied by 0.01 after epoch 3" in lines
    file = tmp_path / "warm.yaml"
    file.write_text("data: digits\nepochs: 100\nschedule: {name: cosine, warmup_epochs: 5}")
    for epochs, warmup in ((100, 5), (40, 2), (4, 0), (200, 10)):
        assert resolve("distill", str(file), [*PAIR, f"epochs={epochs}"]).run.schedule.warmup_epochs == warmup


@given(
    st.dictionaries(
        st.sampled_from(["data", "students", "variants", "pairs", "optimizer", "method", "epochs", "schedule"]),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
        ),
    )
)
def test_any_recipe_gives_settings_or_an_explanation(content: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        with contextlib.suppress(ConfigError):
            resolve("distill", str(path), PAIR)


def test_recipes_are_data(tmp_path: Path) -> None:
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"epochs: !!python/object/apply:os.system ['touch {tmp_path}/sentinel']")
    with pytest.raises(ConfigError, match="not plain YAML"):
        read_recipe(str(evil))
    assert not (tmp_path / "sentinel").exists()
    with pytest.raises(ConfigError, match="did you mean 'cifar100'"):
        read_recipe("cifar10O")
    with pytest.raises(ConfigError, match="is not a file"):
        read_recipe("nowhere.yaml")


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("or give teacher.allow_weak=true", "or give allow_weak_teacher=True"),
        ("method.alpha=0 and method=kd", 'options={"alpha": 0} and method="kd"'),
        ("student.name=Net there", "student=Net there"),
        ("schedule.milestones=[150, 180] lie at", 'schedule={"milestones": [150, 180]} lie at'),
        ("give schedule.milestones=[2,3], or none", 'give schedule={"milestones": [2,3]}, or none'),
        ("teacher.cache=a/b was made", 'teacher_settings={"cache": "a/b"} was made'),
        ("mend it, or data.bad_images=skip", "mend it, or leave it out of the data set"),
        ("give data.size=N", "give from_dataset(.., size=N)"),
        ("in /runs/seed=a/ at optimizer.lr=1e-3", 'in /runs/seed=a/ at optimizer={"lr": 1e-3}'),
    ],
)
def test_python_reads_arguments(words: str, arguments: str) -> None:
    assert in_python(words) == arguments
    assert in_python(arguments) == arguments


@given(st.lists(st.text(max_size=20), max_size=5))
def test_any_words_give_settings_or_an_explanation(words: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        resolve("distill", "digits", words)


def test_a_new_name_drops_the_old_ones_settings() -> None:
    assert merge({"method": {"name": "vrm", "alpha": 1}}, {"method": {"name": "kd"}}) == {"method": {"name": "kd"}}
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    assert parse_words(["teacher=x", "teacher.weights=y"]) == {"teacher": {"name": "x", "weights": "y"}}
