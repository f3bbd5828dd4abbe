from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from vrm.cli import build, main
from vrm.models import create, save_weights


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the command line, run in this process."""
    monkeypatch.setattr(sys, "argv", ["vrm", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_verbs_and_flags_are_frozen() -> None:
    group = typer.main.get_command(build())
    found = {
        name: sorted(p.name for p in command.params if p.name != "help")
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert found == {
        "bench": ["recipe", "what", "words"],
        "data": ["recipe", "words"],
        "demo": ["words"],
        "distill": ["recipe", "words"],
        "doctor": ["target", "words"],
        "eval": ["recipe", "words"],
        "methods": ["name"],
        "models": ["classes", "name", "size"],
        "resume": ["run", "words"],
        "sweep": ["recipe", "words"],
        "train": ["recipe", "words"],
    }


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from vrm.cli import main; sys.argv = ['vrm', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'pydantic', 'sklearn'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *help_, imported = found.stdout.splitlines()
    assert imported == "set()"
    shown = " ".join(" ".join(help_).partition("Verbs:")[2].split())
    assert shown.startswith("demo Distil handwritten digits with several methods, as a first example that takes")
    assert "..." not in shown, "no sentence is cut"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill", "digit", "method=kd"], "did you mean 'digits'"),
        (["distill", "digits", "student=resnet8", "method=kd"], "needs a teacher"),
        (["distill", "digits", "student=resnet8", "method=kd", "teacher=resnet20"], "teacher=resnet20 has no weights"),
        (["distill", "digits", "student=resnet8", "method=kd", "teacher=no/where"], "no/where has no model.json"),
        (["distill", "digits", "student=resnet9", "method=ce"], "unknown network 'resnet9'; did you mean 'resnet"),
        (["distill", "digits", "method=ce"], "no network to train: give student=NAME"),
        (["train", "digits"], "no network to train: give model=NAME"),
        (["train", "digits", "model=resnet9"], "^vrm: model=resnet9: unknown network 'resnet9'"),
        (["train", "digits", "model=resnet8", "model.weights=w.pth"], "^vrm: model=resnet8: no weights at w.pth"),
        (["train", "digits", "model=resnet8", "method.weight=1"], "unknown key 'method.weight'"),
        (["train", "digits", "model=resnet8", "data.views=flip"], "data.views=flip"),
        (["train", "digits", "model=resnet8", "data=digitz"], "no data set 'digitz'; did you mean 'digits'"),
        (["train", "digits", "model=resnet8", "batch_size=1437"], "leave a last batch of one"),
        (["train", "digits", "model=resnet8", "precision=tf32", "device=cpu"], "tf32 is a mode of NVIDIA GPUs"),
        (["train", "digits", "model=resnet8", "data.root=."], "digits come with scikit-learn"),
        (["train", "cifar100", "model=resnet8"], "data=cifar100"),
        (["eval", "digits", "model=resnet8"], "model=resnet8 has no weights"),
        (["eval", "digits", "model=resnet8", "model.weights=nowhere.safetensors"], "nowhere.safetensors"),
        (["eval", "digits"], "no network to evaluate"),
        (["resume", "nowhere"], "nowhere is not a run folder"),
        (["methods", "vmr"], "unknown method 'vmr'; did you mean 'vrm'"),
        (["models", "resnet57"], "unknown network 'resnet57'"),
        (["demo", "seed=3"], "unknown key 'seed'.*did you mean 'seeds'"),
        (["demo", "seeds=0"], "seeds=0"),
    ],
)
def test_mistakes_end_with_one_paragraph(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    import re

    assert re.search(message, captured.err), captured.err
    assert list(tmp_path.iterdir()) == [], "a mistake must leave nothing behind"


def test_class_counts_must_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights = tmp_path / "w.safetensors"
    save_weights(create("resnet8", num_classes=7), weights)
    words = ["teacher=resnet8", f"teacher.weights={weights}", "student=resnet8", "method=kd"]
    assert run(monkeypatch, "distill", "digits", *words, f"run={tmp_path / 'r'}") == 2
    error = capsys.readouterr().err
    assert "7" in error
    assert "10" in error


def test_train_evaluate_and_use_as_teacher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    teacher, student = tmp_path / "t", tmp_path / "s"
    few = ["data.labels_per_class=10", "batch_size=10", "threads=1"]
    assert run(monkeypatch, "train", "digits", "model=resnet8", *few, "epochs=10", f"run={teacher}") == 0
    told = capsys.readouterr().out
    assert "last top-1" in told
    assert ", model=resnet8" in told
    assert "method: " not in told, "cross entropy has no options"
    assert "; 1 × 10 student passes of each image; " in told
    assert run(monkeypatch, "eval", "digits", f"model={teacher}/") == 0
    evaluated = capsys.readouterr().out
    words = ["student=resnet8", "method=kd", f"teacher={teacher}/", "steps=5"]
    assert run(monkeypatch, "distill", "digits", *words, *few, f"run={student}") == 0
    shown = capsys.readouterr().out
    measured = evaluated.split("top-1 ")[1].split(" %")[0]
    assert "settings from recipe digits: data=digits, epochs=40" in shown
    assert "no published value for this pair: kd, resnet8/resnet8 on digits" in shown
    assert "stopped after 5 of 400 steps" in shown
    assert " test images), 5 steps on the schedule of 40 epochs, " in shown
    assert "; 5 steps with 1 student pass of each of their images; " in shown
    assert run(monkeypatch, "resume", str(student)) == 0
    whole = [*words[:-1], *few, "epochs=1", f"run={tmp_path / 'w'}"]
    assert run(monkeypatch, "distill", "digits", *whole) == 0
    assert f"teacher resnet8: top-1 {measured} %" in capsys.readouterr().out


def test_a_weak_teacher_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights = tmp_path / "w.safetensors"
    save_weights(create("resnet8", num_classes=10), weights)
    words = ["distill", "digits", "student=resnet8", "method=kd", "teacher=resnet8", f"teacher.weights={weights}"]
    few = ["data.labels_per_class=2", "epochs=1"]
    assert run(monkeypatch, *words, *few, f"run={tmp_path / 'r'}") == 2
    assert "hardly above chance" in capsys.readouterr().err
    assert run(monkeypatch, *words, *few, "teacher.allow_weak=true", f"run={tmp_path / 'r2'}") == 0


def test_lists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "methods") == 0
    assert "kd" in capsys.readouterr().out
    assert run(monkeypatch, "models", "resnet20") == 0
    assert "278,324" in capsys.readouterr().out
    assert run(monkeypatch, "data", "digits") == 0
    assert "1,438" in capsys.readouterr().out


def test_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The demo, small: every setting in the table, a verdict, a report; a second call trains nothing anew."""
    from vrm.cli import demo

    monkeypatch.setattr(demo, "TEACHER", "resnet8")
    monkeypatch.setattr(demo, "TEACHER_EPOCHS", 4)
    words = [f"run={tmp_path / 'demo'}", "epochs=2", "seeds=1"]
    assert run(monkeypatch, "demo", *words) == 0
    shown = capsys.readouterr().out
    assert all(f" {label} " in shown for label in demo.SETTINGS)
    assert "VRM" in shown.split("ran on")[1]
    assert "<svg" in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert run(monkeypatch, "demo", *words) == 0
    again = capsys.readouterr().out
    assert "last top-1" not in again
    assert again.split("setting")[1] == shown.split("setting")[1]


