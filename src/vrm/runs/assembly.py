"""From settings to objects: data, networks and method, checked against each other and put on their device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from vrm import config, data, models, tasks
from vrm.compilation import compile_options
from vrm.config import ConfigError, Run
from vrm.config.schema import PYTHON
from vrm.contract import NO_TEACHER_PROBE, DataInfo, Method, Probe
from vrm.data import DataSet, place
from vrm.data.views.policies import CompiledViews, ViewPolicy, view_policy
from vrm.engine.devices import choose_device
from vrm.engine.distiller import Distiller
from vrm.engine.process_state import set_flags
from vrm.models import Card, FrozenTeacher
from vrm.runs.display import Display
from vrm.runs.inputs import settle_input
from vrm.runs.networks import (
    LoadedNetwork,
    attach_taps,
    check_classes,
    check_module,
    check_trainable,
    load_network,
    probe_network,
    wrap_module,
)
from vrm.tasks import Task
from vrm.wording import counted

# Deterministic cuBLAS calls raise without it; PyTorch reads it once, at a process's first matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Assembly:
    """Everything a run works on, on its device."""

    run: Run
    device: torch.device
    data: DataSet
    policy: ViewPolicy
    make_views: ViewPolicy | CompiledViews
    student: LoadedNetwork
    teacher: FrozenTeacher | None
    master: LoadedNetwork | None
    """The network inside the frozen teacher, and its card."""
    distiller: Distiller
    taps: dict[str, Any]
    """The taps that the method reads, their shapes, and which were matched: ``taps.json``."""
    learnable: Mapping[str, tuple[nn.Parameter, ...]]
    """The parameters of student and method that their owner did not freeze."""
    probes: tuple[Probe, Probe] | None
    """What was measured of student and teacher, if there is a teacher."""
    notes: tuple[str, ...] = ()
    """What a user should know of how the networks were had."""

    @property
    def method(self) -> Method:
        """The distillation objective."""
        return self.distiller.method

    @property
    def teacher_card(self) -> Card | None:
        """The teacher's card, if there is a teacher."""
        return None if self.master is None else self.master.card

    @property
    def task(self) -> Task:
        """What the networks are trained for."""
        return tasks.load(self.data.task)

    @property
    def num_views(self) -> int:
        """Number of views of an image that the student sees, the real one included."""
        return 1 + self.distiller.num_virtual


def load_data(settings: config.Data, console: Console) -> DataSet:
    """Return the data set of a run; show how far it is while images are decoded. Raise ``ConfigError`` if it fails."""
    with Display(console, title=f"loading {settings.name}", total=1, announce=True) as display:
        try:
            return data.load(
                settings.name,
                root=settings.root,
                size=settings.size,
                labels_per_class=settings.labels_per_class,
                views=settings.views,
                placement=settings.placement,
                bad_images=settings.bad_images,
                download=settings.download,
                num_workers=settings.workers,
                progress=display.reach,
            )
        except ValueError as error:
            raise ConfigError(f"data={settings.name}: {error}") from None


def place_data(dataset: DataSet, device: torch.device, settings: config.Data) -> DataSet:
    """Put data where ``data.placement`` says. Raise ``ConfigError`` if they do not fit there."""
    try:
        return place(dataset, device, settings.placement)
    except ValueError as error:
        raise ConfigError(f"data.placement={settings.placement}: {error}") from None


