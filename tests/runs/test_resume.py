"""A run that is stopped anywhere ends as if it had not been; one that cannot go on is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from vrm.config import ConfigError, differing
from vrm.engine import evaluation
from vrm.models import weights_hash
from vrm.runs import api as runs
from vrm.runs import trainer as trainer_module
from vrm.runs.assembly import assemble
from vrm.runs.checkpoint import read_checkpoint, write_checkpoint
from vrm.runs.checks import teacher as teacher_checks
from vrm.runs.checks.folder import examine_run
from vrm.runs.errors import Preempted, RunError
from vrm.runs.folder import read_run, read_settings
from vrm.runs.trainer import Trainer

from .faults import files, flip
from .small import QUIET, assert_same, final_state, interrupt, make_teacher, metrics, opened, outcome, small, train
from .small import go_on as train_on
from .test_bad_data import tree

EVERY = "checkpoint.every=2"


def go_on(run: Path, *words: str) -> dict[str, Any]:
    """``vrm resume RUN WORDS``."""
    return runs.resume(run, words, console=QUIET, quiet=True)


def start(run: Path, how: str, *words: str) -> dict[str, Any]:
    """The same command ``again``, with more words; or else ``vrm resume``."""
    return train(small(run, "method=ce", EVERY, *words)) if how == "again" else go_on(run, *words)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(small(run, "method=ce", EVERY))
    return run


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped at step 6 of 8; there is a checkpoint of step 4 too."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    interrupt(small(run, "method=ce", EVERY), 6)
    return run


@pytest.fixture
def stopped(halfway: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halfway, tmp_path / "stopped"))


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "finished"))


def edit(run: Path, before: str, after: str) -> None:
    """Change ``config.yaml`` by hand."""
    config = run / "config.yaml"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
@pytest.mark.parametrize("method", ["kd", "vrm"])
def test_stopped_and_resumed_is_bitwise_the_same(teacher: Path, tmp_path: Path, method: str, stop: int) -> None:
    words = [f"method={method}", f"teacher={teacher}/", "optimizer=adamw" if stop == 3 else "optimizer=sgd"]
    train(small(tmp_path / "whole", *words))
    interrupt(small(tmp_path / "stopped", *words), stop)
    go_on(tmp_path / "stopped")
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_the_same_command_goes_on(whole: Path, stopped: Path) -> None:
    train(small(stopped, "method=ce", EVERY))
    assert_same(whole, stopped)


@pytest.mark.parametrize("steps", [3, 4, 6])
def test_steps_may_be_left_out_or_raised_later(whole: Path, tmp_path: Path, steps: int) -> None:
    """A run that ended early goes on to bitwise the end of one that did not; until then it is not finished."""
    run = tmp_path / "run"
    first = train(small(run, "method=ce", EVERY, f"steps={steps}"))
    assert (first["steps"], first["all_steps"]) == (steps, 8)
    train(small(run, "method=ce", EVERY, "steps=7"))
    seen = []
    original = Trainer._set_rate

    def look(self: Trainer, *arguments: Any) -> None:
        seen.append(read_run(run).finished)
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_set_rate", look)
        assert train(small(run, "method=ce", EVERY))["steps"] == 8
    assert seen == [False]
    assert read_settings(run).steps is None
    for one, other in ((outcome(whole)[0], outcome(run)[0]), (final_state(whole), final_state(run))):
        trained = {name for name in one if not name.startswith(("best", "meter"))}  # it was evaluated more often
        torch.testing.assert_close(
            {name: one[name] for name in trained}, {name: other[name] for name in trained}, rtol=0, atol=0
        )


def test_a_stop_ends_an_evaluation_which_is_made_up_for(whole: Path, tmp_path: Path) -> None:
    """In the middle of the first epoch's, and again when it is made up for."""
    run, batches = tmp_path / "run", list[int]()

    def stopped(self: Trainer, *arguments: Any) -> dict[str, float]:
        def count(images: int) -> None:
            batches.append(images)
            self.stopping = True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.display, "count", lambda *_: count)
            return original(self, *arguments)

    original = Trainer._measure
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_measure", stopped)
            with pytest.raises(Preempted, match=r"stopped at step 4; `vrm resume .*` goes on"):
                train(small(run, "method=ce", EVERY))
        assert not [line for line in metrics(run) if line["split"] == "test"]
    assert batches == [250, 250], "each had another batch to come"
    train(small(run, "method=ce", EVERY))
    assert_same(whole, run)


