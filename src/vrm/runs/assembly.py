"""From settings to objects: data, networks, method, all checked against each other before the first step."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.nn.parameter import is_lazy

from vrm import config, data, models, tasks
from vrm.compilation import compile_options
from vrm.config import ConfigError, Run
from vrm.contract import DataInfo, Method, Probe
from vrm.data import DataSet, place
from vrm.data.views.policies import CompiledViews, ViewPolicy, view_policy
from vrm.engine.devices import choose_device
from vrm.engine.distiller import Distiller
from vrm.engine.process_state import set_flags
from vrm.models import Card, FrozenTeacher, Preprocess, TappedNetwork
from vrm.models.teacher import common_memory
from vrm.runs.checkpoint import check_sum
from vrm.tasks import Task

# Without it deterministic cuBLAS calls raise; PyTorch looks once, at a process's first matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

LOGICAL = re.compile(r"(stages?|stage\d+|last|stem|pooled|logits)(:pre)?")
"""Selectors that are no module paths."""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Ready:
    """A network with what is known of it."""

    network: nn.Module
    card: Card


@dataclass(frozen=True)
class Assembly:
    """Everything a run works on, on its device."""

    run: Run
    device: torch.device
    data: DataSet
    policy: ViewPolicy
    make_views: ViewPolicy | CompiledViews
    student: Ready
    teacher: FrozenTeacher | None
    teacher_card: Card | None
    distiller: Distiller
    taps: dict[str, Any]
    learnable: Mapping[str, tuple[nn.Parameter, ...]]
    """The parameters of student and method that their owner did not freeze."""
    probes: tuple[Probe, Probe] | None
    """What was measured of student and teacher, where there is one."""

    @property
    def method(self) -> Method:
        """The distillation objective."""
        return self.distiller.method

    @property
    def task(self) -> Task:
        """What the networks are trained for."""
        return tasks.load(self.data.task)


def load_data(settings: config.Data, console: Console) -> DataSet:
    """The data set of a run, with a progress bar while images are decoded. ``ConfigError`` if it cannot be had."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"decoding {settings.name}", total=None)
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
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except ValueError as error:
            raise ConfigError(f"data={settings.name}: {error}") from None


def load_network(settings: config.Network, dataset: DataSet, *, role: str) -> Ready:
    """A network by name or from a run folder, with its weights where given.

    What lies in a run folder comes with what its card tells, also where the file is named; other weights are expected
    to take images of this size, normalised as these data.
    """
    try:
        if "/" in settings.name:
            folder = Path(settings.name)
            card = read_card(folder)
            network = models.create(card.architecture, num_classes=card.num_classes, **card.options)
            models.load_weights(network, settings.weights or folder / "model.safetensors")
            return Ready(network, card)
        classes = dataset.num_classes
        network = models.create(settings.name, num_classes=classes, **settings.options)
        beside = None
        if settings.weights is not None:
            models.load_weights(network, settings.weights)
            beside = _card_beside(settings.weights)
        if beside is not None:
            return Ready(network, replace(beside, architecture=settings.name, options=settings.options))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{role}={settings.name}: {error}") from None
    card = Card(
        settings.name,
        settings.options,
        dataset.task,
        classes,
        dataset.classes,
        dataset.image_size,
        dataset.mean,
        dataset.std,
        data=dataset.name,
    )
    return Ready(network, card)


def read_card(folder: Path) -> Card:
    """Return the card in a run folder; warn if it was changed after the run had ended. Raise ``ValueError`` if bad."""
    card = Card.read(folder)
    check_sum(folder / "model.json")
    return card


def _card_beside(weights: Path) -> Card | None:
    """The card of the run in whose folder these weights lie; its accuracy is that of the last ones."""
    folder = weights if weights.is_dir() else weights.parent
    if not (folder / "model.json").is_file():
        return None
    card = read_card(folder)
    last = weights.is_dir() or weights.name == "model.safetensors"
    return card if last else replace(card, scores=None)