def assemble(
    run: Run,
    *,
    console: Console | None = None,
    dataset: DataSet | None = None,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> Assembly:
    """Build and check everything that ``run`` names; data and networks may be given as objects.

    Raise ``ConfigError`` for what does not fit.
    """
    device = choose_device(run.device)
    if run.precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"precision=tf32 is a mode of NVIDIA GPUs, and this run is on {device}; use precision=float32"
        )
    set_flags(run, device)
    dataset = dataset or load_data(run.data, console or Console(quiet=True))
    if run.data.views is not None and run.data.views != dataset.view_policy:
        try:
            dataset = replace(dataset, view_policy=run.data.views)
        except ValueError as error:
            raise ConfigError(f"data.views={run.data.views}: {error}") from None
    policy = view_policy(dataset.view_policy)
    method = config.build_method(run.method)
    learner, master = _load_networks(run, method, dataset, device, student, teacher)

    needs, name = method.needs, run.method["name"]
    student_probe = probe_network(learner, needs.student_taps, dataset, "student")
    teacher_probe = probe_network(master, needs.teacher_taps, dataset, "teacher") if master is not None else None
    probed = {"student": student_probe, "teacher": teacher_probe}
    torch.manual_seed(run.seed)
    frozen = None
    try:
        info = DataInfo(len(dataset.train), dataset.num_classes, run.batch_size, dataset.train.targets)
        method.build(student_probe, teacher_probe or NO_TEACHER_PROBE, info)
        if master is not None and teacher_probe is not None:
            frozen = FrozenTeacher(attach_taps(master, teacher_probe.resolve(needs.teacher_taps), dataset.image_size))
        tapped = attach_taps(learner, student_probe.resolve(needs.student_taps), dataset.image_size)
        distiller = Distiller(tapped, method, views=run.views)
    except ValueError as error:
        given = "this pair" if master is not None else f"student={learner.card.architecture}"
        raise ConfigError(f"method={name} cannot work on {given}: {error}") from None
    _check_phases(distiller, name)
    distiller.train()
    check_parts(run, distiller, len(dataset.train))

    networks = [distiller.student, *([frozen] if frozen is not None else [])]
    for module in (distiller, *networks):
        module.to(device)
    if run.channels_last:
        for module in networks:
            module.to(memory_format=torch.channels_last)
    groups = (("student", distiller.student), ("method", method))
    return Assembly(
        run=run,
        device=device,
        data=place_data(dataset, device, run.data),
        policy=policy,
        make_views=compile_parts(policy, distiller, frozen, device) if run.compile else policy,
        student=learner,
        teacher=frozen,
        master=master,
        distiller=distiller,
        taps=_describe_taps(student_probe, teacher_probe or NO_TEACHER_PROBE, method),
        learnable={name: tuple(p for p in module.parameters() if p.requires_grad) for name, module in groups},
        probes=None if teacher_probe is None else (student_probe, teacher_probe),
        notes=(
            *learner.notes,
            *(master.notes if master is not None else ()),
            *(f"{role}: {found.note}" for role, found in probed.items() if found is not None and found.note),
        ),
    )


def _load_networks(
    run: Run,
    method: Method,
    dataset: DataSet,
    device: torch.device,
    student: nn.Module | None,
    teacher: nn.Module | None,
) -> tuple[LoadedNetwork, LoadedNetwork | None]:
    """Return student and teacher (None for a method without one), checked against the data."""
    torch.manual_seed(run.seed)
    if student is not None:
        learner = wrap_module(student, dataset)
    else:
        learner = load_network(run.student, dataset, role="student")
    learner = settle_input(learner, run.student, dataset, role="student", is_module=student is not None)
    name, master = run.method["name"], None
    if method.needs.teacher:
        master = _load_teacher(run, dataset, teacher, learner)
    elif run.teacher is not None:
        raise ConfigError(f"method={name} learns from no teacher; leave teacher out, or choose another method")
    learner = replace(learner, logits_key=run.student.logits_key)
    if master is not None and run.teacher is not None:
        master = replace(master, logits_key=run.teacher.logits_key)
    for role, loaded in (("student", learner), ("teacher", master)):
        if loaded is not None:
            check_module(loaded, role, device)
            check_classes(loaded.card, dataset, role, order=role == "teacher")
    # A student may have learned other classes before; what it learns now are those of the data.
    learner = replace(learner, card=replace(learner.card, classes=dataset.classes, data=dataset.name, scores=None))
    check_trainable(learner)
    if dataset.num_classes < method.needs.min_classes:
        raise ConfigError(
            f"method={name} needs at least {method.needs.min_classes} classes, but {dataset.name} has "
            f"{dataset.num_classes}; "
            + ("choose another method" if dataset.num_classes > 1 else "there is nothing to learn from a single one")
        )
    return learner, master


