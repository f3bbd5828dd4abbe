"""The time of one step: the very step that training takes, on batches that are ready, beside the networks alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count, pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vrm import methods
from vrm.bench.naive_vrm import NaiveVRM, measure_disagreement
from vrm.bench.step_profile import profile_step
from vrm.bench.subjects import NAIVE, Subject
from vrm.config import ConfigError, Run
from vrm.contract import Batch, Phase, Progress, Views
from vrm.data import DataSet, epoch_batches
from vrm.engine.cuda_graphs import WARMUP, CudaGraphRecorder, RecordedFunction, Recorder
from vrm.engine.process_state import flags_restored, set_flags
from vrm.engine.step import Step
from vrm.runs.assembly import Assembly, assemble
from vrm.runs.phase import build_step, freeze_for, why_eager
from vrm.runs.plan import Plan
from vrm.runs.state import TrainingState
from vrm.wording import counted

EAGER_STEPS, PROFILED_STEPS = 2, 2
"""Steps before anything is measured, and steps that are profiled."""

NUM_BATCHES = 8
"""How many different batches the steps go through, again and again."""

AGREEMENT = 1e-6
"""The largest relative difference allowed between the losses of VRM's two forms, in float64."""

Call = Callable[[int], None]
"""Takes one step, by its number."""


class BareNetworks:
    """The networks' passes alone, which no step can do without, in its precision and phase.

    They are the teacher's forward and the student's forward and backward pass on every view, on inputs that are ready.
    """

    def __init__(self, assembly: Assembly, views: Sequence[Tensor], autocast: AbstractContextManager[object]) -> None:
        """Take the uint8 views that a step makes."""
        student, teacher = assembly.distiller.student, assembly.teacher
        self.autocast, self.student = autocast, student.network
        self.teacher = None if teacher is None else teacher.teacher.network
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        layout = torch.channels_last if assembly.run.channels_last else torch.contiguous_format

        def inputs(preprocess: nn.Module | None) -> list[Tensor]:
            images = views if preprocess is None else [preprocess(view) for view in views]
            return [view.contiguous(memory_format=layout) for view in images]

        self.student_views = inputs(student.preprocess)
        self.teacher_views = [] if teacher is None else inputs(teacher.teacher.preprocess)

    def __call__(self) -> None:
        """Run every pass on every view."""
        with self.autocast:
            if self.teacher is not None:
                with torch.no_grad():
                    for view in self.teacher_views:
                        self.teacher(view)
            logits = [self.student(view) for view in self.student_views]
        if self.parameters:
            torch.autograd.grad(logits, self.parameters, [torch.ones_like(z) for z in logits], allow_unused=True)


def time_calls(call: Callable[[], None], device: torch.device, *, times: int) -> list[float]:
    """Return the milliseconds of each of ``times`` calls in a row; on CUDA between events, read at the end."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(times):
            call()
            marks.append(time.perf_counter())
        return [1e3 * (after - before) for before, after in pairwise(marks)]
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in pairwise(events)]


@dataclass
class Timings:
    """The milliseconds of a call, round by round."""

    call: Call
    run: Run
    rounds: list[list[float]] = field(default_factory=list)

    def add_round(self, device: torch.device, *, steps: int, warmup: int) -> None:
        """Call ``warmup`` times untimed, then ``steps`` times timed."""
        numbers = count()
        with flags_restored():
            set_flags(self.run, device)
            for _ in range(warmup):
                self.call(next(numbers))
            self.rounds.append(time_calls(lambda: self.call(next(numbers)), device, times=steps))

    @property
    def all(self) -> list[float]:
        """The milliseconds of all rounds."""
        return [value for values in self.rounds for value in values]

    def over(self, other: Timings | None) -> float | None:
        """Return how many times as long as the other a call takes: the median over rounds of the ratio of medians."""
        if other is None:
            return None
        return median(median(mine) / median(its) for mine, its in zip(self.rounds, other.rounds, strict=True))


@dataclass
class Prepared:
    """A subject whose step is built, profiled and, where training records it, recorded."""

    subject: Subject
    timings: Timings
    bare: Timings | None
    step: Step
    phase: Phase
    eager_because: str | None
    """Why the step is not recorded; None if it is."""
    shares: dict[str, float]
    launches: int | None
    peak: int | None
    disagreement: float | None
    """The relative difference of the losses of VRM's two forms, for the naive one."""


BareTimings = dict[tuple[object, ...], Timings]
"""Bare networks by everything that they depend on: methods with the same passes share one."""