def tapped(ready: Ready, taps: tuple[str, ...], image_size: tuple[int, int]) -> TappedNetwork:
    """The network behind its own normalisation (and, if it wants another size, resizing)."""
    size = None if ready.card.input_size == image_size else ready.card.input_size
    preprocess = Preprocess(ready.card.mean, ready.card.std, size)
    return TappedNetwork(ready.network, taps, preprocess, input_size=ready.card.input_size)


def describe(ready: Ready, selectors: tuple[str, ...], dataset: DataSet, role: str) -> Probe:
    """Run a network once and measure its taps, also those of ``selectors`` that are module paths.

    ``ConfigError`` if it cannot take the images, or gives another number of logits than there are classes.
    """
    card = ready.card
    raw = tuple(selector for selector in selectors if not LOGICAL.fullmatch(selector))
    try:
        probe = models.probe(ready.network, name=card.architecture, input_size=card.input_size, extra_taps=raw)
    except RuntimeError as error:
        height, width = card.input_size
        raise ConfigError(
            f"{role} {card.architecture} cannot take images of 3x{height}x{width} pixels "
            f"({str(error).splitlines()[0]}); give data.size=PIXELS that suit it, or another {role}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{role} {card.architecture}: {error}") from None
    _check_classes(replace(card, num_classes=probe.num_classes), dataset, role)
    return probe


def assemble(
    run: Run,
    *,
    console: Console | None = None,
    dataset: DataSet | None = None,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
) -> Assembly:
    """Build and check everything. ``ConfigError`` says what does not fit. Modules and data may be given as objects."""
    device = choose_device(run.device)
    if run.precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"precision=tf32 is a mode of NVIDIA GPUs, and this run is on {device}; use precision=float32"
        )
    set_flags(run, device)
    dataset = dataset or load_data(run.data, console or Console(quiet=True))
    try:
        policy = view_policy(run.data.views or dataset.view_policy)
    except ValueError as error:
        raise ConfigError(f"data.views={run.data.views}: {error}") from None
    method = config.build_method(run.method)
    needs = method.needs
    name = run.method["name"]

    torch.manual_seed(run.seed)
    learner = given(student, dataset) if student is not None else load_network(run.student, dataset, role="student")
    master: Ready | None = None
    if needs.teacher:
        master = _teacher(run, dataset, teacher, learner)
    elif run.teacher is not None:
        raise ConfigError(f"method={name} learns from no teacher; leave teacher out, or choose another method")

    for role, ready in (("student", learner), ("teacher", master)):
        if ready is not None:
            _check_kind(ready, role)
            _check_classes(ready.card, dataset, role)
    if master is not None:
        try:
            tasks.load(dataset.task).check_order(master.card, dataset, role="teacher")
        except ValueError as error:
            raise ConfigError(str(error)) from None
    # Whatever it has learned before, these are the classes that it learns now.
    learner = replace(learner, card=replace(learner.card, classes=dataset.classes, data=dataset.name, scores=None))
    _check_student(learner)
    if dataset.num_classes < needs.min_classes:
        raise ConfigError(
            f"method={name} needs at least {needs.min_classes} classes, but {dataset.name} has {dataset.num_classes}; "
            + ("choose another method" if dataset.num_classes > 1 else "there is nothing to learn from a single one")
        )
    of_student = describe(learner, needs.student_taps, dataset, "student")
    of_teacher = describe(master, needs.teacher_taps, dataset, "teacher") if master is not None else None

    torch.manual_seed(run.seed)
    shown: dict[str, Any] = {}
    frozen = None
    try:
        if master is not None and of_teacher is not None:
            info = DataInfo(len(dataset.train), dataset.num_classes, run.batch_size, dataset.train.targets)
            method.build(of_student, of_teacher, info)
            shown = _describe_taps(of_student, of_teacher, method)
            frozen = FrozenTeacher(tapped(master, of_teacher.resolve(needs.teacher_taps), dataset.image_size))
        taps = of_student.resolve(needs.student_taps)
        distiller = Distiller(tapped(learner, taps, dataset.image_size), method, views=run.views)
    except ValueError as error:
        raise ConfigError(f"method={name} cannot work on this pair: {error}") from None
    _check_phases(distiller, name)
    distiller.train()
    check_parts(run, distiller, len(dataset.train))

    distiller.to(device)
    if frozen is not None:
        frozen.to(device)
    if run.channels_last:
        for network in (distiller.student, *([frozen] if frozen is not None else [])):
            network.to(memory_format=torch.channels_last)
    try:
        placed = place(dataset, device, run.data.placement)
    except ValueError as error:
        raise ConfigError(f"data.placement={run.data.placement}: {error}") from None
    probes = None if of_teacher is None else (of_student, of_teacher)
    return Assembly(
        run,
        device,
        placed,
        policy,
        compiled(policy, distiller, frozen, device) if run.compile else policy,
        learner,
        frozen,
        master.card if master else None,
        distiller,
        shown,
        {
            name: tuple(parameter for parameter in module.parameters() if parameter.requires_grad)
            for name, module in (("student", distiller.student), ("method", method))
        },
        probes,
    )