def test_public_names_are_listed_and_loaded_when_asked_for() -> None:
    code = (
        "import sys, vrm; names = {*dir(vrm), *vrm.__all__}; loaded = 'torch' in sys.modules\n"
        "print(loaded, {'distill', '__version__'} <= names, vrm.__version__, vrm.distill.__module__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True", version("vrm"), "vrm.runs.api"]


@pytest.mark.parametrize(("words", "code"), [(["methods"], 0), (["methods", "krd"], 2)])
def test_a_process_that_met_others_ends_at_once(monkeypatch: pytest.MonkeyPatch, words: list[str], code: int) -> None:
    """Threads that outlive the interpreter could change its exit code."""
    from vrm.engine import distribution

    def leave(code: int | None) -> None:
        raise KeyboardInterrupt(code or 0)

    monkeypatch.setattr(distribution, "joined", lambda: True)
    monkeypatch.setattr(distribution, "leave", leave)
    monkeypatch.setattr(sys, "argv", ["vrm", *words])
    with pytest.raises(KeyboardInterrupt) as left:
        main()
    assert left.value.args == (code,)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_before_anything_is_imported_is_obeyed(name: str) -> None:
    """The entry of the command line sets its handlers before it imports the rest."""
    code = (
        "import os, signal, sys, types; from vrm.__main__ import main; sys.argv = ['vrm', 'train']\n"
        f"stop = lambda: os.kill(os.getpid(), signal.{name})\n"
        "sys.modules['vrm.cli'] = types.SimpleNamespace(main=stop); main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "vrm: stopped before the run began; the same command starts it\n")