def _load_teacher(run: Run, dataset: DataSet, module: nn.Module | None, learner: LoadedNetwork) -> LoadedNetwork:
    if module is not None:
        try:
            models.check_separate(learner.network, module)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        settings = run.teacher or config.Network(name=type(module).__qualname__)
        return settle_input(wrap_module(module, dataset), settings, dataset, role="teacher", is_module=True)
    if run.teacher is None:
        how = "teacher=NAME teacher.weights=FILE, or teacher=RUN_FOLDER/"
        raise ConfigError(
            f"method={run.method['name']} needs a teacher: give {how if run.recipe != PYTHON else 'a trained network'}"
        )
    if "/" not in run.teacher.name and run.teacher.weights is None:
        raise ConfigError(
            f"teacher={run.teacher.name} has no weights: give teacher.weights=FILE, or a run folder (teacher=runs/NAME)"
        )
    with torch.random.fork_rng(devices=[]):  # drawing the teacher's initial weights must not move the student's draws
        loaded = load_network(run.teacher, dataset, role="teacher")
        return settle_input(loaded, run.teacher, dataset, role="teacher")


def compile_parts(
    policy: ViewPolicy, distiller: Distiller, teacher: FrozenTeacher | None, device: torch.device
) -> ViewPolicy | CompiledViews:
    """Compile both networks and, on a GPU, the losses and the views; return what makes the views.

    On a CPU the views stay as they are: there they look at values first and skip most operations.
    """
    from torch._dynamo import config as compiler

    # One compiled form for each network, batch size and mode. Beyond its default of eight, PyTorch would silently run
    # further ones uncompiled.
    compiler.recompile_limit, compiler.fail_on_recompile_limit_hit = 64, True
    for network in (distiller.student, *([teacher] if teacher is not None else [])):
        network.compile(dynamic=False)
    if device.type == "cpu":
        return policy
    distiller.method.compile(dynamic=False, options=compile_options())
    return CompiledViews(policy)


def _describe_taps(student: Probe, teacher: Probe, method: Method) -> dict[str, Any]:
    """Return which taps a method reads of both networks, their shapes, and which were matched."""
    needs = method.needs
    return {
        "student": {name: student.shapes[name] for name in student.resolve(needs.student_taps)},
        "teacher": {name: teacher.shapes[name] for name in teacher.resolve(needs.teacher_taps)},
        "matched": method.matched,
    }


def smallest_part(run: Run, num_samples: int, *, processes: int = 1) -> int:
    """Return the smallest number of samples ever seen at once.

    Each batch is divided over the processes, and each share into ``accumulate`` parts.
    """
    batches = {min(run.batch_size, num_samples), num_samples % run.batch_size or run.batch_size}
    shares = {len(range(rank, batch, processes)) for batch in batches for rank in range(processes)}
    return min(len(torch.empty(share).chunk(run.accumulate)[-1]) for share in shares)


def check_parts(run: Run, distiller: Distiller, num_samples: int, *, processes: int = 1) -> None:
    """Raise ``ConfigError`` if a part of a batch is too small for the method, or for batch norm in train mode."""
    smallest = smallest_part(run, num_samples, processes=processes)
    needs = distiller.method.needs
    least = max(needs.min_batch, 2 if needs.teacher_batch_statistics else 1)
    divided = f", over {processes} processes" * (processes > 1)
    divided += f", in {run.accumulate} parts each" * (run.accumulate > 1)
    leave = f"{counted(num_samples, 'sample')} in batches of {run.batch_size}{divided} leave a last batch of "
    leave += "one" if smallest == 1 else str(smallest)
    another = "choose another batch_size" + ", or a smaller accumulate" * (run.accumulate > 1)
    if smallest < least:
        raise ConfigError(f"method={run.method['name']} needs at least {least} samples a batch, but {leave}; {another}")
    norms = [name for name, module in distiller.named_modules() if isinstance(module, BATCH_NORMS) and module.training]
    if smallest < 2 and norms:
        raise ConfigError(f"{leave}, on which batch norm is undefined ({norms[0]} is one of {len(norms)}); {another}")


def _check_phases(distiller: Distiller, name: str) -> None:
    """Raise ``ConfigError`` if a phase trains groups without a parameter that may move."""
    groups = {"student": distiller.student, "method": distiller.method}
    for phase in distiller.method.phases:
        if not any(p.requires_grad for group in phase.trained for p in groups[group].parameters()):
            raise ConfigError(
                f"method={name}: phase {phase.name!r} trains {' and '.join(phase.trained) or 'nothing'}, which has no "
                "parameter to train"
            )
