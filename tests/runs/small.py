"""A run that takes a second: thirty digits, two epochs, a small network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from vrm import methods
from vrm.config import Resolved, resolve
from vrm.runs import api as runs
from vrm.runs.assembly import Assembly, assemble
from vrm.runs.environment import collect_facts
from vrm.runs.errors import Preempted
from vrm.runs.folder import RunFolder, open_folder
from vrm.runs.resumption import decide_resumption
from vrm.runs.trainer import Trainer

SMALL = ("student=resnet8", "data.labels_per_class=3", "epochs=2", "batch_size=8", "threads=1", "log_every=2")
QUIET = Console(quiet=True)
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "ab": ("method.pretrain_epochs=1",),
    "crd": ("method.num_negatives=8", "method.embed_dim=6"),
    "fsp": ("method.pretrain_epochs=1",),
}
"""What makes a method small enough for thirty images."""


STATE: Mapping[str, Any] = {
    "step": 0,
    "phase": "main",
    "meter": [],
    "rate_scale": 1.0,
    **{key: {} for key in ("best", "last", "seconds", "hashes", "environment", "settings", "logs")},
}
"""The plain values of a checkpoint of nothing."""


def small(run: Path, *words: str) -> Resolved:
    """Settings of a small run; ``words`` win."""
    given = {word.partition("=")[0] for word in words}
    return resolve("distill", "digits", [w for w in SMALL if w.partition("=")[0] not in given] + [*words, f"run={run}"])


def words_of(method: str, *teacher: str) -> list[str]:
    """The words for a method that is small enough for thirty images; those for a teacher only if it learns from one."""
    own = teacher if methods.load(method)().needs.teacher else ()
    return [f"method={method}", *own, *OPTIONS.get(method, ())]


def make_teacher(folder: Path) -> Path:
    """A run folder with a teacher that is better than chance."""
    words = ["model=resnet8", "data.labels_per_class=10", "epochs=12", "batch_size=10", "threads=1", f"run={folder}"]
    runs.start(resolve("train", "digits", words), console=QUIET, quiet=True)
    return folder


def train(resolved: Resolved) -> dict[str, Any]:
    """Run to the end."""
    return runs.start(resolved, console=QUIET, quiet=True)


def interrupt(resolved: Resolved, step: int) -> None:
    """Run until ``step`` and stop as a signal would."""
    run = resolved.run
    folder = open_folder(run.run, print)
    folder.write_settings(resolved)
    trainer = make_trainer(assemble(run), folder)
    original = trainer._set_rate

    def stop_there(*arguments: Any) -> None:
        original(*arguments)
        trainer.stopping = trainer.state.step + 1 >= step

    trainer._set_rate = stop_there
    try:
        go_on(trainer)
    except Preempted:
        pass
    else:
        raise AssertionError("the run ended before it could be stopped")
    finally:
        folder.close()


@contextmanager
def opened(assembly: Assembly, *, console: Console = QUIET) -> Iterator[Trainer]:
    """A trainer with its folder open, for :func:`go_on`."""
    folder = open_folder(assembly.run.run, print)
    try:
        folder.write_settings(Resolved(assembly.run, {}))
        yield Trainer(assembly, collect_facts(assembly), folder, console=console, quiet=console is QUIET)
    finally:
        folder.close()


def make_trainer(assembly: Assembly, folder: RunFolder | None = None) -> Trainer:
    """A quiet trainer, which writes in ``folder`` if there is one."""
    return Trainer(assembly, collect_facts(assembly), folder, console=QUIET, quiet=True)


def go_on(trainer: Trainer) -> dict[str, Any]:
    """Train from where the trainer's folder stands to the end."""
    found = decide_resumption(trainer.run.run, trainer.run, trainer.facts)
    found.require()
    return trainer.train(found)


def outcome(run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """What must be bitwise the same after a resume: last weights, best weights, metrics."""
    return (
        load_file(run / "model.safetensors"),
        load_file(run / "best.safetensors"),
        (run / "metrics.jsonl").read_text(),
    )


def final_state(run: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint: student, method, optimiser."""
    newest = max((run / "checkpoints").glob("step-*"))
    return load_file(newest / "tensors.safetensors")


def assert_same(one: Path, other: Path) -> None:
    """The two runs ended bitwise the same."""
    pairs = [*zip(outcome(one), outcome(other), strict=True), (final_state(one), final_state(other))]
    for a, b in pairs:
        if isinstance(a, str):
            assert a == b
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def command(*words: str) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    code = "from vrm.cli import main; main()"
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, *words], stdout=pipe, stderr=pipe, text=True)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
