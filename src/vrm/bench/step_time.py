"""What a training step costs: methods on one pair of networks, side by side, as Table 10 of the VRM paper has them.

Every method takes the step that training takes (:mod:`vrm.engine.step`), recorded as a CUDA graph where training
would record it, on batches that are there already. All of them take turns, a few steps each, round after round, so that
what else the machine does meets all; ratios are medians over the rounds. Two references are always measured with them,
cross entropy alone and KD, and the *bare networks*: the teacher's forward pass and the student's forward and backward
passes, for each view, on tensors that are ready.

Without ``data.root`` images are made up, and a teacher without weights is random. The student really trains.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from vrm import config, contract, methods, models
from vrm.bench.naive_vrm import ExplicitVRM, disagreement
from vrm.bench.step_profile import profiled_step
from vrm.config import ConfigError, Run
from vrm.contract import Batch, Phase, Views
from vrm.data import SOURCES, DataSet, ImageStore, channel_statistics, epoch_batches, place, view_policy
from vrm.data.stores.host import HostStore
from vrm.data.stores.store import few_labels
from vrm.engine.cuda_graphs import WARMUP, CudaGraphRecorder, RecordedFunction, Recorder
from vrm.engine.devices import choose_device
from vrm.engine.process_state import flags_restored, set_flags
from vrm.engine.step import Step
from vrm.engine.streams import SideStreams
from vrm.runs.assembly import BATCH_NORMS, Assembly, assemble, load_data
from vrm.runs.folder import environment
from vrm.runs.phase import build_step, freeze_for, why_eager
from vrm.runs.plan import Plan
from vrm.wording import nearest

REFERENCES = ("ce", "kd")
"""Always measured: cross entropy alone, which is what training without a teacher costs, and plain distillation."""

MADE_UP = {"cifar10": (10, 32), "cifar100": (100, 32), "fashion-mnist": (10, 28)}
"""Data that are imitated without ``data.root``: how many classes, and how many pixels a side."""

WITHOUT_EFFECT = (
    "run",
    "epochs",
    "schedule",
    "checkpoint",
    "nan",
    "log_every",
    "tensorboard",
    "timeout",
    "teacher.cache",
    "teacher.cache_precision",
    "teacher.allow_weak",
)
"""Settings of a run that change nothing about a step, or belong to no single one; they are refused."""

SHARED = ("device", "data", "recipe")
"""What all subjects have in common: nothing of it can be changed for one of them."""

OWN_OF_DATA = ("data.placement", "data.views", "data.seed")
"""Except these."""

EAGER, PROFILED = 2, 2
"""Steps before anything is measured, and steps that are profiled."""

BATCHES = 8
"""How many different batches the steps go through, again and again."""

EXPLICIT = "explicit"
"""The word of ``against`` that is no setting: VRM with every edge in memory."""

AGREEMENT = 1e-6
"""The largest relative difference allowed between the losses of VRM's two forms, in float64."""

CHILD = "from vrm.bench.step_time import report_memory; report_memory()"
"""What the process executes in which a subject's memory is measured."""

Call = Callable[[int], None]
"""One step or pass, by its number."""


