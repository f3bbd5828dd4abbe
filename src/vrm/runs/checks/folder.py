"""What ``vrm doctor`` looks at: a run that could be started, or the folder of one that was. It writes nothing there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vrm import config
from vrm.config import ConfigError, Run
from vrm.models.weights import read_tensors, tensors_hash
from vrm.runs.assembly import Assembly, assemble, load_data, read_card
from vrm.runs.checkpoint import MANIFEST, Damaged, DamagedCheckpoint, read_bytes, read_checkpoint, read_json
from vrm.runs.checks.start import (
    Check,
    Preflight,
    check_data,
    content_hashes,
    preflight,
    read_teacher_record,
    teacher_cache,
)
from vrm.runs.folder import RunError, environment
from vrm.runs.plan import Plan

TEACHER_SAMPLE = 2000
"""Test images on which a teacher that was not measured before is measured, for an answer in seconds."""

LOGS: Mapping[str, frozenset[str]] = {
    "metrics": frozenset({"step", "epoch", "split", "name", "value"}),
    "timings": frozenset({"step", "epoch", "images_per_second", "seconds"}),
}
"""The keys of each line."""

OWN_MODULES = "python"
"""The recipe of runs that were started from Python, on networks and data that only the caller has."""


def examine(run: Run, *, console: Console) -> Preflight:
    """Check a run that was not started yet."""
    started = time.perf_counter()
    checks = []
    if (run.run / "config.yaml").is_file():
        fix = f"`vrm resume {run.run}` goes on with it, or give run=ANOTHER_FOLDER"
        checks.append(Check("folder", "fail", f"{run.run} already holds a run", fix))
    return _report(f"{run.method['name']} in {run.run}", started, checks, _assembled(run, None, console))


def examine_run(path: Path, *, console: Console) -> Preflight:
    """Check the folder of a run: its files, what resuming would do, and all that is checked before a run trains.

    ``RunError`` if it is none.
    """
    started = time.perf_counter()
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path} is not a run folder (it has no config.yaml); give the folder of a run, like runs/NAME")
    title = str(path)
    try:
        run = config.restore(path / "config.yaml").model_copy(update={"run": path})
    except (ConfigError, OSError) as error:
        return _report(title, started, [Check("settings", "fail", f"config.yaml: {error}", "restore it")], None)
    found, state = check_checkpoints(path)
    checks = [check_settings(run, state), check_lock(path), found]
    checks += [check_log(path, name, state) for name in LOGS] + check_result(path) + check_files(path)
    if run.recipe == OWN_MODULES:
        text = "started from Python on networks and data of its own, which are not at hand here"
        checks.append(Check("networks", "note", f"{text}; the same call of distill() goes on with it and checks them"))
        return _report(title, started, checks, None)
    assembled = _assembled(run, read_teacher_record(path), console)
    if isinstance(assembled, tuple):
        assembly = assembled[0]
        checks += [check_same(assembly, state), check_resume(assembly, state, (path / "model.json").is_file())]
    return _report(title, started, checks, assembled)


Assembled = tuple[Assembly, Preflight] | list[Check]


def _assembled(run: Run, known: Mapping[str, Any] | None, console: Console) -> Assembled:
    """The run put together, with its preflight; or the rows up to what does not fit."""
    try:
        data = load_data(run.data, console)
    except ConfigError as error:
        return [Check("data", "fail", str(error))]
    try:
        assembly = assemble(run, console=console, dataset=data)
    except ConfigError as error:
        return [*check_data(data), Check("settings", "fail", str(error))]
    report = preflight(assembly, run.run, known=known, sample=TEACHER_SAMPLE)
    return assembly, replace(report, checks=(*report.checks, *check_cache(assembly)))


def check_cache(assembly: Assembly) -> list[Check]:
    """Whether the teacher's cache is this run's, and how much of it is there; no row without one."""
    try:
        cache = teacher_cache(assembly)
    except ConfigError as error:
        return [Check("cache", "fail", str(error))]
    return [] if cache is None else [Check("cache", "ok", cache.describe())]


def _report(title: str, started: float, checks: list[Check], assembled: Assembled | None) -> Preflight:
    found = assembled[1].checks if isinstance(assembled, tuple) else assembled or ()
    record = assembled[1].teacher if isinstance(assembled, tuple) else None
    return Preflight(title, (*checks, *found), time.perf_counter() - started, record)


# ---- the files of a run ----------------------------------------------------------------------------------------------


def check_settings(run: Run, state: Mapping[str, Any] | None) -> Check:
    """Whether the settings are those that the newest checkpoint was written under."""
    then, now = (state or {}).get("settings"), config.flat(run)
    if isinstance(then, dict) and (other := config.differing(then, now)):
        text = ", ".join(f"{key}={now.get(key)}, the newest checkpoint {key}={then.get(key)}" for key in other)
        return Check("settings", "fail", f"config.yaml says {text}", "put that back, or start a new run")
    return Check("settings", "ok", "config.yaml is whole")


def check_lock(path: Path) -> Check:
    """Whether a process is training in the folder."""
    try:
        with (path / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        pass
    except BlockingIOError:
        return Check("lock", "fail", "another process is training in this folder", "wait for it, or stop it")
    except OSError as error:
        return Check("lock", "fail", f"{path / 'lock'} cannot be read ({error.strerror})", "give run=ANOTHER_FOLDER")
    return Check("lock", "ok", "no process is training in this folder")


def check_checkpoints(path: Path) -> tuple[Check, dict[str, Any] | None]:
    """Which checkpoints are whole, and the state of the newest that is."""
    whole, damaged, newest = [], [], None
    for folder in sorted((p for p in (path / "checkpoints").glob("step-*") if p.is_dir()), reverse=True):
        try:
            _, state = read_checkpoint(folder)
            lacking = [key for key in ("hashes", "environment") if not isinstance(state.get(key), dict)]
            lacking += ["logs"] * any(_known_bytes(state, name) is None for name in LOGS)
            if lacking:
                raise DamagedCheckpoint(f"{folder / 'state.json'} lacks {', '.join(lacking)}")
        except DamagedCheckpoint as error:
            damaged.append(str(error))
            continue
        whole.append(folder.name)
        newest = newest or dict(state)
    left = [p.name for p in (path / "checkpoints").glob(".*")]
    text = f"{len(whole)} whole" + (f": {', '.join(whole)}" if whole else "")
    text += f"; half-written, passed over: {', '.join(left)}" if left else ""
    if damaged:
        text += f"; {len(damaged)} damaged: {'; '.join(damaged)}"
    if damaged and not whole:
        fix = "restore one of them, or remove them all to start from step 0"
        return Check("checkpoints", "fail", text, fix), None
    return Check("checkpoints", "note" if damaged else "ok", text), newest


def check_log(path: Path, name: str, state: Mapping[str, Any] | None) -> Check:
    """Whether a log reaches where the newest checkpoint knew it, in whole lines of growing steps."""
    file, row = path / f"{name}.jsonl", f"{name} log"
    known = (_known_bytes(state, name) or 0) if state is not None else 0
    content = file.read_bytes() if file.is_file() else b""
    fix = "restore the file, or remove the newest checkpoints"
    if len(content) < known:
        return Check(row, "fail", f"{file} has {len(content)} bytes, the newest checkpoint knew {known}", fix)
    kept, behind = content[:known], content[known:]
    lines, step = kept.split(b"\n"), 0
    if lines.pop():
        return Check(row, "fail", f"the newest checkpoint knew {file} up to the middle of a line", fix)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            good, step = LOGS[name] <= record.keys() and step <= record["step"], record["step"]
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            good = False
        if not good:
            return Check(row, "fail", f"line {number} of {file} is damaged or out of order", "restore the file")
    more = behind.count(b"\n")
    text = (
        f"{len(lines):,} lines up to the newest checkpoint" if state is not None else "no checkpoint to hold it against"
    )
    return Check(row, "ok", text + (f"; {more:,} more behind it, which resuming writes again" if more else ""))


def _known_bytes(state: Mapping[str, Any], name: str) -> int | None:
    """How long a log was when the checkpoint was written; ``None`` if its state does not tell."""
    try:
        found = state["logs"][name]["bytes"]
    except (KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def check_files(path: Path) -> list[Check]:
    """Whether the files of a finished run are those that it ended with; no row for another run."""
    if not (path / "model.json").is_file() or not (path / MANIFEST).exists():
        return []
    try:
        sums = read_json(path / MANIFEST).get("sha256")
    except Damaged as error:
        return [Check("files", "note", f"{error}: the other files cannot be held against it")]
    changed = []
    for name, expected in sorted(sums.items()) if isinstance(sums, dict) else ():
        try:
            found = hashlib.sha256(read_bytes(path / Path(name).name)).hexdigest()
        except Damaged as error:
            changed.append(str(error))
        else:
            changed += [f"{name} was changed"] * (found != expected)
    if changed:
        return [Check("files", "note", f"not as the run left them: {', '.join(changed)}")]
    return [Check("files", "ok", "all are as the run left them")]


def check_result(path: Path) -> list[Check]:
    """Whether the weights that lie in the folder are whole, and the last ones those that its card tells of."""
    checks = []
    fix = f"`vrm resume {path}` writes it again"
    for name in ("model.safetensors", "best.safetensors", "ema.safetensors"):
        expected = _recorded_hash(path) if name == "model.safetensors" else None
        file = path / name
        if not file.is_file():
            if expected is not None:
                checks.append(Check("weights", "fail", f"{file} is missing", fix))
            continue
        try:
            found = tensors_hash(read_tensors(file))
        except ValueError as error:
            checks.append(Check("weights", "fail", str(error), fix))
            continue
        if expected not in (None, found):
            text = f"{file} does not hold the weights that {path / 'model.json'} tells of: one of them was changed"
            checks.append(Check("weights", "fail", text, fix))
        else:
            checks.append(Check("weights", "ok", f"{name} is whole"))
    if (path / "model.json").is_file():
        try:
            read_card(path)
        except ValueError as error:
            checks.append(Check("card", "fail", str(error), fix))
    return checks


def _recorded_hash(path: Path) -> str | None:
    """The hash of the weights on the run's card, where it has one."""
    try:
        return str(json.loads((path / "model.json").read_text(encoding="utf-8"))["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


# ---- what resuming would do ------------------------------------------------------------------------------------------


def check_same(assembly: Assembly, state: Mapping[str, Any] | None) -> Check:
    """Whether data and teacher are those that the run was trained on, and the surroundings those of the checkpoint."""
    if state is None:
        return Check("same run", "ok", "no checkpoint to hold data and teacher against")
    then, now = state["hashes"], content_hashes(assembly)
    for name, value in now.items():
        if then.get(name) != value:
            hashes = f"hash {str(then.get(name))[:12]} then, {str(value)[:12]} now"
            text = f"the {name} changed since the run started ({hashes})"
            return Check("same run", "fail", text, f"give the same {name} back, or start a new run")
    surroundings = environment(assembly.device)
    other = [
        f"{key} was {state['environment'].get(key)}, is {surroundings[key]}"
        for key in ("threads", "torch", "device")
        if state["environment"].get(key) != surroundings[key]
    ]
    text = "data and teacher are those of the checkpoint"
    if other:
        return Check("same run", "note", f"{text}; {', '.join(other)}: the result may not be bitwise the same")
    return Check("same run", "ok", text)


def check_resume(assembly: Assembly, state: Mapping[str, Any] | None, finished: bool) -> Check:
    """Where resuming would go on."""
    run = assembly.run
    plan = Plan.of(run, assembly.method.phases, len(assembly.data.train))
    last = plan.last_step
    if state is None:
        return Check("resume", "ok", f"starts from step 0 of {last:,}")
    step = int(state["step"])
    if step >= last:
        done = "finished" if finished else "trained to the end"
        return Check("resume", "ok", f"{done} at step {step:,}: resuming trains nothing, and writes the same result")
    epoch = plan.epoch_at(step)
    text = f"goes on at step {step:,} of {last:,}, in epoch {epoch} of {plan.num_epochs}"
    phase = f", phase {plan.stretch_at(epoch).phase.name}" if len(plan.stretches) > 1 else ""
    return Check("resume", "ok", text + phase)