def compiled(
    policy: ViewPolicy, distiller: Distiller, teacher: FrozenTeacher | None, device: torch.device
) -> ViewPolicy | CompiledViews:
    """Gives both networks to ``torch.compile``, and on a GPU the losses and the views, which are returned."""
    from torch._dynamo import config as compiler

    # A form for each network, size of batch and mode. Beyond eight PyTorch would run the others as they are.
    compiler.recompile_limit, compiler.fail_on_recompile_limit_hit = 64, True
    for network in (distiller.student, *([teacher] if teacher is not None else [])):
        network.compile(dynamic=False)
    if device.type == "cpu":  # which looks at values first, and leaves most of these operations out
        return policy
    distiller.method.compile(dynamic=False, options=compile_options())
    return CompiledViews(policy)


def _describe_taps(student: Probe, teacher: Probe, method: Method) -> dict[str, Any]:
    """What a method reads of both networks, as ``taps.json`` keeps it."""
    needs = method.needs
    return {
        "student": {name: student.shapes[name] for name in student.resolve(needs.student_taps)},
        "teacher": {name: teacher.shapes[name] for name in teacher.resolve(needs.teacher_taps)},
        "matched": method.matched,
    }


def _check_classes(card: Card, dataset: DataSet, role: str) -> None:
    """Raise ``ConfigError`` unless network and data have the same number of classes."""
    try:
        tasks.load(dataset.task).check_classes(card, dataset, role=role)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def given(network: nn.Module, dataset: DataSet) -> Ready:
    """A user's own module, expected to take this data's images."""
    name = f"{type(network).__module__}.{type(network).__qualname__}"
    card = Card(
        name,
        {},
        dataset.task,
        dataset.num_classes,
        dataset.classes,
        dataset.image_size,
        dataset.mean,
        dataset.std,
        data=dataset.name,
    )
    return Ready(network, card)


def _teacher(run: Run, dataset: DataSet, module: nn.Module | None, learner: Ready) -> Ready:
    name = run.method["name"]
    if module is not None:
        try:
            models.check_separate(learner.network, module)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return given(module, dataset)
    if run.teacher is None:
        raise ConfigError(
            f"method={name} needs a teacher: give teacher=NAME teacher.weights=FILE, or teacher=RUN_FOLDER/"
        )
    if "/" not in run.teacher.name and run.teacher.weights is None:
        raise ConfigError(
            f"teacher={run.teacher.name} has no weights: give teacher.weights=FILE, or a run folder (teacher=runs/NAME)"
        )
    with torch.random.fork_rng(devices=[]):  # the teacher's discarded initial weights must not move the student's draws
        return load_network(run.teacher, dataset, role="teacher")


