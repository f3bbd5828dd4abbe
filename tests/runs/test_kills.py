"""A run that is killed, stopped or moved anywhere ends bitwise as if it had not been. The signals are real."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vrm.cli import STOPPED, resumable
from vrm.runs import api as runs
from vrm.runs.folder import open_folder

from .forked import Forked, Pause
from .small import OPTIONS, QUIET, SMALL, assert_same, interrupt, make_teacher, small, train

KINDS: Mapping[str, tuple[str, ...]] = {
    "logits": ("method=kd",),
    "two views": ("method=kd", "views=2"),
    "projector": ("method=reviewkd",),
    "memory": ("method=crd", *OPTIONS["crd"]),
    "phases": ("method=ab", *OPTIONS["ab"]),
    "relations": ("method=vrm",),
    "two momenta": ("method=dot",),
    "adamw": ("method=kd", "optimizer=adamw"),
    "average, parts, half": ("method=kd", "ema=0.9", "accumulate=2", "batch_size=10", "precision=float16", "epochs=4"),
    "no checkpoint but each epoch's": ("method=fitnet", "checkpoint.every=4"),
}
"""What a checkpoint has to hold differs by kind of method and of step."""

KILLS = 2
"""Of a run of each kind: twenty in all."""

WORDS = ("epochs=6", "checkpoint.every=3")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_teacher(tmp_path_factory.mktemp("teacher") / "run")
    finish(tmp_path_factory.mktemp("first") / "run", "method=ce", "epochs=1")  # all imports are done
    return folder


def words(*given: str) -> list[str]:
    """Those of a small run; later ones win."""
    return [*{word.partition("=")[0]: word for word in (*SMALL, *WORDS, *given)}.values()]


def go_on(run: Path, *given: str, pause: Pause | None = None, threads: int = 1) -> Forked:
    """Start the run in a process, or resume it, as its user would."""
    begun = (run / "config.yaml").is_file()
    line = ["resume", str(run)] if begun else ["distill", "digits", *words(*given), f"run={run}"]
    return Forked(*line, output=run.with_suffix(".txt"), pause=pause, threads=threads)


def assert_equal(whole: Path, run: Path) -> None:
    """Bitwise the same tensors, log and card (but for its clock), and nothing lies about."""
    assert_same(whole, run)
    one, other = (json.loads((folder / "model.json").read_text()) for folder in (whole, run))
    for clock in ("seconds", "images_per_second", "full_run_seconds"):
        del one[clock], other[clock]
    assert one == other
    assert names(whole) == names(run)


def names(run: Path) -> list[Path]:
    """All that lies in a run's folder."""
    return sorted(path.relative_to(run) for path in run.rglob("*"))


def finish(run: Path, *given: str) -> None:
    """Go on to the end."""
    process = go_on(run, *given)
    assert process.wait() == 0, process.text


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_instants(teacher: Path, tmp_path: Path, kind: str) -> None:
    given = [*KINDS[kind], f"teacher={teacher}/"]
    started = time.monotonic()
    finish(tmp_path / "whole", *given)
    duration = time.monotonic() - started
    draw, kills = random.Random(kind), 0
    killed = tmp_path / "killed"
    while kills < KILLS:
        process = go_on(killed, *given)
        time.sleep(draw.uniform(0, duration))
        kills += process.kill()
        if (killed / "model.json").is_file():  # it was faster: another one
            killed = killed.with_name(f"{killed.name}-too-late")
            kills, duration = 0, 0.8 * duration
    finish(killed, *given)
    assert_equal(tmp_path / "whole", killed)


FOLDER = "vrm.runs.folder:RunFolder"
PLACES: Mapping[str, Pause] = {
    "before the first step": Pause("vrm.engine.step:Step.__call__"),
    "at the start of an epoch": Pause("vrm.engine.step:Step.__call__", 9),
    "in an evaluation": Pause("vrm.tasks.classification:Classification.batch_sums", 7),
    "between the best weights and their checkpoint": Pause(f"{FOLDER}.save", 3),
    "after the last checkpoint": Pause(f"{FOLDER}.finish"),
    "between the last weights and their card": Pause(f"{FOLDER}.write_weights", 1, "model.safetensors", after=True),
    "between the manifest and the card": Pause("vrm.runs.folder:write_json", 1, "run/manifest.json", after=True),
}


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(run, "method=kd", f"teacher={teacher}/", "checkpoint.every=4")
    return run


