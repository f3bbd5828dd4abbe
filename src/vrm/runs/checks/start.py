"""What is checked before a run trains: data, networks, teacher, one step of every phase, room on the disk.

Nothing that is checked is changed: parameters, buffers, attributes and random generators are afterwards what they were,
so that a run is bitwise the same with and without the checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vrm import config
from vrm.config.schema import PYTHON
from vrm.config.words import in_python
from vrm.contract import DataInfo
from vrm.data import BadData
from vrm.engine.distribution import ALONE, World
from vrm.engine.teacher_cache import TeacherCache, cache_key, check_method
from vrm.models import NetworkError
from vrm.runs.assembly import Assembly
from vrm.runs.checks.data import check_batches, check_data, check_networks
from vrm.runs.checks.rehearsal import rehearse
from vrm.runs.checks.room import check_disk, check_folder, check_memory
from vrm.runs.checks.student import check_student
from vrm.runs.checks.table import Check, CheckReport
from vrm.runs.checks.teacher import check_teacher, measure_teacher, teacher_key
from vrm.runs.display import Display
from vrm.runs.plan import Plan
from vrm.wording import counted


def check_start(
    assembly: Assembly,
    plan: Plan,
    path: Path,
    *,
    console: Console,
    known: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
    sample: int | None = None,
    world: World = ALONE,
    quiet: bool = False,
) -> CheckReport:
    """Check a run that is about to train in the folder ``path``; change nothing in networks and random generators.

    Args:
        assembly: The run.
        plan: Its course.
        path: Its folder, which need not exist yet.
        console: Shows how far the measuring of the teacher is.
        known: The content of an earlier ``teacher.json``; the teacher is not measured again if it belongs to the same
            teacher on the same images, and to as many of them.
        keep: Given what was measured of the teacher, as soon as it is.
        sample: Measure the teacher on so many test images at most; by default on those of ``plan.test_sample``.
        world: The processes of the run. Each checks its own part; a failure of one is a failure of all.
        quiet: Show nothing.
    """
    started = time.perf_counter()
    checks = [*check_data(assembly.data), check_batches(assembly, plan, world), *_check_sample(assembly, plan)]
    checks.append(check_networks(assembly))
    if all(check.result != "fail" for check in checks):
        try:
            checks += check_student(assembly)
        except NetworkError as error:
            checks.append(Check("student", "fail", f"student {error}", "give another student, or mend this one"))
    record = None
    if assembly.teacher is not None:
        try:
            record = _known_or_measured(assembly, plan, known, sample, world, console, quiet)
            if record != known and sample is None:
                keep(record)
            checks += check_teacher(assembly, record)
        except BadData as error:
            if world.size > 1:  # the others are in the middle of the evaluation
                raise
            checks.append(Check("test data", "fail", str(error)))
        except NetworkError as error:
            if world.size > 1:
                raise
            checks.append(Check("teacher", "fail", f"teacher {error}", "give another teacher, or mend this one"))
    title = "trying one step" + " of each phase" * (len(plan.stretches) > 1)
    with Display(
        console, title=title, total=2 * len(plan.stretches), unit="batches", announce=True, quiet=quiet
    ) as bar:
        tried = rehearse(assembly, plan, world, on_batch=bar.step)
    checks += tried.checks
    if assembly.device.type == "cuda":
        checks.append(check_memory(assembly, tried))
    if world.main:
        checks.append(check_folder(path))
        checks.append(check_disk(assembly, plan, path, tried.optimizer_bytes))
    failures = [check.text for check in checks if check.result == "fail"]
    for rank, texts in enumerate(world.gather(failures)):
        if texts and rank != world.rank:
            checks.append(Check("processes", "fail", f"process {rank}: {'; '.join(texts)}"))
    if assembly.run.recipe == PYTHON:
        checks = [replace(check, detail=in_python(check.detail), fix=in_python(check.fix)) for check in checks]
    name = f"{assembly.run.method['name']} in {path}"
    return CheckReport(name, tuple(checks), time.perf_counter() - started, record)


def _check_sample(assembly: Assembly, plan: Plan) -> list[Check]:
    """Say which part of the test images measures a run that is stopped early; no row for one that uses all."""
    whole = len(assembly.data.test)
    if (count := plan.test_sample(whole)) is None:
        return []
    text = f"{count:,} of {whole:,} measure the networks, as the run has {counted(plan.last_step, 'step')}"
    return [Check("test images", "note", f"{text}; without steps= all of them do")]


def _known_or_measured(
    assembly: Assembly,
    plan: Plan,
    known: Mapping[str, Any] | None,
    sample: int | None,
    world: World,
    console: Console,
    quiet: bool,
) -> dict[str, Any]:
    """Return what is known of this teacher on these images, or measure it, showing how far that is."""
    whole = len(assembly.data.test)
    of_plan = plan.test_sample(whole)
    count = min(sample or whole, of_plan or whole)
    if known is not None and known.get("key") == teacher_key(assembly) and known["images"] >= count:
        return dict(known)
    title = "measuring the teacher on " + (f"{count:,} of " if count < whole else "") + counted(whole, "test image")
    if count == of_plan:
        title += f", as the run has {counted(plan.last_step, 'step')}"
    with Display(console, title=title, total=count, announce=True, quiet=quiet) as bar:
        return measure_teacher(
            assembly, sample=count, on_batch=lambda images: bar.step(images * world.size), world=world
        )


def open_teacher_cache(assembly: Assembly, world: World = ALONE) -> TeacherCache | None:
    """Return the cache that ``teacher.cache`` names, or None without one.

    Raise ``ConfigError`` if the method reads more than logits, or if the cache was made with other settings.
    """
    run, train, teacher, card = assembly.run, assembly.data.train, assembly.teacher, assembly.teacher_card
    if run.teacher is None or run.teacher.cache is None or teacher is None or card is None or assembly.probes is None:
        return None
    data = DataInfo(len(train), train.num_classes, run.batch_size, train.targets)
    check_method(config.build_method(run.method), *assembly.probes, data)
    key = cache_key(
        run,
        teacher,
        architecture=card.architecture,
        policy=assembly.policy,
        data_hash=train.hash,
        device=assembly.device,
        processes=world.size,
    )
    return TeacherCache(
        run.teacher.cache,
        key,
        num_samples=len(train),
        num_classes=train.num_classes,
        num_views=assembly.num_views,
        precision=run.teacher.cache_precision,
        device=assembly.device,
        world=world,
    )