def smallest_part(run: Run, num_samples: int, *, processes: int = 1) -> int:
    """How few samples are ever seen at once: each batch is divided over processes, and then in ``accumulate`` parts."""
    batches = {min(run.batch_size, num_samples), num_samples % run.batch_size or run.batch_size}
    shares = {len(range(rank, batch, processes)) for batch in batches for rank in range(processes)}
    return min(len(torch.empty(share).chunk(run.accumulate)[-1]) for share in shares)


def check_parts(run: Run, distiller: Distiller, num_samples: int, *, processes: int = 1) -> None:
    """``ConfigError`` if a part of a batch is too small for the method, or is one sample and there is batch norm."""
    smallest = smallest_part(run, num_samples, processes=processes)
    needs = distiller.method.needs
    least = max(needs.min_batch, 2 if needs.teacher_batch_statistics else 1)
    divided = f", over {processes} processes" * (processes > 1)
    divided += f", in {run.accumulate} parts each" * (run.accumulate > 1)
    leave = f"{num_samples} samples in batches of {run.batch_size}{divided} leave a last batch of "
    leave += "one" if smallest == 1 else str(smallest)
    if smallest < least:
        raise ConfigError(
            f"method={run.method['name']} needs at least {least} samples a batch, but {leave}; {_another_batch(run)}"
        )
    norms = [name for name, module in distiller.named_modules() if isinstance(module, BATCH_NORMS) and module.training]
    if smallest < 2 and norms:
        raise ConfigError(
            f"{leave}, on which batch norm is undefined ({norms[0]} is one of {len(norms)}); {_another_batch(run)}"
        )


def _another_batch(run: Run) -> str:
    return "choose another batch_size" + ", or a smaller accumulate" * (run.accumulate > 1)


def _check_kind(ready: Ready, role: str) -> None:
    """``ConfigError`` for a network in which no hook can be set, or whose tensors a run cannot train and restore."""
    network, name = ready.network, f"{role} {ready.card.architecture}"
    if isinstance(network, torch.jit.ScriptModule):
        raise ConfigError(f"{name} is a ScriptModule, whose features cannot be read; give the module it was made of")
    for tensor, value in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(value):
            raise ConfigError(f"{name}: {tensor!r} has no shape yet; run the network once on an image")
        if isinstance(value, nn.Parameter) and value.is_floating_point() and value.dtype != torch.float32:
            raise ConfigError(
                f"{name}: {tensor!r} is {value.dtype}, but weights are kept in torch.float32; call float() on the "
                "network, and give precision=bfloat16 or float16 to compute in half of it"
            )
        strides = value.stride() if value.layout is torch.strided else ()
        if any(stride == 0 and size > 1 for stride, size in zip(strides, value.shape, strict=False)):
            raise ConfigError(
                f"{name}: the elements of {tensor!r} share memory (it was made by expand), so that it cannot be "
                "restored; register a clone() of it"
            )


def _check_student(ready: Ready) -> None:
    """``ConfigError`` if there is nothing to train, or two parameters share memory without being one."""
    parameters = dict(ready.network.named_parameters())
    if not any(parameter.requires_grad for parameter in parameters.values()):
        state = f"all {len(parameters)} are frozen (requires_grad is False)" if parameters else "it has none"
        raise ConfigError(
            f"student {ready.card.architecture} has no parameter to train: {state}; call requires_grad_(True) on what "
            "is to learn"
        )
    common = common_memory(parameters.items())
    if common is not None:
        raise ConfigError(
            f"the student's parameters {common[0]!r} and {common[1]!r} lie in the same memory but are two: each would "
            "be updated on its own. Tie them by using one nn.Parameter in both places"
        )


def _check_phases(distiller: Distiller, name: str) -> None:
    """``ConfigError`` if a phase trains groups without a parameter that may move."""
    groups = {"student": distiller.student, "method": distiller.method}
    for phase in distiller.method.phases:
        if not any(p.requires_grad for group in phase.trained for p in groups[group].parameters()):
            raise ConfigError(
                f"method={name}: phase {phase.name!r} trains {' and '.join(phase.trained) or 'nothing'}, which has no "
                "parameter to train"
            )
