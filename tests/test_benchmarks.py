"""The scripts that measure: an opponent that is held to the same losses, a page made of records, parts that go on."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.engine.test_cuda_graphs import Tape
from vrm import methods
from vrm.config import Run

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Imports a benchmark by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


# ---- VRM's loss ------------------------------------------------------------------------------------------------------


def test_the_loss_is_measured_as_a_recording(script: object, capsys: pytest.CaptureFixture[str]) -> None:
    module, recorder = script("relations"), Tape()  # type: ignore[operator]
    machine = module.Machine(torch.device("cpu"))
    rows = module.recorded([(8, 10), (4, 9000)], machine, 0.01, recorder, compile=False)
    assert [(row["B"], row["C"]) for row in rows] == [(8, 10)]  # no mixture of 9000 classes
    assert recorder.recordings == 1
    assert recorder.replays == rows[0]["recorded"]["repeats"] + 1  # and one for the peak of memory
    assert "whole loss by a graph: recorded" in capsys.readouterr().out


# ---- the usual loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kd", "vrm"])
def test_both_loops_train_and_have_the_same_losses(
    script: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    methods.load(method)
    module = script("reference_loop")  # type: ignore[operator]
    out = tmp_path / "found.json"
    words = ["pair=resnet8/resnet8", "batch_size=8", "threads=1", "samples=32"]
    sizes = ["--methods", method, "--steps", "1", "--rounds", "1", "--workers", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["reference_loop.py", *words, *sizes])
    assert module.main() == 0
    row = json.loads(out.read_text())["methods"][method]
    assert max(row["relative_differences"].values()) < 1e-5
    assert row["ratio"] == pytest.approx(row["our_images_per_second"] / row["usual_images_per_second"])
    other = {"kd": "kd.kd_weight=0.8", "vrm": "vrm.keep=0.5"}[method]
    monkeypatch.setattr(sys, "argv", ["reference_loop.py", *words, other, *sizes])
    assert module.main() == 1, "another objective is not the usual one"


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def page() -> ModuleType:
    """The script that fills the page's tables."""
    place = importlib.util.spec_from_file_location("page", BENCHMARKS.parent / "docs" / "performance.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def test_the_page_shows_the_records(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.RESULTS) == text, "run python docs/performance.py"


def test_what_was_not_measured_is_said_to_be_so(page: ModuleType, tmp_path: Path) -> None:
    text = page.filled(page.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert text.count("Not measured yet: `") == len(page.TABLES) - 1
    assert text.count("| not measured |") == len(page.goals(tmp_path)) - 3, "and every goal"
    with pytest.raises(ValueError, match="marks of 'goals' once"):
        page.filled("<!-- shares -->", tmp_path)


STEP = {
    "accumulate", "capture", "channels_last", "compile", "data.placement", "deterministic", "ema", "log_every", "nan",
    "optimizer", "precision", "teacher.cache", "threads",
}  # fmt: skip
"""The settings that decide what a step does, or how."""

OTHERS = {
    "batch_size", "checkpoint", "data", "device", "epochs", "method", "recipe", "run", "schedule", "seed", "steps",
    "student", "teacher", "tensorboard", "timeout", "views",
}  # fmt: skip
"""The settings that decide what a step works on, or nothing about it."""


def test_every_option_of_a_step_has_its_reason(page: ModuleType) -> None:
    """In the table of options; and what an option costs is measured on a GPU."""
    assert set(Run.model_fields) == {name for name in STEP if "." not in name} | OTHERS
    rows = [line.partition("|")[2].partition("|")[0] for line in page.PAGE.read_text(encoding="utf-8").splitlines()]
    described = {name for row in rows for name in re.findall(r"`([a-z_.]+)[`=]", row)}
    assert described >= STEP
    script = (BENCHMARKS / "gpu.sh").read_text(encoding="utf-8")
    measured = {name for name in STEP if re.search(rf"[\[,=]{re.escape(name)}=", script)}
    assert measured | {"teacher.cache"} == STEP - {"log_every", "nan", "optimizer", "threads"}
    assert "teacher_cache.py" in script


def test_goals_are_met_or_not_measured(page: ModuleType, tmp_path: Path) -> None:
    """What a goal asks for is read from the records of the very thing."""

    def told() -> dict[str, str]:
        lines = page.goals(tmp_path / "benchmarks" / "results")[2:-1]
        return {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[-1].removesuffix(" |") for line in lines}

    assert set(told().values()) == {"not measured"}
    gpu = tmp_path / "benchmarks" / "results" / "nvidia-h100"
    run = gpu / "vrm-bfloat16-0"
    run.mkdir(parents=True)
    card = {"seconds": 570.0, "epochs": 240.0, "device": "NVIDIA H100"}
    (run / "model.json").write_text(json.dumps(card))
    (gpu / "accuracy.txt").write_text("a table")

    def record(device: str, precision: str, *more: tuple[str, str, float]) -> dict[str, object]:
        rows = [
            {"name": name, "method": name, "change": change, "batch_size": 64, "precision": precision, "median_ms": ms,
             "over_bare_networks": 1.01}
            for name, change, ms in (("kd", None, 1.5), ("vrm", None, 2.75), ("vrm", "naive", 2.5), *more)
        ]  # fmt: skip
        return {
            "pair": "resnet32x4/resnet8x4", "rows": rows, "environment": {"device": device}, "load_average": [0.1],
        }  # fmt: skip

    (gpu / "step-bfloat16.json").write_text(json.dumps(record("NVIDIA H100", "bfloat16")))
    (gpu / "step-float32.json").write_text(json.dumps(record("NVIDIA H100", "float32")))
    cpu = gpu.parent / "cpu"
    cpu.mkdir()
    (cpu / "step-float32.json").write_text(json.dumps(record("cpu (x86_64, 1 thread)", "float32")))
    found = told()
    assert found["a step of VRM on a GPU (H100), bfloat16 or TF32"] == "2.75 ms, bfloat16, NVIDIA H100"
    assert found["a step of KD there"] == "1.50 ms, bfloat16, NVIDIA H100"
    assert found["240 epochs of VRM there, evaluation included"] == "9.5 minutes, NVIDIA H100 (`vrm-bfloat16-0`)"
    assert found["a step on a CPU over the bare networks' passes"] == "kd 1.010 (load 0.1), vrm 1.010 (load 0.1)"
    assert found["accuracy in bfloat16 and TF32 against float32"] == "`benchmarks/results/nvidia-h100/accuracy.txt`"
    assert found["views on a GPU"] == "not measured"
    both = ("vrm", "compile=true+channels_last=true", 2.0)
    compiled = record("NVIDIA H100", "bfloat16", ("vrm", "compile=true", 2.25), ("vrm", "accumulate=2", 1.0), both)
    (gpu / "step-compile.json").write_text(json.dumps(compiled))
    fastest = told()["a step of VRM on a GPU (H100), bfloat16 or TF32"]
    assert fastest == "2.00 ms, bfloat16, compile=true+channels_last=true, NVIDIA H100"


# ---- all of it on a GPU ----------------------------------------------------------------------------------------------

STUB = r"""
import json, os, sys, time
from pathlib import Path
words = sys.argv[1:]
log = Path(os.environ["STUB_LOG"])
if words[0] == "-c" and "device_name" in words[1]:
    print("a-gpu")
elif words[0] == "-c" and "median_ms" in words[1]:
    sys.argv = words[1:]
    exec(words[1])
elif words[0] == "-":
    sys.stdin.read()
    Path(words[1], "accuracy.txt").write_text("a table")
else:
    log.open("a").write(" ".join(word for word in words if "\n" not in word) + "\n")
    if os.environ.get("STUB_FAIL", "nothing") in " ".join(words):
        sys.exit(3)
    if os.environ.get("STUB_SLOW", "nothing") in " ".join(words):
        time.sleep(60)
    for before, word in zip(words, words[1:]):
        if before == "--out": Path(word).write_text("{}")
    for word in words:
        if word.startswith("out="): Path(word[4:]).write_text("{}")
        if word.startswith("run=") or before == "resume":
            folder = Path(word.removeprefix("run="))
            if word.startswith("run="): folder.mkdir(parents=True, exist_ok=True)
    if "resume" in words or any(word.startswith("run=") for word in words):
        folder = Path(words[-1].removeprefix("run="))
        (folder / "config.yaml").write_text("")
        if os.environ.get("STUB_STOP", "nothing") in str(folder) and "resume" not in words:
            sys.exit(75)
        (folder / "model.json").write_text("{}")
"""


class Script:
    """``gpu.sh`` with a Python that only pretends."""

    def __init__(self, folder: Path, path: Path = BENCHMARKS / "gpu.sh") -> None:
        self.folder, self.path = folder, path
        stub = folder / "python"
        stub.write_text(f"#!{sys.executable}\n{STUB}")
        stub.chmod(0o755)
        self.log = folder / "log"

    def call(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One call."""
        self.log.write_text("")
        names = {"PYTHON": self.folder / "python", "RESULTS": self.folder / "results", "RUNS": self.folder / "runs"}
        more = {name: str(path) for name, path in names.items()} | {"STUB_LOG": str(self.log)} | environment
        return subprocess.run(["bash", str(self.path), *words], env=os.environ | more, capture_output=True, text=True)

    @property
    def commands(self) -> list[str]:
        """What the last call ran."""
        return self.log.read_text().splitlines()

    @property
    def results(self) -> set[str]:
        """What has been made."""
        return {path.name for path in (self.folder / "results" / "a-gpu").iterdir()}


needs_bash = pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash")


@needs_bash
def test_a_gpu_is_measured_in_parts_that_go_on(tmp_path: Path) -> None:
    gpu = Script(tmp_path)
    stopped = gpu.call("device=cpu", STUB_FAIL="reference_loop", STUB_STOP="vrm-float32-0")
    assert stopped.returncode == 75
    assert "reference_loop-float32.json failed (exit code 3)" in stopped.stderr
    assert "call again to go on" in stopped.stdout
    assert "bench step" in gpu.commands[0], "what matters most comes first"
    assert {"relations.json", "views.json", "step-bfloat16.json", "step-options.json", "teacher"} <= gpu.results
    assert not any("reference" in name or name == "vrm-float32-0" for name in gpu.results)

    failed = gpu.call("device=cpu")
    assert failed.returncode == 1
    assert "but what failed: reference_loop-bfloat16.json.log reference_loop-float32.json.log" in failed.stderr
    assert "resume" in gpu.commands[0]
    assert len(gpu.commands) == 4, "a run to end, and three more"
    assert {"vrm-float32-0", "vrm-bfloat16-0", "kd-float32-0", "kd-bfloat16-0", "accuracy.txt"} <= gpu.results

    shutil.rmtree(tmp_path / "results" / "a-gpu" / "failed")
    assert gpu.call("device=cpu").returncode == 0
    assert len(gpu.commands) == 2, "what is there is not made again"
    assert "reference_loop-float32.json" in gpu.results
    assert gpu.call("device=cpu").returncode == 0
    assert gpu.commands == []


@needs_bash
def test_a_measurement_that_takes_too_long_is_cut_and_made_anew(tmp_path: Path) -> None:
    """Cut by the end of a part at first; then, the first of its part, it is known to take longer than one."""
    text = (BENCHMARKS / "gpu.sh").read_text()
    assert text.count("part_minutes * 60") == 2
    script, results = tmp_path / "repository" / "benchmarks" / "gpu.sh", tmp_path / "results" / "a-gpu"
    script.parent.mkdir(parents=True)
    script.write_text(text.replace("part_minutes * 60", "part_minutes * 3").replace("patience=10", "patience=0"))
    results.mkdir(parents=True)
    for name in ("step-float32.json", "step-bfloat16.json", "step-options.json"):
        (results / name).write_text("{}")
    gpu = Script(tmp_path, script)
    cut = gpu.call("device=cpu", "part_minutes=1", STUB_SLOW="relations.py")
    assert cut.returncode == 75
    assert "time is up before the end of relations.json" in cut.stdout
    assert {"views.json"} <= gpu.results
    assert "failed" not in gpu.results
    again = gpu.call("device=cpu", "part_minutes=1", STUB_SLOW="relations.py")
    assert "relations.json failed (it takes longer than a part of 1 minutes)" in again.stderr
    assert [path.name for path in (results / "failed").iterdir()] == ["relations.json.log"]


@needs_bash
@pytest.mark.parametrize("together", [2.4, 2.6])
def test_training_on_a_gpu_waits_for_data_and_takes_a_teacher(tmp_path: Path, together: float) -> None:
    gpu = Script(tmp_path)
    (tmp_path / "results" / "a-gpu").mkdir(parents=True)
    for name in ("tests-training.xml", "tests-others.xml"):
        (tmp_path / "results" / "a-gpu" / name).write_text("passed")
    done = gpu.call("part_minutes=90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on with data=FOLDER" in done.stdout
    assert sum("bench step cifar100" in command for command in gpu.commands) == 8
    assert all("out=" in command for command in gpu.commands if "bench step" in command)
    assert not any("distill" in command for command in gpu.commands)
    compiled = [("vrm", "compile=true", 2.5), ("vrm", "compile=true+channels_last=true", together)]
    measured = {
        "step-bfloat16": [("vrm", None, 3.0)],
        "step-options": [("vrm", None, 3.1), ("vrm", "channels_last=true", 2.9), ("vrm", "capture=off", 0.1)],
        "step-compile": [("vrm", None, 3.2), *compiled, ("kd", "compile=true", 0.1)],
    }
    for name, rows in measured.items():
        told = [{"method": method, "change": change, "median_ms": ms} for method, change, ms in rows]
        (tmp_path / "results" / "a-gpu" / f"{name}.json").write_text(json.dumps({"rows": told}))
    done = gpu.call("part_minutes=90", "data=/c100", "teacher=t.pth", "seeds=2")
    assert done.returncode == 0, done.stdout + done.stderr
    trained = [command for command in gpu.commands if " distill " in command]
    assert len(trained) == 12, "two methods, three precisions, two seeds"
    assert all("data.root=/c100" in command and "teacher.weights=t.pth" in command for command in trained)
    assert all(" compile=true " in command for command in trained), "fastest in the records"
    assert all(("channels_last=true" in command) == (together < 2.5) for command in trained)
    assert not any("capture" in command for command in trained)
    assert not any(" train " in command for command in gpu.commands)


@needs_bash
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["part=3"], 2, "unknown word part=3; known: part_minutes="),
        (["part_minutes=half"], 2, "part_minutes and seeds are whole numbers"),
        (["device=tpu"], 2, "device=tpu: give cuda or cpu"),
        (["part_minutes=1"], 2, "wants 120 seconds: give part_minutes=3 or more"),
    ],
)
def test_words_that_the_script_does_not_take(tmp_path: Path, words: list[str], code: int, message: str) -> None:
    done = Script(tmp_path).call(*words)
    assert done.returncode == code
    assert message in done.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reference_loop", ["--steps", "0"]),
        ("relations", ["--threads", "0"]),
        ("teacher_cache", ["--epochs", "1"]),
        ("throughput", ["--workers", "-1"]),
        ("views", ["--images", "0"]),
    ],
)
def test_numbers_that_measure_nothing_are_refused(
    script: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    words: list[str],
) -> None:
    module = script(name)  # type: ignore[operator]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert f"argument {words[-2]}: give a whole number from" in capsys.readouterr().err