def test_a_trial_is_measured_on_a_sample_and_the_whole_run_on_all(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps on 359 test images: 256 of them, said; the whole run then measures all, the teacher too."""
    words, run = ["method=kd", f"teacher={teacher}/"], tmp_path / "run"
    train(small(tmp_path / "whole", *words))
    whole = read_run(tmp_path / "whole")
    seen: list[int] = []
    original = evaluation.evaluate

    def counting(*arguments: Any, on_batch: Any, **options: Any) -> Any:
        counts: list[int] = []
        found = original(*arguments, on_batch=lambda n: (counts.append(n), on_batch(n)), **options)
        seen.append(sum(counts))
        return found

    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer_module, teacher_checks):
            patch.setattr(module, "evaluate", counting)
        runs.start(small(run, *words, "steps=4"), console=Console(width=200))
        assert "measuring the teacher on 256 of 359 test images, as the run has 4 steps" in (
            out := capsys.readouterr().out
        )
        assert "256 of 359 measure the networks, as the run has 4 steps; without steps= all of them do" in out
        trial = read_run(run)
        assert (seen, trial.teacher["images"]) == ([256, 256], 256)
        assert trial.model["last"]["images"] == trial.model["best"]["images"] == 256
        assert trial.model["scores"] is None, "a card records what was measured on all"
        train(small(run, *words))
    ended = read_run(run)
    assert seen[2:] == [359] * 3, "the teacher, the epoch that the trial measured on less, the last epoch"
    assert ended.teacher == whole.teacher
    assert {k: ended.model[k] for k in ("last", "best", "scores")} == {
        k: whole.model[k] for k in ("last", "best", "scores")
    }


def test_what_is_written_may_change_at_resume(whole: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    class Writer:
        def add_scalar(self, name: str, *_: Any) -> None:
            drawn.append(name)

        def close(self) -> None:
            drawn.append("closed")

    monkeypatch.setattr("vrm.runs.recorder.open_tensorboard", lambda path: Writer())
    changes = {"log_every": 1, "tensorboard": True, "nan": "skip"}
    changes |= {"checkpoint.every": 1, "checkpoint.keep": 1, "checkpoint.on_error": "continue"}
    go_on(stopped, *(f"{key}={str(value).lower()}" for key, value in changes.items()))
    settings = read_settings(stopped).model_dump()
    assert {key: settings[key] for key in ("log_every", "tensorboard", "nan")} | {
        f"checkpoint.{key}": value for key, value in settings["checkpoint"].items()
    } == changes
    torch.testing.assert_close(outcome(whole)[:2], outcome(stopped)[:2], rtol=0, atol=0)
    assert [line["step"] for line in metrics(stopped) if line["name"] == "loss/ce"] == [2, 4, 6, 7, 8]
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-000000008"]
    assert drawn[-1] == "closed"


@pytest.mark.parametrize(
    "words",
    [
        ["batch_size=16"],
        ["seed=1", "optimizer.lr=0.1"],
        ["data.labels_per_class=4"],
        ["epochs=3"],
        ["precision=bfloat16"],
        ["views=2"],
    ],
)
@pytest.mark.parametrize("how", ["resume", "again", "by hand"])
def test_what_decides_the_result_may_not(stopped: Path, words: list[str], how: str) -> None:
    then, now = small(stopped, "method=ce", EVERY).run, small(stopped, "method=ce", EVERY, *words).run
    message = ".*".join(rf"{re.escape(key)}=" for key in differing(then, now))
    if how == "by hand":
        for word in words:
            key, _, value = word.partition("=")
            config = stopped / "config.yaml"
            pattern = rf"(?m)^( *{key.rpartition('.')[2]}): .*$"
            config.write_text(re.sub(pattern, rf"\1: {value}", config.read_text(), count=1))
    before = files(stopped)
    with pytest.raises(ConfigError if how == "resume" else RunError, match=message) as refused:
        start(stopped, how, *([] if how == "by hand" else words))
    for word in [] if how == "resume" else words:  # the new value: "says seed=1", or "seed=0 there and 1 here"
        assert word in str(refused.value) or f"and {word.partition('=')[2]} here" in str(refused.value)
    assert {**files(stopped), "lock": b""} == {**before, "lock": b""}


def test_another_method_is_refused(teacher: Path, stopped: Path) -> None:
    with pytest.raises(RunError, match=r"method\.name=ce there and kd here"):
        train(small(stopped, "method=kd", f"teacher={teacher}/"))


def test_a_network_may_be_moved_but_not_exchanged() -> None:
    then = {"teacher.name": "runs/t/", "student.name": "resnet8"}
    assert differing(then, {"teacher.name": "elsewhere/t/", "student.name": "resnet8"}) == []
    assert differing(then, {"teacher.name": "resnet20", "student.name": "resnet8"}) == ["teacher.name"]
    assert differing(then, {"teacher.name": "runs/t/", "student.name": "resnet20"}) == ["student.name"]


def test_another_teacher_is_refused(teacher: Path, tmp_path: Path) -> None:
    mine = tmp_path / "teacher"
    shutil.copytree(teacher, mine)
    interrupt(small(tmp_path / "run", "method=kd", f"teacher={mine}/"), 2)
    weights = load_file(mine / "model.safetensors")
    weights["fc.bias"] += 1e-3
    save_file(weights, mine / "model.safetensors")
    with pytest.raises(RunError, match="the teacher changed since the run started"):
        go_on(tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_data_are_refused(tmp_path: Path, split: str) -> None:
    root = tree(tmp_path / "data")
    words = ["method=ce", "data=folder", f"data.root={root}", "data.labels_per_class=null"]
    interrupt(small(tmp_path / "run", *words), 2)
    Image.new("RGB", (8, 8)).save(root / split / "b" / "03.png")
    with pytest.raises(RunError, match=f"the {split}(ing)? data changed since the run started"):
        go_on(tmp_path / "run")


# ---- after the end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["resume", "again"])
def test_a_finished_run_is_left_as_it_is(finished: Path, how: str) -> None:
    card = json.loads((finished / "model.json").read_text())
    assert json.loads(json.dumps(start(finished, how))) == card
    before = files(finished)
    start(finished, how)
    assert files(finished) == before


def test_a_finished_run_without_checkpoints_is_left_as_it_is(finished: Path) -> None:
    """Who removes them to save room loses nothing."""
    shutil.rmtree(finished / "checkpoints")
    card = json.loads((finished / "model.json").read_text())
    assembly = assemble(small(finished, "method=ce", EVERY).run)
    before = (finished / "model.safetensors").read_bytes()
    with opened(assembly) as trainer:
        assert train_on(trainer) == card
    assert weights_hash(assembly.student.network) == card["weights_sha256"]
    assert (finished / "model.safetensors").read_bytes() == before
    flip(finished / "model.safetensors")
    with pytest.raises(RunError, match=r"is finished and has no checkpoints, but .*model\.safetensors is damaged"):
        go_on(finished)


# ---- what doctor says, resume does -----------------------------------------------------------------------------------


def rewrite(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the state in every checkpoint, as if it had been written so."""
    for path in (run / "checkpoints").iterdir():
        found = read_checkpoint(path)
        change(found.state)
        write_checkpoint(path, found.tensors, found.state)


def damage(run: Path, count: int) -> None:
    for path in sorted((run / "checkpoints").iterdir(), reverse=True)[:count]:
        flip(path / "tensors.safetensors")


def no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def make_old(run: Path) -> None:
    """As version 0.1.0 wrote it."""
    environment = json.loads((run / "environment.json").read_text())
    del environment["format"]
    (run / "environment.json").write_text(json.dumps(environment | {"vrm": "0.1.0"}))


SITUATIONS: dict[str, tuple[bool, Callable[[Path], Any], str]] = {
    "stopped": (False, lambda run: None, ""),
    "one damaged": (False, lambda run: damage(run, 1), ""),
    "all damaged": (False, lambda run: damage(run, 2), "no checkpoint of .* can be used: .*tensors.safetensors"),
    "no checkpoint": (False, no_checkpoints, ""),
    "other settings": (False, lambda run: edit(run, "seed: 0", "seed: 1"), "seed=0, but .* says seed=1"),
    "unreadable settings": (False, lambda run: edit(run, "seed: 0", "seed: x"), r"config\.yaml.*seed"),
    "other data": (False, lambda run: rewrite(run, lambda s: s["hashes"].update({"test data": "1"})), "test data chan"),
    "other phase": (False, lambda run: rewrite(run, lambda s: s.update(phase="x")), "in phase 'x', where"),
    "fewer steps": (False, lambda run: edit(run, "steps: null", "steps: 3"), "6 steps far, but .* end after 3"),
    "more threads": (False, lambda run: rewrite(run, lambda s: s["environment"].update(threads=9)), ""),
    "old": (False, make_old, r"was written by vrm 0\.1\.0 in format 2; this version reads format 3 alone"),
    "finished": (True, lambda run: None, ""),
    "finished, none left": (True, no_checkpoints, ""),
    "finished, all damaged": (True, lambda run: damage(run, 2), "no checkpoint of .* can be used"),
    "finished, more steps": (
        True,
        lambda run: [no_checkpoints(run), edit(run, "steps: null", "steps: 7")],
        "ended after 8 steps and has no checkpoint to go on from",
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_doctor_says_what_resume_does(stopped: Path, finished: Path, name: str) -> None:
    ended, change, refusal = SITUATIONS[name]
    run = finished if ended else stopped
    change(run)
    refused = said = ""
    try:
        row = examine_run(run, console=QUIET).checks[-1]
        said = row.detail if row.result == "fail" else ""
        assert row.name == ("settings" if name == "unreadable settings" else "resume")
    except RunError as error:  # no folder of a run of this version
        said = str(error)
    try:
        go_on(run)
    except (RunError, ConfigError) as error:
        refused = str(error)
    assert said == refused
    assert re.search(refusal, refused)
    assert bool(refusal) == bool(refused)


def test_an_older_version_is_refused_by_name_everywhere(finished: Path, tmp_path: Path) -> None:
    (finished / "model.json").write_text(
        json.dumps({k: v for k, v in json.loads((finished / "model.json").read_text()).items() if k != "format"})
    )
    with pytest.raises(ConfigError, match=r"model\.json is of format 2, and this version of vrm reads format 3 alone"):
        train(small(tmp_path / "run", "method=kd", f"teacher={finished}/"))
    make_old(finished)
    for look in (read_run, go_on, lambda run: examine_run(run, console=QUIET), read_settings):
        with pytest.raises(RunError, match=r"finished was written by vrm 0\.1\.0 in format 2; this version reads"):
            look(finished)
    with pytest.raises(RunError, match=r"written by vrm 0\.1\.0 in format 2; .*give run=ANOTHER_FOLDER"):
        train(small(finished, "method=ce", EVERY))


# ---- beside ----------------------------------------------------------------------------------------------------------


def test_the_seed_of_the_data_rules_views_and_order_alone(tmp_path: Path) -> None:
    train(small(tmp_path / "a", "method=ce", "seed=1"))
    train(small(tmp_path / "b", "method=ce", "seed=1", "data.seed=1"))
    train(small(tmp_path / "c", "method=ce", "seed=1", "data.seed=2"))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


def test_a_reader_may_look_at_a_run_that_is_being_written(stopped: Path) -> None:
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epo')
    record = read_run(stopped)
    assert not record.finished
    assert [epoch for epoch, _ in record.curve("test", "top1")] == [1]