def prepare_subject(
    subject: Subject,
    dataset: DataSet,
    *,
    recorder: Recorder | None = None,
    bare_timings: BareTimings | None = None,
    profiled: int = PROFILED_STEPS,
) -> Prepared:
    """Build a subject's step, take some eager steps, profile it, and record it where training would.

    Args:
        subject: A method with settings; its teacher has weights.
        dataset: The images, where the steps will read them.
        recorder: Records CUDA graphs. All subjects may share one, and its memory, as no two run at once.
        bare_timings: Gains the bare networks of this subject; None leaves them out.
        profiled: Number of steps to profile.
    """
    cuda = dataset.train.targets.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    with flags_restored():
        assembly = assemble(subject.run, dataset=dataset)
        device = assembly.device
        step = build_step_of_phase(assembly, subject.phase)
        eager_because = why_eager(assembly)
        disagreement = use_naive_form(assembly, step) if subject.change == NAIVE else None
        batches = whole_batches(assembly)

        def eager(number: int) -> None:
            step(*batches[number % len(batches)])

        for number in range(EAGER_STEPS):
            eager(number)
        peak = None
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
            eager(0)
            peak = torch.cuda.max_memory_allocated(device) - before
        shares, launches = profile_step(eager, device, repeats=profiled) if profiled else ({}, None)

        recorder = (recorder or CudaGraphRecorder(device)) if eager_because is None else None
        timings = Timings(eager, subject.run)
        if recorder is not None:
            recorded = RecordedFunction(step, recorder)
            timings.call = lambda number: recorded(*batches[number % len(batches)])
            for number in range(WARMUP + 1):
                timings.call(number)
        bare = None
        if bare_timings is not None:
            change = subject.change if subject.change.partition(".")[0] not in methods.names() else ""
            views = step.views(*batches[0])
            key = (len(views), assembly.teacher is None, step.phase.trained, eager_because, change)
            if key not in bare_timings:
                bare_timings[key] = _prepare_bare(BareNetworks(assembly, views, step.autocast), subject.run, recorder)
            bare = bare_timings[key]
    return Prepared(subject, timings, bare, step, step.phase, eager_because, shares, launches, peak, disagreement)


def build_step_of_phase(assembly: Assembly, position: int = 0) -> Step:
    """Return the step that training takes in a phase, ready for an epoch whose views are those of the first."""
    plan = Plan.of(assembly.run, assembly.method.phases, len(assembly.data.train))
    stretch = plan.stretches[position]
    freeze_for(assembly, stretch)
    step = build_step(assembly, plan, stretch, TrainingState.of(assembly))
    step.epoch.fill_(1)
    assembly.distiller.train()
    return step


def whole_batches(assembly: Assembly, most: int = NUM_BATCHES) -> list[tuple[Tensor, ...]]:
    """Return whole batches of the first epoch, at most ``most``: ``(index_B, *images)``, on the device."""
    run, store = assembly.run, assembly.data.train
    order = epoch_batches(len(store), run.batch_size, seed=run.data_seed, epoch=1, device=assembly.device)
    whole = [batch for batch in order if len(batch) == run.batch_size][:most]
    if not whole:
        raise ConfigError(
            f"{counted(len(store), 'training image')} make no batch of {run.batch_size}; give a smaller batch_size"
        )
    num_virtual = assembly.distiller.num_virtual
    return list(store.batches(whole, epoch=1, seed=run.data_seed, policy=assembly.policy, num_virtual=num_virtual))


def _prepare_bare(networks: BareNetworks, run: Run, recorder: Recorder | None) -> Timings:
    passes: Callable[[], None] = networks if recorder is None else RecordedFunction(networks, recorder)
    for _ in range(1 if recorder is None else WARMUP + 1):
        passes()
    return Timings(lambda number: passes(), run)


def use_naive_form(assembly: Assembly, step: Step) -> float:
    """Let VRM store all its edges from now on; return the relative difference of both forms' losses, in float64.

    Raise ``RuntimeError`` if it exceeds ``AGREEMENT``.
    """
    if assembly.teacher is None:
        raise ConfigError("the naive form is one of VRM, which has a teacher")
    index, *images = whole_batches(assembly, 1)[0]
    views = step.views(index, *images)
    with torch.no_grad():
        networks = assembly.distiller.student, assembly.teacher
        student, teacher = (Views.of(network(view) for view in views) for network in networks)
    one = torch.ones((), dtype=torch.int64, device=assembly.device)
    closed: Any = assembly.method
    batch = Batch(index, assembly.data.train.targets[index])
    disagreement = measure_disagreement(closed, student, teacher, batch, Progress(one, one, 1, 1))
    if not disagreement <= AGREEMENT:
        raise RuntimeError(f"the two forms of VRM disagree by {disagreement:.2g} of a loss term in float64")
    assembly.distiller.method = NaiveVRM(closed)
    return disagreement
