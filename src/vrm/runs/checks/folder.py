"""What ``vrm doctor`` looks at: a run that could be started, or the folder of one that was. It writes nothing there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from vrm.config import ConfigError, Run
from vrm.files import Damaged, Locked, locked
from vrm.models import Card
from vrm.models.weights import read_state, tensors_hash
from vrm.runs.assembly import Assembly, assemble, load_data
from vrm.runs.checkpoint import DamagedCheckpoint, list_checkpoints, read_checkpoint
from vrm.runs.checks.data import check_data
from vrm.runs.checks.start import check_start, open_teacher_cache
from vrm.runs.checks.table import Check, CheckReport, Result
from vrm.runs.environment import collect_facts
from vrm.runs.folder import CARD, changed_files, is_run, read_card, read_settings, read_teacher_record, require_run
from vrm.runs.logs import KEYS, check_mark, read_log
from vrm.runs.plan import Plan
from vrm.runs.resumption import Resumption, decide_resumption
from vrm.wording import counted

TEACHER_SAMPLE = 2000
"""Number of test images on which a teacher is measured that was not measured before, for an answer in seconds."""

OWN_MODULES = "python"
"""The recipe of runs that were started from Python, on networks and data that only the caller has."""


def examine_start(run: Run, *, console: Console) -> CheckReport:
    """Check a run that was not started yet."""
    started = time.perf_counter()
    checks, assembly, record = _assemble_and_check(run, None, console)
    if is_run(run.run):
        found = decide_resumption(run.run, run, None if assembly is None else collect_facts(assembly))
        checks.append(_resume_row(found, assembly))
    return CheckReport(f"{run.method['name']} in {run.run}", tuple(checks), time.perf_counter() - started, record)


def examine_run(path: Path, *, console: Console) -> CheckReport:
    """Check the folder of a run: its files, all that is checked before a run trains, and whether it can go on.

    Raise ``RunError`` if it is not the folder of a run.
    """
    started = time.perf_counter()
    require_run(path)
    try:
        run = read_settings(path)
    except (ConfigError, OSError) as error:
        failed = Check("settings", "fail", str(error), "restore it")
        return CheckReport(str(path), (failed,), time.perf_counter() - started)
    checkpoints, newest = check_checkpoints(path)
    checks = [check_lock(path), checkpoints]
    checks += [check_log(path / name, newest) for name in KEYS] + check_result(path) + check_files(path)
    record = None
    if run.recipe == OWN_MODULES:
        found = decide_resumption(path, run)
        text = "started from Python on networks and data of its own, which are not at hand here"
        checks.append(Check("networks", "note", f"{text}; the same call of distill() goes on with it and checks them"))
        checks.append(_resume_row(found, None, own_modules=True))
    else:
        rows, assembly, record = _assemble_and_check(run, read_teacher_record(path), console)
        found = decide_resumption(path, run, None if assembly is None else collect_facts(assembly))
        checks += [*rows, _resume_row(found, assembly)]
    return CheckReport(str(path), tuple(checks), time.perf_counter() - started, record)


def _assemble_and_check(
    run: Run, known: Mapping[str, Any] | None, console: Console
) -> tuple[list[Check], Assembly | None, dict[str, Any] | None]:
    """Put the run together and make the checks of a start; without an assembly, the rows up to what does not fit."""
    try:
        data = load_data(run.data, console)
    except ConfigError as error:
        return [Check("data", "fail", str(error))], None, None
    try:
        assembly = assemble(run, console=console, dataset=data)
    except ConfigError as error:
        return [*check_data(data), Check("settings", "fail", str(error))], None, None
    plan = Plan.of(run, assembly.method.phases, len(data.train))
    report = check_start(assembly, plan, run.run, known=known, sample=TEACHER_SAMPLE, console=console)
    return [*report.checks, *check_cache(assembly)], assembly, report.teacher


def check_cache(assembly: Assembly) -> list[Check]:
    """Check that the teacher's cache is this run's, and say how much of it is there; no row without one."""
    try:
        cache = open_teacher_cache(assembly)
    except ConfigError as error:
        return [Check("cache", "fail", str(error))]
    return [] if cache is None else [Check("cache", "ok", cache.describe())]


# ---- the files of a run ----------------------------------------------------------------------------------------------


def check_lock(path: Path) -> Check:
    """Check that no process is training in the folder."""
    lock = path / "lock"
    if lock.exists():
        try:
            with locked(lock, announce=False):
                pass
        except Locked as error:
            text = f"a process is training in this folder ({error})"
            return Check("lock", "fail", text, "wait for it, or stop it")
        except OSError as error:
            return Check("lock", "fail", f"{lock} cannot be read ({error.strerror})", "give run=ANOTHER_FOLDER")
    return Check("lock", "ok", "no process is training in this folder")


def check_checkpoints(path: Path) -> tuple[Check, Mapping[str, Any] | None]:
    """Say which checkpoints are whole; return the state of the newest that is."""
    whole, damaged, newest = [], [], None
    for folder in list_checkpoints(path / "checkpoints"):
        try:
            found = read_checkpoint(folder)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
            continue
        whole.append(folder.name)
        newest = newest or found.state
    left = [p.name for p in (path / "checkpoints").glob(".*")]
    text = f"{len(whole)} whole" + (f": {', '.join(whole)}" if whole else "")
    text += f"; half-written, passed over: {', '.join(left)}" if left else ""
    text += f"; {len(damaged)} damaged: {'; '.join(damaged)}" if damaged else ""
    if damaged and not whole:
        return Check("checkpoints", "fail", text, "restore one, or remove them all to start from step 0"), None
    return Check("checkpoints", "note" if damaged else "ok", text), newest


def check_log(path: Path, state: Mapping[str, Any] | None) -> Check:
    """Check that a log begins as the newest checkpoint knew it or, without one, that its lines are whole."""
    row = f"{path.stem} log"
    if state is None:
        try:
            return Check(row, "ok", f"{counted(len(read_log(path)), 'line')}, no checkpoint to compare them with")
        except Damaged as error:
            return Check(row, "fail", str(error), "restore the file")
    mark = state["logs"][path.name]
    if problem := check_mark(path, mark):
        return Check(row, "note", f"{problem}; resuming keeps it as it is")
    more = path.stat().st_size - mark["bytes"]
    text = "as the newest checkpoint knew it"
    return Check(row, "ok", text + (f"; resuming writes the {more:,} bytes after it again" if more else ""))


def check_files(path: Path) -> list[Check]:
    """Check that the files of a finished run are those it ended with; no row for another run."""
    if not (path / CARD).is_file():
        return []
    try:
        changed = list(changed_files(path))
    except Damaged as error:
        return [Check("files", "note", f"{error}: the other files cannot be compared with it")]
    if changed:
        return [Check("files", "note", "; ".join(changed))]
    return [Check("files", "ok", "all are as the run left them")]


def check_result(path: Path) -> list[Check]:
    """Check that the weights in the folder are whole, and the last ones those that its card describes."""
    checks = []
    fix = f"`vrm resume {path}` writes it again"
    for name in ("model.safetensors", "best.safetensors", "ema.safetensors"):
        expected = (read_card(path) or {}).get("weights_sha256") if name == "model.safetensors" else None
        file = path / name
        if not file.is_file():
            if expected is not None:
                checks.append(Check("weights", "fail", f"{file} is missing", fix))
            continue
        try:
            found = tensors_hash(read_state(file))
        except ValueError as error:
            checks.append(Check("weights", "fail", str(error), fix))
            continue
        if expected not in (None, found):
            text = f"{file} does not hold the weights that {path / CARD} describes: one of them was changed"
            checks.append(Check("weights", "fail", text, fix))
        else:
            checks.append(Check("weights", "ok", f"{name} is whole"))
    if (path / CARD).is_file():
        try:
            Card.read(path)
        except ValueError as error:
            checks.append(Check("card", "fail", str(error), fix))
    return checks


# ---- what resuming would do ------------------------------------------------------------------------------------------


def _resume_row(found: Resumption, assembly: Assembly | None, *, own_modules: bool = False) -> Check:
    """Say whether the run can go on, and from where."""
    if found.refusal:
        return Check("resume", "fail", found.refusal)
    notes = "".join(f"; {note}" for note in found.notes)
    result: Result = "note" if notes else "ok"
    if assembly is None and not own_modules:
        return Check("resume", "fail", f"{found.step:,} steps are done; what failed above stops the run{notes}")
    if assembly is None:
        return Check("resume", "note", f"{found.step:,} steps are done{notes}")
    plan = collect_facts(assembly).plan
    if found.card is not None:
        text = f"finished at step {plan.last_step:,}: resuming trains nothing, and writes the same result"
    elif found.step >= plan.last_step:
        text = f"trained to the end at step {found.step:,}: resuming trains nothing, and writes the result"
    elif found.checkpoint is None:
        text = f"starts from step 0 of {plan.last_step:,}"
    else:
        epoch = plan.epoch_at(found.step)
        text = f"goes on at step {found.step:,} of {plan.last_step:,}, in epoch {epoch} of {plan.num_epochs}"
        text += f", phase {plan.stretch_at(epoch).phase.name}" if len(plan.stretches) > 1 else ""
    return Check("resume", result, text + notes)
