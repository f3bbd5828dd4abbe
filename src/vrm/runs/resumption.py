"""Whether the run in a folder can go on, from where, and if not, why: asked by the trainer and by ``vrm doctor``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrm import config
from vrm.config import ConfigError, Run
from vrm.engine.distribution import World
from vrm.runs.checkpoint import Checkpoint, DamagedCheckpoint, list_checkpoints, read_checkpoint
from vrm.runs.environment import LAST_BITS, Facts
from vrm.runs.errors import RunError
from vrm.runs.folder import SETTINGS, is_run, read_card, require_run
from vrm.runs.logs import KEYS
from vrm.runs.plan import Plan


@dataclass(frozen=True)
class Resumption:
    """What going on with a run would do.

    ``checkpoint``: where it goes on, None from the start. ``card``: that of a finished run of as many steps.
    ``refusal``: why it cannot go on. ``notes``: what a user should know.
    """

    checkpoint: Checkpoint | None = None
    card: Mapping[str, Any] | None = None
    refusal: str = ""
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Number of steps done."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    def require(self) -> None:
        """Raise ``RunError`` if the run cannot go on."""
        if self.refusal:
            raise RunError(self.refusal)


def decide_resumption(path: Path, run: Run, facts: Facts | None = None) -> Resumption:
    """Decide whether ``run`` can go on in the folder ``path``, or start there if the folder is empty.

    Without ``facts``, which cannot be known if networks or data do not fit, what depends on them is not looked at.
    """
    if not is_run(path):
        return Resumption()
    try:
        require_run(path)
        stored = config.flat(config.restore(path / SETTINGS))
    except (RunError, ConfigError, OSError) as error:
        return Resumption(refusal=str(error))
    now = config.flat(run)
    if other := config.differing(stored, now):
        if "method.name" in other:  # then all options differ
            other = [key for key in other if not key.startswith("method.") or key == "method.name"]
        given = ", ".join(f"{key}={stored.get(key)} there and {now.get(key)} here" for key in other)
        return Resumption(
            refusal=f"{path} holds a run with other settings: {given}; give run=ANOTHER_FOLDER, or these settings"
        )
    if odd := [name for name in ("lock", *KEYS) if _is_no_file(path / name)]:
        return Resumption(refusal=f"{path / odd[0]} is no plain file, and is written to; remove it")
    checkpoint, damaged = newest_checkpoint(path / "checkpoints")
    notes = tuple(f"passed over a damaged checkpoint: {text}" for text in damaged)
    if checkpoint is None and damaged:
        return Resumption(refusal=f"no checkpoint of {path} can be used: {'; '.join(damaged)}")
    card = read_card(path)
    if checkpoint is None:
        if card is None or facts is None:
            return Resumption(card=card)
        if card.get("steps") == facts.plan.last_step:
            return Resumption(card=card)
        text = f"{path} ended after {card.get('steps')} steps and has no checkpoint to go on from"
        return Resumption(card=card, refusal=f"{text}; give run=ANOTHER_FOLDER")
    refusal = _check_settings(checkpoint, now, path / SETTINGS)
    if facts is not None and not refusal:
        refusal = _check_course(checkpoint, facts.plan) or _check_content(checkpoint, facts, path)
        notes += _compare_environment(checkpoint, facts)
        if card is not None and not card.get("steps") == checkpoint.step == facts.plan.last_step:
            card = None  # of another end, or steps of it are trained again
    return Resumption(checkpoint, card, refusal, notes)


def _is_no_file(path: Path) -> bool:
    """Return whether something other than a plain file lies at ``path``."""
    return path.is_symlink() or (path.exists() and not path.is_file())


def share_resumption(found: Resumption, world: World) -> Resumption:
    """Return what the main process has decided, in every process."""
    path = None if found.checkpoint is None else found.checkpoint.path
    path, card, refusal, notes = world.from_main((path, found.card, found.refusal, found.notes))
    if world.main:
        return found
    return Resumption(None if path is None else read_checkpoint(path), card, refusal, notes)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that is whole, and what is wrong with newer ones."""
    damaged: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return read_checkpoint(path), damaged
        except DamagedCheckpoint as error:
            damaged.append(str(error))
    return None, damaged


def _check_settings(checkpoint: Checkpoint, now: Mapping[str, Any], file: Path) -> str:
    then = checkpoint.state["settings"]
    if not (other := config.differing(then, now)):
        return ""
    there, here = (", ".join(f"{key}={side.get(key)}" for key in other) for side in (then, now))
    return (
        f"{checkpoint.path} was written with {there}, but {file} says {here}; put that back, or give "
        "run=ANOTHER_FOLDER for a run with other settings"
    )


def _check_course(checkpoint: Checkpoint, plan: Plan) -> str:
    if checkpoint.step > plan.last_step:
        return (
            f"{checkpoint.path} is {checkpoint.step:,} steps far, but the run would end after {plan.last_step:,}; give "
            "more steps, or run=ANOTHER_FOLDER"
        )
    phase = plan.phase_before(checkpoint.step).name
    if checkpoint.state["phase"] != phase:
        return f"{checkpoint.path} is in phase {checkpoint.state['phase']!r}, where this run is in phase {phase!r}"
    return ""


def _check_content(checkpoint: Checkpoint, facts: Facts, path: Path) -> str:
    for name, found in facts.hashes.items():
        then = checkpoint.state["hashes"].get(name)
        if then != found:
            hashes = f"hash {str(then)[:12]} then, {str(found)[:12]} now"
            text = f"{path}: the {name} changed since the run started ({hashes})"
            if name != "teacher":
                text += ", or moved between a stream and decoded images, whose pixels are not compared"
            return f"{text}; give the same {name} back, or start a new run"
    return ""


def _compare_environment(checkpoint: Checkpoint, facts: Facts) -> tuple[str, ...]:
    then, now = checkpoint.state["environment"], facts.environment
    return tuple(
        f"{key} was {then.get(key)}, is {now.get(key)}: the result may not be bitwise the same"
        for key in LAST_BITS
        if then.get(key) != now.get(key)
    )