class Settings(BaseModel):
    """What a measurement is told beside the settings of runs.

    ``methods``: names, or ``all``. ``against``: what each of them is measured against beside itself: other settings,
    as in ``[compile=true, precision=bfloat16+ema=0.99]`` (``+`` joins several), or VRM's ``explicit`` form.
    ``rounds`` of ``steps`` timed steps, behind ``warmup`` untimed ones each; by default 10 of 20 on CUDA, 5 of 3 on the
    CPU. ``samples`` and ``classes``: of made-up images. ``memory``: on the CPU, measure peak memory too, in a process
    for each method. ``out``: a JSON file for all that was found.
    """

    model_config = ConfigDict(extra="forbid")

    methods: tuple[str, ...] = ("vrm",)
    against: tuple[str, ...] = ()
    rounds: int | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    warmup: int = Field(1, ge=0)
    samples: int = Field(50_000, gt=0)
    classes: int | None = Field(None, gt=1)
    memory: bool = True
    out: Path | None = None

    @field_validator("methods", "against", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        """``methods=vrm`` is short for ``methods=[vrm]``."""
        return (value,) if isinstance(value, str) else value

    @field_validator("methods")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        chosen = methods.names() if names == ("all",) else tuple(dict.fromkeys(names))
        unknown = [name for name in chosen if name not in methods.names()]
        if unknown or not chosen:
            near = nearest(unknown[0], (*methods.names(), "all")) if unknown else "name one, or all"
            raise ValueError(f"methods={','.join(chosen)}: {near}")
        return chosen

    @field_validator("against")
    @classmethod
    def _settings(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            if word != EXPLICIT and not all("=" in part for part in word.split("+")):
                raise ValueError(f"against={word}: give {EXPLICIT}, or settings, as against=[compile=true,ema=0.99]")
        return tuple(dict.fromkeys(words))


@dataclass(frozen=True)
class Subject:
    """What is measured: a method in one of its phases, as it is or with one thing changed (a word of ``against``)."""

    method: str
    run: Run
    change: str = ""
    phase: int = 0
    """By position."""
    phase_name: str = ""
    """Where there are several."""

    @property
    def name(self) -> str:
        """In words."""
        return " ".join(filter(None, (self.method, self.phase_name and f"({self.phase_name})", self.change)))


# ---- settings --------------------------------------------------------------------------------------------------------


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of :class:`Settings`, and those of runs."""
    own = [word for word in words if word.partition("=")[0] in Settings.model_fields]
    return own, [word for word in words if word not in own]


def refuse(words: Sequence[str]) -> None:
    """``ConfigError`` for settings that have no effect on a step, or name a method elsewhere than in ``methods``."""
    for word in words:
        key = word.partition("=")[0]
        if any(key == name or key.startswith(f"{name}.") for name in WITHOUT_EFFECT):
            raise ConfigError(f"{word}: {key} has no effect on a step; leave it out")
        section, _, option = key.partition(".")
        if section == "method":
            raise ConfigError(
                f"{word}: name methods with methods=[..], and an option of one as NAME.{option or 'OPTION'}=VALUE"
            )


def resolve(recipe: str, words: Sequence[str], method: str) -> Run:
    """A run's settings with this method and any pair; without a teacher where the method needs none.

    ``ConfigError`` for words that cannot be, and for a missing teacher.
    """
    chosen = []
    for word in words:
        key, _, value = word.partition("=")
        owner, _, option = key.partition(".")
        if key == "pair":
            if value.count("/") != 1:
                raise ConfigError(f"{word}: give pair=TEACHER/STUDENT, or teacher=NAME and student=NAME")
            teacher, student = value.split("/")
            chosen += [f"teacher={teacher}", f"student={student}"]
        elif owner in methods.names():
            chosen += [f"method.{option}={value}"] if owner == method else []
        else:
            chosen.append(word)
    run = config.resolve("distill", recipe, [*chosen, f"method={method}"]).run
    if not config.build_method(run.method).needs.teacher:
        return run.model_copy(update={"teacher": None})
    if run.teacher is None:
        raise ConfigError(f"method={method} needs a teacher: give pair=TEACHER/STUDENT, or teacher=NAME")
    return run


# ---- what steps work on ----------------------------------------------------------------------------------------------


def imitated(data: config.Data, settings: Settings) -> bool:
    """Whether the images of a run are made up."""
    given = data.root is not None or data.download
    return not given and (data.name in MADE_UP or settings.classes is not None)


def load(data: config.Data, settings: Settings, console: Console) -> DataSet:
    """The images of a run: read where they can be, else made up. ``ConfigError`` if neither can be."""
    if not imitated(data, settings):
        return load_data(data, console)
    if data.name not in SOURCES:
        raise ConfigError(f"data={data.name}: {nearest(data.name, SOURCES)}")
    source = SOURCES[data.name]
    num_classes, side = MADE_UP.get(data.name, (0, 32))
    num_classes, side = settings.classes or num_classes, data.size or side
    train, test = (made_up(samples, num_classes, side) for samples in (settings.samples, num_classes))
    try:
        test = replace(test, crop=view_policy(data.views or source.view_policy).evaluation)
        if data.labels_per_class is not None:
            train = few_labels(train, data.labels_per_class)
    except ValueError as error:
        raise ConfigError(f"data={data.name}, made up: {error}") from None
    statistics = source.statistics or channel_statistics(train)
    return DataSet(data.name, train, test, *statistics, source.view_policy)


def made_up(num_samples: int, num_classes: int, side: int) -> ImageStore:
    """Soft colours with some noise, different in each image, as photographs are; the classes in turn."""
    generator = torch.Generator().manual_seed(num_samples)
    images = torch.empty(num_samples, 3, side, side, dtype=torch.uint8)
    for some in torch.split(images, 4096):
        coarse = 255 * torch.rand(len(some), 3, 4, 4, generator=generator)
        soft = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
        some.copy_(soft.add_(torch.randn(soft.shape, generator=generator), alpha=20).clamp_(0, 255))
    names = tuple(f"class {number}" for number in range(num_classes))
    return ImageStore(images, torch.arange(num_samples) % num_classes, names)


def kept_in_place(dataset: DataSet, run: Run) -> tuple[DataSet, str]:
    """The data where training would put them, and the ``data.placement`` that leaves them there."""
    try:
        placed = place(dataset, choose_device(run.device), run.data.placement)
    except ValueError as error:
        raise ConfigError(f"data.placement={run.data.placement}: {error}") from None
    kept = {ImageStore: "device", HostStore: "host"}
    return placed, kept.get(type(placed.train), run.data.placement)


def with_weights(teacher: config.Teacher, dataset: DataSet, folder: Path) -> config.Teacher:
    """A teacher that has weights as it is, another with random ones in a file in ``folder``.

    Its batch norms have seen some images, so that its logits are neither all alike nor out of bounds.
    """
    if teacher.weights is not None or "/" in teacher.name:
        return teacher
    try:
        network = models.create(teacher.name, num_classes=dataset.num_classes, **teacher.options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"teacher={teacher.name}: {error}") from None
    index = torch.arange(min(32, len(dataset.test)), device=dataset.test.targets.device)
    preprocess = models.Preprocess(dataset.mean, dataset.std)
    for module in network.modules():
        if isinstance(module, BATCH_NORMS):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(preprocess(dataset.test.batch(index).cpu()))
    path = folder / "teacher.safetensors"
    models.save_weights(network, path)
    return teacher.model_copy(update={"weights": path})


# ---- one subject -----------------------------------------------------------------------------------------------------


class Bare:
    """The passes of the networks alone, in a step's precision and phase: what it cannot do without."""

    def __init__(self, assembly: Assembly, views: Sequence[Tensor], autocast: AbstractContextManager[object]) -> None:
        """``views``: uint8, as the step makes them."""
        student, teacher = assembly.distiller.student, assembly.teacher
        self.autocast, self.student = autocast, student.network
        self.teacher = None if teacher is None else teacher.teacher.network
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        layout = torch.channels_last if assembly.run.channels_last else torch.contiguous_format

        def prepared(preprocess: nn.Module | None) -> list[Tensor]:
            images = views if preprocess is None else [preprocess(view) for view in views]
            return [view.contiguous(memory_format=layout) for view in images]

        self.student_views = prepared(student.preprocess)
        self.teacher_views = [] if teacher is None else prepared(teacher.teacher.preprocess)

    def __call__(self) -> None:
        """Every pass on every view."""
        with self.autocast:
            if self.teacher is not None:
                with torch.no_grad():
                    for view in self.teacher_views:
                        self.teacher(view)
            logits = [self.student(view) for view in self.student_views]
        if self.parameters:
            torch.autograd.grad(logits, self.parameters, [torch.ones_like(z) for z in logits], allow_unused=True)


def clock(call: Callable[[], None], device: torch.device, *, times: int) -> list[float]:
    """Milliseconds of each of so many calls in a row; on CUDA between events of the stream, read at the end."""
    if device.type != "cuda":
        found = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
        return found
    torch.cuda.synchronize(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


@dataclass
class Turns:
    """Something that has a turn in every round, and the milliseconds of its calls there."""

    call: Call
    run: Run
    rounds: list[list[float]] = field(default_factory=list)

    def take(self, device: torch.device, *, steps: int, warmup: int) -> None:
        """Some calls untimed, then ``steps`` timed ones."""
        numbers = count()
        with flags_restored():
            set_flags(self.run, device)
            for _ in range(warmup):
                self.call(next(numbers))
            self.rounds.append(clock(lambda: self.call(next(numbers)), device, times=steps))

    @property
    def every(self) -> list[float]:
        """All milliseconds."""
        return [value for values in self.rounds for value in values]

    def over(self, other: Turns | None) -> float | None:
        """How many times as long as the other's a call takes: the median over rounds of the ratio of their medians."""
        if other is None:
            return None
        return median(median(mine) / median(its) for mine, its in zip(self.rounds, other.rounds, strict=True))


@dataclass
class Measured:
    """A subject that is ready for its turns, and what was found of it on the way."""

    subject: Subject
    turns: Turns
    bare: Turns | None
    step: Step
    phase: Phase
    eager_because: str | None
    """Why the step is not recorded; ``None`` if it is."""
    shares: dict[str, float]
    launches: int | None
    peak: int | None
    disagreement: float | None


Bares = dict[tuple[object, ...], Turns]
"""Bare networks by what they depend on: one serves all methods with the same passes."""


def ready(
    subject: Subject,
    dataset: DataSet,
    *,
    recorder: Recorder | None = None,
    bares: Bares | None = None,
    profiled: int = PROFILED,
) -> Measured:
    """Build a subject, look at its eager step, and record it where training would.

    Args:
        subject: what is measured; its teacher has weights.
        dataset: in place already.
        recorder: of CUDA graphs. All subjects may share one, and its memory, as no two run at once.
        bares: gains the bare networks, if they are not in it; ``None`` leaves them out.
        profiled: steps that are profiled; 0 for none.
    """
    cuda = dataset.train.targets.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    with flags_restored():
        assembly = assemble(subject.run, dataset=dataset)
        device = assembly.device
        step, phase, eager_because = step_of(assembly, subject.phase)
        gap = explicit_form(assembly, step) if subject.change == EXPLICIT else None
        batches = whole_batches(assembly)

        def eager(number: int) -> None:
            step(*batches[number % len(batches)])

        for number in range(EAGER):
            eager(number)
        peak = None
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
            eager(0)
            peak = torch.cuda.max_memory_allocated(device) - before
        shares, launches = profiled_step(eager, device, repeats=profiled) if profiled else ({}, None)

        recorder = (recorder or CudaGraphRecorder(device)) if eager_because is None else None
        turns = Turns(eager, subject.run)
        if recorder is not None:
            recorded = RecordedFunction(step, recorder)
            turns.call = lambda number: recorded(*batches[number % len(batches)])
            for number in range(WARMUP + 1):
                turns.call(number)
        bare = None
        if bares is not None:
            change = subject.change if subject.change.partition(".")[0] not in methods.names() else ""
            key = (len(step.views(*batches[0])), assembly.teacher is None, phase.trained, eager_because, change)
            if key not in bares:
                bares[key] = _bare(assembly, batches[0], step, recorder)
            bare = bares[key]
    return Measured(subject, turns, bare, step, phase, eager_because, shares, launches, peak, gap)


def step_of(assembly: Assembly, position: int = 0) -> tuple[Step, Phase, str | None]:
    """The very step that training takes in a phase, the phase, and why it would not be recorded."""
    plan = Plan.of(assembly.run, assembly.method.phases, len(assembly.data.train))
    stretch = plan.stretches[position]
    freeze_for(assembly, stretch)
    step = build_step(assembly, plan, stretch)
    step.epoch.fill_(1)
    assembly.distiller.train()
    return step, stretch.phase, why_eager(assembly)


def whole_batches(assembly: Assembly, most: int = BATCHES) -> list[tuple[Tensor, ...]]:
    """Some batches of the first epoch, none of them smaller than the others: ``(index_B, *images)``, on the device."""
    run, store = assembly.run, assembly.data.train
    order = epoch_batches(len(store), run.batch_size, seed=run.data_seed, epoch=1, device=assembly.device)
    whole = [batch for batch in order if len(batch) == run.batch_size][:most]
    if not whole:
        raise ConfigError(f"{len(store)} training images make no batch of {run.batch_size}; give a smaller batch_size")
    num_virtual = assembly.distiller.num_virtual
    return list(store.feed(whole, epoch=1, seed=run.data_seed, policy=assembly.policy, num_virtual=num_virtual))


def _bare(assembly: Assembly, batch: tuple[Tensor, ...], step: Step, recorder: Recorder | None) -> Turns:
    passes: Callable[[], None] = Bare(assembly, step.views(*batch), step.autocast)
    if recorder is not None:
        passes = RecordedFunction(passes, recorder)
    for _ in range(WARMUP + 1 if recorder is not None else 1):
        passes()
    return Turns(lambda number: passes(), assembly.run)


def explicit_form(assembly: Assembly, step: Step) -> float:
    """Let VRM build all its edges from now on; the relative difference of the two forms' losses on a batch, in float64.

    ``RuntimeError`` if they disagree.
    """
    if assembly.teacher is None:
        raise ConfigError("the explicit form is one of VRM, which has a teacher")
    batch = whole_batches(assembly, 1)[0]
    views = step.views(*batch)
    with torch.no_grad():
        outputs = [[network(view) for view in views] for network in (assembly.distiller.student, assembly.teacher)]
    student, teacher = (Views(each[0], tuple(each[1:])) for each in outputs)
    one = torch.ones((), dtype=torch.int64, device=assembly.device)
    closed: Any = assembly.method
    told = Batch(batch[0], assembly.data.train.targets[batch[0]])
    gap = disagreement(closed, student, teacher, told, contract.Progress(one, one, 1, 1))
    if not gap <= AGREEMENT:
        raise RuntimeError(f"the two forms of VRM disagree by {gap:.2g} of a loss term in float64")
    assembly.distiller.method = ExplicitVRM(closed)
    return gap


# ---- memory on the CPU -----------------------------------------------------------------------------------------------


def _resident(key: str) -> int:
    """Bytes of this process, as Linux tells them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def report_memory() -> None:
    """In a process of its own: build the subject that standard input describes, take its steps, print the peak."""
    told = json.loads(sys.stdin.read())
    run, settings = config.validate(told.pop("run")), Settings.model_validate(told.pop("settings"))
    dataset, _ = kept_in_place(load(run.data, settings, Console(quiet=True)), run)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak so far
    before = _resident("VmRSS")
    ready(Subject(run=run, **told), dataset, profiled=0)
    print(_resident("VmHWM") - before)


def memory_of_process(subject: Subject, settings: Settings) -> tuple[int | None, str]:
    """The bytes that a fresh process takes at most for networks and steps, or what stood in the way of knowing them."""
    if sys.platform != "linux":
        return None, "peak memory is measured on Linux, and on CUDA"
    task = {
        "run": subject.run.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json", include={"samples", "classes"}),
        "method": subject.method,
        "change": subject.change,
        "phase": subject.phase,
    }
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    if done.returncode:
        return None, f"not measured: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}"
    return int(done.stdout.split()[-1]), ""


def processor() -> str:
    """The processor's name as Linux tells it, else its architecture."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---- all of them -----------------------------------------------------------------------------------------------------


def measure(recipe: str, words: Sequence[str], settings: Settings, *, console: Console) -> dict[str, Any]:
    """Measure all methods in turns; returns what ``out`` would hold.

    Args:
        recipe: as for ``vrm distill``.
        words: settings of runs, without a method. ``pair=TEACHER/STUDENT`` may be any; ``NAME.option=value`` is an
            option of the method NAME.
        settings: what to measure, and how often.
        console: shows how far it is.

    Raises:
        ConfigError: settings that cannot be. What a method cannot do on this pair is listed with it.
    """
    refuse(words)
    changes = [part for word in settings.against if word != EXPLICIT for part in word.split("+")]
    refuse(changes)
    for word in changes:
        key = word.partition("=")[0]
        if key.partition(".")[0] in SHARED and key not in OWN_OF_DATA:
            raise ConfigError(f"against={word}: all steps of one measurement have the same {key}; measure twice")
    if EXPLICIT in settings.against and "vrm" not in settings.methods:
        raise ConfigError(f"against={EXPLICIT} is a form of vrm; name it in methods")
    subjects = _subjects(recipe, words, settings)
    base = subjects[0].run
    dataset, placement = kept_in_place(load(base.data, settings, console), base)
    with tempfile.TemporaryDirectory(prefix="vrm-bench-") as folder:
        named = {subject.run.teacher.name: subject.run.teacher for subject in subjects if subject.run.teacher}
        teachers = {name: with_weights(teacher, dataset, Path(folder)) for name, teacher in named.items()}
        bench = _Bench(settings, dataset, choose_device(base.device))
        for subject in subjects:
            data = subject.run.data
            if data.placement == base.data.placement:
                data = data.model_copy(update={"placement": placement})
            weights = teachers[subject.run.teacher.name].weights if subject.run.teacher else None
            teacher = subject.run.teacher and subject.run.teacher.model_copy(update={"weights": weights})
            run = subject.run.model_copy(update={"data": data, "teacher": teacher})
            bench.subjects.append(replace(subject, run=run))
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar:
            bench.build(bar)
            bench.take_turns(bar)
            bench.look_at_memory(bar)
    teacher_name = next(iter(named), None)
    return {
        "what": "vrm bench step",
        "recipe": recipe,
        "words": list(words),
        "pair": f"{teacher_name}/{base.student.name}" if teacher_name else base.student.name,
        "made_up_images": imitated(base.data, settings),
        **bench.result(),
    }


def _subjects(recipe: str, words: Sequence[str], settings: Settings) -> list[Subject]:
    """All that is to be measured, references first. ``ConfigError`` for settings that cannot be."""
    found = []
    references = [name for name in REFERENCES if name in methods.names()]
    for name in dict.fromkeys((*references, *settings.methods)):
        for change in ("", *(settings.against if name in settings.methods else ())):
            changed = change.split("+") if "=" in change else []
            owners = {part.partition(".")[0] for part in changed} & set(methods.names())
            if (change == EXPLICIT and name != "vrm") or not owners <= {name}:
                continue
            keys = {part.partition("=")[0] for part in changed}
            kept = [word for word in words if word.partition("=")[0] not in keys]
            try:
                run = resolve(recipe, [*kept, *changed], name)
            except ConfigError:
                if name in settings.methods:
                    raise
                continue  # a reference that cannot be: KD where no teacher is given
            phases = config.build_method(run.method).phases
            found += [
                Subject(name, run, change, position, phase.name if len(phases) > 1 else "")
                for position, phase in enumerate(phases)
            ]
    return found


class _Bench:
    """The subjects of one measurement, and what becomes of them."""

    def __init__(self, settings: Settings, dataset: DataSet, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.settings, self.dataset, self.device = settings, dataset, device
        self.rounds, self.steps = settings.rounds or (10 if cuda else 5), settings.steps or (20 if cuda else 3)
        self.subjects: list[Subject] = []
        self.measured: list[Measured] = []
        self.bares: Bares = {}
        self.failed: list[dict[str, str]] = []
        self.notes: dict[str, str] = {}
        self.load = os.getloadavg()[0]

    def build(self, bar: Progress) -> None:
        """Make all ready; those that cannot be are listed."""
        recorder = None
        if self.device.type == "cuda":
            recorder = CudaGraphRecorder(self.device)
            # workspaces of streams and of the thread of backward passes, which the first step would be charged with
            square = torch.ones(64, 64, device=self.device, requires_grad=True)
            side_streams = SideStreams(self.device)
            for number in range(2):
                with side_streams.on(number):
                    torch.autograd.grad((square @ square).sum(), square)
            side_streams.join()
            torch.autograd.grad(F.conv2d((square @ square)[None, None], square[None, None, :3, :3]).sum(), square)
        task = bar.add_task("", total=len(self.subjects))
        for subject in self.subjects:
            bar.update(task, description=f"building {subject.name}")
            try:
                self.measured.append(ready(subject, self.dataset, recorder=recorder, bares=self.bares))
            except (ValueError, RuntimeError) as error:
                self._fail(subject, error)
            bar.advance(task)

    def _fail(self, subject: Subject, error: Exception) -> None:
        first = (str(error).strip().splitlines() or [""])[0]
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        self.failed.append({"name": subject.name, "reason": kind + first})
        error.__traceback__ = None  # whose frames hold what the subject took
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def take_turns(self, bar: Progress) -> None:
        """Round after round, all bare networks and all subjects once."""
        task = bar.add_task("measuring", total=self.rounds * (len(self.measured) + len(self.bares)))
        for _ in range(self.rounds):
            for turns in self.bares.values():
                turns.take(self.device, steps=self.steps, warmup=self.settings.warmup)
                bar.advance(task)
            for found in list(self.measured):
                try:
                    found.turns.take(self.device, steps=self.steps, warmup=self.settings.warmup)
                except RuntimeError as error:
                    self.measured.remove(found)
                    self._fail(found.subject, error)
                bar.advance(task)

    def look_at_memory(self, bar: Progress) -> None:
        """On the CPU, in a process for each."""
        if self.device.type == "cuda" or not self.settings.memory:
            return
        task = bar.add_task("memory", total=len(self.measured))
        for found in self.measured:
            found.peak, note = memory_of_process(found.subject, self.settings)
            if note:
                self.notes[found.subject.name] = note
            bar.advance(task)

    def _reference(self, name: str) -> Turns | None:
        """A method's main phase, unchanged."""
        for found in self.measured:
            if found.subject.method == name and not found.subject.change and found.phase.epochs is None:
                return found.turns
        return None

    def _unchanged(self, subject: Subject) -> Turns | None:
        """The same phase of the same method, with nothing changed."""
        for found in self.measured:
            other = found.subject
            if not other.change and (other.method, other.phase) == (subject.method, subject.phase):
                return found.turns
        return None

    def _row(self, found: Measured) -> dict[str, Any]:
        """What was found of one subject."""
        subject, turns = found.subject, found.turns
        every = torch.tensor(turns.every, dtype=torch.float64)
        middle = float(every.quantile(0.5))
        return {
            "name": subject.name,
            "method": subject.method,
            "change": subject.change or None,
            "phase": subject.phase_name or None,
            "options": {key: value for key, value in subject.run.method.items() if key != "name"},
            "precision": subject.run.precision,
            "batch_size": subject.run.batch_size,
            "student_views": 1 + found.step.distiller.num_virtual,
            "recorded": found.eager_because is None,
            "eager_because": found.eager_because,
            "median_ms": middle,
            "p95_ms": float(every.quantile(0.95)),
            "least_ms": float(every.min()),
            "timed_steps": len(every),
            "images_per_second": 1e3 * subject.run.batch_size / middle,
            "bare_networks_ms": None if found.bare is None else median(found.bare.every),
            "over_bare_networks": turns.over(found.bare),
            "over": {name: turns.over(self._reference(name)) for name in REFERENCES},
            "over_unchanged": turns.over(self._unchanged(subject)) if subject.change else None,
            "peak_memory_bytes": found.peak,
            "launches": found.launches,
            "shares": found.shares,
            "nonfinite_steps": float(found.step.meter.sums["nonfinite"]),
            "disagreement_of_forms": found.disagreement,
        }

    def result(self) -> dict[str, Any]:
        """All that was found, and how."""
        cuda = self.device.type == "cuda"
        return {
            "images": {
                "samples": len(self.dataset.train),
                "classes": self.dataset.num_classes,
                "size": list(self.dataset.image_size),
                "placement": self.dataset.placement,
            },
            "rounds": self.rounds,
            "steps_a_round": self.steps,
            "untimed_steps_a_round": self.settings.warmup,
            "clock": "CUDA events, synchronised" if cuda else "time.perf_counter",
            "peak_memory": "torch.cuda.max_memory_allocated in an eager step, less what there was before the networks"
            if cuda
            else "the most resident memory of a fresh process in its first steps, less that before the networks",
            "launches": "kernels a step" if cuda else "operator calls a step",
            "shares": "of the time that kernels ran in eager steps" if cuda else "of the time of eager steps",
            "environment": environment(self.device) | {"processor": processor()},
            "load_average": [self.load, os.getloadavg()[0]],
            "rows": [self._row(found) for found in self.measured],
            "failed": self.failed,
            "notes": self.notes,
        }
