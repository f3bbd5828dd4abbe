"""What a line with lists stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrm.config import ConfigError, Run
from vrm.sweeps.grid import LONGEST_NAME, Passes, count_passes, describe_progress, expand

BASE = ("student=resnet8", "method=ce", "threads=1")


def runs(*words: str, recipe: str = "digits") -> list[Run]:
    """The runs of these words over :data:`BASE`."""
    given = {word.partition("=")[0] for word in words}
    base = [word for word in BASE if word.partition("=")[0] not in given and recipe == "digits"]
    return [job.run for job in expand(recipe, [*base, *words], folder=Path("table"))]


def names(*words: str, recipe: str = "digits") -> list[str]:
    found = runs(*words, recipe=recipe)
    assert all(run.run.parent == Path("table") for run in found)
    return [run.run.name for run in found]


def test_lists_span_all_combinations_the_first_varies_slowest() -> None:
    assert names("student=[resnet8,resnet20]", "seed=[0, 1,2]", "epochs=3") == [
        f"{student}_seed={seed}" for student in ("resnet8", "resnet20") for seed in (0, 1, 2)
    ]
    found = runs("seed=[3,4]", "optimizer.lr=[0.1,1e-2]")
    assert [(run.seed, run.optimizer.lr) for run in found] == [(3, 0.1), (3, 0.01), (4, 0.1), (4, 0.01)]
    assert found[1].run.name == "seed=3_optimizer.lr=1e-2"


def test_without_a_list_there_is_one_run() -> None:
    assert names() == ["ce_seed=0"]
    assert names("seed=5") == ["ce_seed=5"]
    assert names("seed=[5]") == ["seed=5"]


def test_settings_that_are_lists_are_spanned_by_lists_of_lists() -> None:
    """``schedule.milestones=[2,3]`` means in a sweep what it means in a run."""
    adamw = ("optimizer=adamw", "optimizer.betas=[0.8,0.9]")
    (one,) = runs("epochs=9", "schedule=step", "schedule.milestones=[2,3]", *adamw)
    assert one.schedule.milestones == (2, 3)
    assert one.optimizer.betas == (0.8, 0.9)
    found = runs("epochs=9", "schedule=step", "schedule.milestones=[[2,3],[4],[]]")
    assert [run.schedule.milestones for run in found] == [(2, 3), (4,), ()]
    assert [run.run.name for run in found] == [
        "schedule.milestones=2-3",
        "schedule.milestones=4",
        "schedule.milestones=-",
    ]
    (one,) = runs("epochs=9", "schedule=step", "schedule.milestones=[[2,3]]")
    assert one.schedule.milestones == (2, 3)


def test_options_that_are_lists_are_known_by_the_methods_types() -> None:
    teacher = ("student=resnet8", "teacher=runs/t/")
    (one,) = runs(*teacher, "method=at", "method.student_taps=[stage1,stage2]", "method.teacher_taps=[stage1,stage2]")
    assert one.method["student_taps"] == ("stage1", "stage2")
    found = runs(*teacher, "method=at", "method.student_taps=[[stage1],[stage2]]", "method.teacher_taps=[stage1]")
    assert [run.method["student_taps"] for run in found] == [("stage1",), ("stage2",)]
    assert len(runs(*teacher, "method=kd", "method.temperature=[2,4]")) == 2
    assert len(runs(*teacher, "method=[at]", "method.student_taps=[stage1]", "method.teacher_taps=[stage1]")) == 1


def test_options_of_networks_are_values_and_a_list_of_lists_gives_one_that_is_a_list() -> None:
    assert [run.student.options for run in runs("student.options.width=[8,16]")] == [{"width": 8}, {"width": 16}]
    assert [run.student.options for run in runs("student.options.widths=[[8,16]]")] == [{"widths": [8, 16]}]


def test_pairs_and_what_belongs_to_them() -> None:
    found = runs(
        "pair=[resnet56/resnet20,vgg13/vgg8]",
        "method=kd",
        "teacher.weights=weights/{teacher}.safetensors",
        "teacher.cache=caches/{teacher}-{seed}",
        "seed=[0,1]",
        recipe="cifar100",
    )
    assert [run.run.name for run in found] == [
        "resnet56-resnet20_seed=0",
        "resnet56-resnet20_seed=1",
        "vgg13-vgg8_seed=0",
        "vgg13-vgg8_seed=1",
    ]
    teachers = [run.teacher for run in found if run.teacher is not None]
    assert [str(t.weights) for t in teachers] == [
        f"weights/{name}.safetensors" for name in ("resnet56", "resnet56", "vgg13", "vgg13")
    ]
    assert [str(t.cache) for t in teachers][1:3] == ["caches/resnet56-1", "caches/vgg13-0"]
    (one,) = runs("pair=resnet56/resnet20", "teacher=runs/{teacher}-{seed}/", "method=kd", "seed=7", recipe="cifar100")
    assert one.teacher is not None
    assert one.teacher.name == "runs/resnet56-7/"


def test_a_method_without_a_teacher_is_run_without_one_once_for_each_student() -> None:
    words = ("method=[ce,kd]", "teacher=[runs/a/,runs/b/]", "teacher.allow_weak=true")
    found = runs("student=[resnet8,resnet20]", *words)
    assert [run.run.name for run in found] == [
        "resnet8_ce",
        "resnet8_kd_runs-a",
        "resnet8_kd_runs-b",
        "resnet20_ce",
        "resnet20_kd_runs-a",
        "resnet20_kd_runs-b",
    ]
    assert [run.teacher is None for run in found] == [True, False, False] * 2
    pairs = "pair=[resnet50/vgg8,vgg13/vgg8]"
    found = runs(pairs, "method=[ce,kd]", "teacher.weights={teacher}.pth", recipe="cifar100")
    assert [run.run.name for run in found] == ["vgg8_ce", "resnet50-vgg8_kd", "vgg13-vgg8_kd"]
    assert found[0].teacher is None
    assert found[0].student.name == "vgg8"


def test_train_spans_models() -> None:
    found = [job.run for job in expand("digits", ["model=[resnet8,resnet20]", "seed=1"], folder=Path("t"))]
    assert [(run.run.name, run.student.name, run.method["name"]) for run in found] == [
        ("resnet8", "resnet8", "ce"),
        ("resnet20", "resnet20", "ce"),
    ]


def test_quotes_and_colons_and_commas() -> None:
    found = runs("student=[torchvision:resnet18, 'timm:vit_tiny_patch16_224']")
    assert [run.student.name for run in found] == ["torchvision:resnet18", "timm:vit_tiny_patch16_224"]
    found = runs("student.weights=[\"a,b.pth\",'{student}.pth']")
    assert [str(run.student.weights) for run in found] == ["a,b.pth", "resnet8.pth"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=[0,1,0]"], "has 0 twice"),
        (["seed=[]"], "empty list"),
        (["seed=[0,1"], "not plain YAML"),
        (["student.weights=[{student}.pth]"], "Put quotes around"),
        (["seed=[0,-1]"], "seed=-1: seed=-1"),
        (["method=[ce,vmr]"], "vmr: method=vmr: unknown method 'vmr'"),
        (["student.weights={teacher}.pth"], r"\{teacher\} stands for nothing; known here: \{student\}"),
        (["data.root=[a/b,a-b]"], "two runs would be called data.root=a-b"),
        (["method=kd", "seed=[1,2]"], None),
        (["epochs=4", "schedule=step", "schedule.milestones=[[2],[9]]"], "schedule.milestones=9: .*lie at or after"),
        (["seed"], "not of the form key=value"),
    ],
)
def test_mistakes_name_the_run(words: list[str], message: str | None) -> None:
    if message is None:
        assert len(runs(*words)) == 2, "what needs loading is seen when a run starts"
        return
    with pytest.raises(ConfigError, match=message):
        runs(*words)


def test_names_stay_below_the_folder() -> None:
    assert names("student=[../,../../x/,.hidden/]") == ["-", "--..-x", "-hidden"]
    assert names("data.size=[8,16]", "data.root=[/etc/,..]") == [
        f"data.size={size}_data.root={root}" for size in (8, 16) for root in ("etc", "..")
    ]


def test_long_names_end_in_a_hash() -> None:
    long = "x" * 200
    found = names(f"data.root=[{long}/a,{long}/b]")
    assert all(len(name) == LONGEST_NAME for name in found)
    assert found[0] != found[1]
    assert found == names(f"data.root=[{long}/a,{long}/b]")


SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 10**6),
    "epochs": st.integers(1, 500),
    "batch_size": st.integers(2, 512),
    "optimizer.lr": st.floats(1e-6, 10, allow_nan=False),
    "optimizer.nesterov": st.sampled_from(["true", "false"]),
    "student": st.sampled_from(["resnet8", "resnet20", "torchvision:resnet18"]),
}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_sweep_is_its_runs(data: st.DataObject) -> None:
    """Every combination once, each with the settings of its own words, in a folder that depends on them alone."""
    keys = data.draw(st.lists(st.sampled_from(sorted(SCALARS)), unique=True, min_size=1, max_size=3))
    grid = {key: data.draw(st.lists(SCALARS[key], min_size=1, max_size=3, unique_by=str)) for key in keys}
    words = [f"{key}=[{','.join(map(str, values))}]" for key, values in grid.items()]
    found = runs(*words)
    count = 1
    for values in grid.values():
        count *= len(values)
    assert len({run.run for run in found}) == len(found) == count
    picked = {key: data.draw(st.sampled_from(values)) for key, values in grid.items()}
    (alone,) = runs(*(f"{key}=[{value}]" for key, value in picked.items()))
    assert alone in found
    (plain,) = runs(*(f"{key}={value}" for key, value in picked.items()))
    assert plain.model_copy(update={"run": alone.run}) == alone


def test_budgets() -> None:
    by_method = {
        "ce": Passes(1, 0, 5, 0),
        "kd": Passes(1, 1, 5, 0),
        "vrm": Passes(2, 2, 5, 0),
        "ab": Passes(1, 1, 5, 30),
    }
    for method, expected in by_method.items():
        (run,) = runs(f"method={method}", "teacher=runs/t/", "epochs=5")
        assert count_passes(run) == expected
    (run,) = runs("method=kd", "teacher=runs/t/", "views=2", "epochs=5")
    assert count_passes(run) == Passes(2, 2, 5, 0)
    assert (str(count_passes(run)), count_passes(run).total) == ("2 × 5", 10)
    assert (str(by_method["ab"]), by_method["ab"].total) == ("1 × (5 + 30)", 35)


def test_states(tmp_path: Path) -> None:
    (run,) = [job.run for job in expand("digits", [*BASE], folder=tmp_path)]
    assert describe_progress(run) == "new"
    run.run.mkdir()
    (run.run / "config.yaml").write_text("")
    assert describe_progress(run) == "stopped before its first checkpoint"
    for step in (40, 160):
        (run.run / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
    assert describe_progress(run) == "stopped at step 160"
    (run.run / "model.json").write_text('{"steps": 200, "all_steps": 900}')
    assert describe_progress(run) == "stopped at step 160", "the end of fewer steps is not this run's"
    assert describe_progress(run.model_copy(update={"steps": 200})) == "finished"
    (run.run / "model.json").write_text('{"steps": 900, "all_steps": 900}')
    assert describe_progress(run) == "finished"