@pytest.mark.parametrize("place", PLACES)
def test_killed_at(teacher: Path, whole: Path, tmp_path: Path, place: str) -> None:
    given = ["method=kd", f"teacher={teacher}/", "checkpoint.every=4"]
    process = go_on(tmp_path / "run", *given, pause=PLACES[place])
    process.wait_for_pause()
    assert process.kill()
    finish(tmp_path / "run", *given)
    assert_equal(whole, tmp_path / "run")


def test_killed_while_it_resumes(teacher: Path, whole: Path, tmp_path: Path) -> None:
    given = ["method=kd", f"teacher={teacher}/", "checkpoint.every=4"]
    for pause in (
        Pause("vrm.runs.folder:write_checkpoint", 3),
        Pause("vrm.runs.keeper:Keeper.restore", after=True),
        Pause("vrm.models:save_tensors", argument="best.safetensors"),
        Pause("vrm.engine.step:Step.__call__", 2),
    ):
        process = go_on(tmp_path / "run", *given, pause=pause)
        process.wait_for_pause()
        assert process.kill()
    finish(tmp_path / "run", *given)
    assert_equal(whole, tmp_path / "run")


def test_after_the_end_nothing_changes(teacher: Path, whole: Path) -> None:
    def content() -> dict[str, bytes]:
        return {
            str(path): path.read_bytes() for path in sorted(whole.rglob("*")) if path.is_file() and path.name != "lock"
        }

    before = content()
    process = go_on(whole)
    assert process.wait() == 0, process.text
    assert content() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_the_run_after_the_step_it_is_in(
    teacher: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    given = ["method=kd", f"teacher={teacher}/", "checkpoint.every=4"]
    process = go_on(run, *given, pause=Pause("vrm.engine.step:Step.__call__", 6, seconds=0.5))
    process.wait_for_pause()
    process.send(number)
    assert process.wait() == 75, process.text
    assert f"stopped at step 6; `vrm resume {run}` goes on" in process.text
    assert max(path.name for path in (run / "checkpoints").iterdir()) == "step-000000006"
    finish(run)
    assert_equal(whole, run)


def test_a_second_signal_ends_the_run_at_once(teacher: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = ["method=kd", f"teacher={teacher}/", "checkpoint.every=4"]
    process = go_on(run, *given, pause=Pause("vrm.engine.step:Step.__call__", 6))
    process.wait_for_pause()
    process.send(signal.SIGTERM)
    assert process.wait(0.3) is None, "the first one lets the step end"
    process.send(signal.SIGUSR1)
    started = time.monotonic()
    assert process.wait() == 75, process.text
    assert time.monotonic() - started < 20, "the step lasts a minute"
    assert max(path.name for path in (run / "checkpoints").iterdir()) == "step-000000004"
    open_folder(run, print).close()  # its lock is free
    finish(run)
    assert_equal(whole, run)


@pytest.mark.parametrize(
    ("pause", "newest"),
    [
        (Pause("vrm.runs.assembly:load_data"), None),
        (Pause("vrm.models:FrozenTeacher.forward"), None),
        (Pause("vrm.runs.checks.start:check_disk"), None),
        (Pause("vrm.tasks.classification:Classification.batch_sums", 7, seconds=0.3), 12),
        (Pause("vrm.runs.folder:write_checkpoint", 2, seconds=0.3), 9),
        (Pause(f"{FOLDER}.finish"), 24),
    ],
    ids=["starting", "measuring", "checking", "evaluation", "checkpoint", "finishing"],
)
def test_a_signal_outside_of_a_step(
    teacher: Path, whole: Path, tmp_path: Path, pause: Pause, newest: int | None
) -> None:
    """Whatever the run is at: exit code 75, and nothing lost."""
    run = tmp_path / "run"
    given = ["method=kd", f"teacher={teacher}/", "checkpoint.every=4"]
    process = go_on(run, *given, pause=pause)
    process.wait_for_pause()
    process.send(signal.SIGUSR1)
    assert process.wait(20) == 75, process.text
    assert "goes on" in process.text
    assert "Traceback" not in process.text
    steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")]
    assert max(steps, default=None) == newest
    finish(run, *given)
    assert_equal(whole, run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_start_is_checked_ends_it_in_a_line(
    teacher: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Within seconds, whatever the teacher takes; once it is measured, the next start does not measure it again."""
    run = tmp_path / "run"
    given = ["method=kd", f"teacher={teacher}/", "checkpoint.every=4"]
    measured = run / "teacher.json"
    for place, known in (("vrm.models:FrozenTeacher.forward", False), ("vrm.runs.checks.start:rehearse", True)):
        process = go_on(run, *given, pause=Pause(place))
        process.wait_for_pause()
        assert measured.exists() is known
        started = time.monotonic()
        process.send(number)
        assert process.wait() == 75, process.text
        assert time.monotonic() - started < 5
        assert sum(line.startswith("vrm: ") for line in process.text.splitlines()) == 1, process.text
        assert process.text.endswith("`vrm resume RUN`, or the same command, goes on\n")
    before = measured.stat().st_mtime_ns
    process = go_on(run, *given, pause=Pause("vrm.runs.checks.start:measure_teacher"))
    assert process.wait() == 0, process.text
    assert not process.here.exists()
    assert measured.stat().st_mtime_ns == before
    assert_equal(whole, run)


def test_a_signal_ends_one_long_operation() -> None:
    """Python calls no handler before the operation ends, which would take minutes."""
    code = """if True:
        import hashlib
        from vrm import cli
        cli.GRACE = 0.2
        with cli.resumable():
            print("busy", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (75, f"{STOPPED}\n")


def test_a_signal_on_the_way_out_changes_nothing() -> None:
    with pytest.raises(SystemExit) as ended, resumable():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 75
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.raise_signal(number)


def test_another_number_of_threads_is_told(teacher: Path, tmp_path: Path) -> None:
    given = ["method=ce", "threads=null", "epochs=2"]
    run = tmp_path / "run"
    process = go_on(run, *given, pause=Pause("vrm.engine.step:Step.__call__", 6))
    process.wait_for_pause()
    process.kill()
    process = go_on(run, threads=2)
    assert process.wait() == 0
    assert "threads was 1, is 2: the result may not be bitwise the same" in " ".join(process.text.split())


# ---- where the images lie --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of noise over a pattern of the class's own."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    patterns = draw.integers(0, 200, (3, 8, 8, 3))
    for split, count in (("train", 27), ("test", 9)):
        for number in range(count):
            file = root / split / "abc"[number % 3] / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = patterns[number % 3] + draw.integers(0, 56, (8, 8, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return root


def test_wherever_images_lie_and_whoever_decodes_them(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that changes when the run goes on."""
    monkeypatch.setenv("VRM_CACHE", str(tmp_path / "cache"))
    shared = [
        "method=ce",
        "views=2",
        "data=folder",
        f"data.root={pictures}",
        "data.views=cifar",
        "data.labels_per_class=9",
    ]

    def lying(placement: str, workers: int) -> list[str]:
        return [f"data.placement={placement}", f"data.workers={workers}"]

    train(small(tmp_path / "whole", *shared, *lying("device", 0)))
    moves = ((("device", 0), ("host", 0)), (("host", 0), ("device", 0)), (("stream", 0), ("stream", 2)))
    for number, (one, other) in enumerate(moves):
        run = tmp_path / f"moved {number}"
        interrupt(small(run, *shared, *lying(*one)), 5)
        runs.resume(run, lying(*other), console=QUIET, quiet=True)
        assert_same(tmp_path / "whole", run)
