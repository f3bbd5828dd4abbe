"""From settings to objects: data, networks, method, all checked against each other before the first step."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from vrm import config, data, models
from vrm.config import ConfigError, Run
from vrm.contract import DataInfo, Method, Needs, Probe
from vrm.data import DataSet
from vrm.data.views import ViewPolicy, view_policy
from vrm.models import FrozenTeacher, Preprocess, TappedNetwork
from vrm.training.distiller import Distiller

if TYPE_CHECKING:
    from vrm.training.teacher_cache import TeacherCache

LOGICAL = re.compile(r"(stages?|stage\d+|last|stem|pooled|logits)(:pre)?")
"""Selectors that are no module paths."""


@dataclass(frozen=True)
class Card:
    """``model.json``: all that is needed to use a trained network elsewhere, for example as a teacher."""

    architecture: str
    options: dict[str, Any]
    num_classes: int
    classes: tuple[str, ...]
    input_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    top1: float | None = None
    data: str | None = None

    @staticmethod
    def read(folder: Path) -> Card:
        """The card in a run folder. ``ConfigError`` if there is none."""
        path = folder / "model.json"
        if not path.is_file():
            hint = (
                "the run has not finished: `vrm resume` it first"
                if (folder / "config.yaml").is_file()
                else "no run folder"
            )
            raise ConfigError(f"{folder} has no model.json ({hint})")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = {field: content[field] for field in Card.__dataclass_fields__}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged: {error}") from None
        known |= {name: tuple(known[name]) for name in ("classes", "input_size", "mean", "std")}
        return Card(**known)


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
    student: Ready
    teacher: FrozenTeacher | None
    teacher_card: Card | None
    distiller: Distiller
    taps: dict[str, Any]
    cache: TeacherCache | None = None

    @property
    def method(self) -> Method:
        """The distillation objective."""
        return self.distiller.method


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: no CUDA device is visible here; use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


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
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except ValueError as error:
            raise ConfigError(f"data={settings.name}: {error}") from None


def load_network(settings: config.Network, dataset: DataSet, *, role: str) -> Ready:
    """A network by name or from a run folder, with its weights where given."""
    try:
        if "/" in settings.name:
            folder = Path(settings.name)
            card = Card.read(folder)
            network = models.create(card.architecture, num_classes=card.num_classes, **card.options)
            models.load_weights(network, settings.weights or folder / "model.safetensors")
            return Ready(network, card)
        classes = dataset.num_classes
        network = models.create(settings.name, num_classes=classes, **settings.options)
        if settings.weights is not None:
            models.load_weights(network, settings.weights)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{role}={settings.name}: {error}") from None
    card = Card(
        settings.name,
        settings.options,
        classes,
        dataset.classes,
        dataset.image_size,
        dataset.mean,
        dataset.std,
        data=dataset.name,
    )
    return Ready(network, card)


def tapped(ready: Ready, taps: tuple[str, ...], image_size: tuple[int, int]) -> TappedNetwork:
    """The network behind its own normalisation (and, if it wants another size, resizing)."""
    size = None if ready.card.input_size == image_size else ready.card.input_size
    preprocess = Preprocess(ready.card.mean, ready.card.std, size)
    return TappedNetwork(ready.network, taps, preprocess, input_size=ready.card.input_size)


def describe(ready: Ready, extra: tuple[str, ...]) -> Probe:
    """Measure a network's taps."""
    raw = tuple(selector for selector in extra if not LOGICAL.fullmatch(selector))
    return models.probe(ready.network, name=ready.card.architecture, input_size=ready.card.input_size, extra_taps=raw)


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
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    tf32 = run.precision == "tf32"
    if tf32 and device.type != "cuda":
        raise ConfigError(
            f"precision=tf32 is a mode of NVIDIA GPUs, and this run is on {device}; use precision=float32"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic cuBLAS calls raise
    torch.use_deterministic_algorithms(run.deterministic and device.type == "cuda")
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
            check_classes(ready, dataset, role)
    _check_batches(run, needs, len(dataset.train), dataset.num_classes)

    torch.manual_seed(run.seed)
    shown: dict[str, Any] = {}
    taps: tuple[str, ...] = ()
    frozen = None
    try:
        if master is None:
            taps = describe(learner, needs.student_taps).resolve(needs.student_taps) if needs.student_taps else ()
        else:
            probes = describe(learner, needs.student_taps), describe(master, needs.teacher_taps)
            info = DataInfo(len(dataset.train), dataset.num_classes, run.batch_size, dataset.train.targets)
            method.build(*probes, info)
            shown = _describe_taps(*probes, method)
            taps = probes[0].resolve(needs.student_taps)
            frozen = FrozenTeacher(tapped(master, probes[1].resolve(needs.teacher_taps), dataset.image_size))
        distiller = Distiller(tapped(learner, taps, dataset.image_size), method, views=run.views)
    except ValueError as error:
        raise ConfigError(f"method={name} cannot work on this pair: {error}") from None

    distiller.to(device)
    if frozen is not None:
        frozen.to(device)
    for network in (distiller.student, *([frozen] if frozen is not None else [])):
        if run.channels_last:
            network.to(memory_format=torch.channels_last)
        if run.compile:
            network.compile(dynamic=False)
    return Assembly(
        run, device, dataset.to(device), policy, learner, frozen, master.card if master else None, distiller, shown
    )


def _describe_taps(student: Probe, teacher: Probe, method: Method) -> dict[str, Any]:
    """What a method reads of both networks, as ``taps.json`` keeps it."""
    needs = method.needs
    return {
        "student": {name: student.shapes[name] for name in student.resolve(needs.student_taps)},
        "teacher": {name: teacher.shapes[name] for name in teacher.resolve(needs.teacher_taps)},
        "matched": method.matched,
    }


def check_classes(ready: Ready, dataset: DataSet, role: str) -> None:
    """``ConfigError`` unless network and data have the same number of classes."""
    if ready.card.num_classes != dataset.num_classes:
        raise ConfigError(
            f"{role} {ready.card.architecture} has {ready.card.num_classes} classes, but {dataset.name} has "
            f"{dataset.num_classes}; give a {role} trained for this data"
        )


def given(network: nn.Module, dataset: DataSet) -> Ready:
    """A user's own module, expected to take this data's images."""
    name = f"{type(network).__module__}.{type(network).__qualname__}"
    card = Card(
        name, {}, dataset.num_classes, dataset.classes, dataset.image_size, dataset.mean, dataset.std, data=dataset.name
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


def _check_batches(run: Run, needs: Needs, num_samples: int, num_classes: int) -> None:
    name = run.method["name"]
    smallest = min(run.batch_size, num_samples, num_samples % run.batch_size or run.batch_size)
    if smallest < needs.min_batch:
        raise ConfigError(
            f"method={name} needs at least {needs.min_batch} samples a batch, but {num_samples} samples in batches of "
            f"{run.batch_size} leave a last one of {smallest}; choose another batch_size"
        )
    if smallest < 2:
        raise ConfigError(
            f"{num_samples} samples in batches of {run.batch_size} leave a last batch of one, on which batch norm is "
            "undefined; choose another batch_size"
        )
    if num_classes < needs.min_classes:
        raise ConfigError(f"method={name} needs at least {needs.min_classes} classes, the data have {num_classes}")
