"""What is checked before a run trains: data, networks, teacher, one step of every phase, room on the disk.

Nothing that is checked is changed: parameters, buffers, attributes, random number generators and the run's folder are
afterwards what they were, so that a run is bitwise the same with and without it.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from vrm import config, models, tasks
from vrm.contract import Batch, DataInfo, Phase, Progress
from vrm.data import BadData, DataSet, Store, epoch_batches
from vrm.engine.distiller import autocast, run_teacher
from vrm.engine.distribution import ALONE, World
from vrm.engine.evaluation import evaluate
from vrm.engine.optimizers import build_optimizer
from vrm.engine.process_state import undisturbed
from vrm.engine.teacher_cache import TeacherCache, cache_key, check_method
from vrm.runs.assembly import Assembly
from vrm.runs.checkpoint import read_json
from vrm.runs.folder import RunError
from vrm.tasks import Task

Result = Literal["ok", "note", "fail"]

WEAK_MARGIN = 1.0
"""Points of the primary score by which a teacher may fall short of its recorded accuracy."""

HOPELESS = 0.1
"""A teacher that has come less far than this from chance to 100 % is taken for one with the wrong weights."""

SAMPLE = 64
"""Images of each split that are looked at."""

STYLES: Mapping[Result, str] = {"ok": "green", "note": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Check:
    """One row: what was checked, with what result, what was found, and (if it failed) what to do."""

    name: str
    result: Result
    detail: str
    fix: str = ""

    @property
    def text(self) -> str:
        """Finding and fix."""
        return f"{self.detail}; {self.fix}" if self.fix else self.detail


@dataclass(frozen=True)
class Preflight:
    """All checks of a run; ``teacher`` is what was measured of it, as ``teacher.json`` keeps it."""

    title: str
    checks: tuple[Check, ...]
    seconds: float
    teacher: dict[str, Any] | None = None

    @property
    def failures(self) -> tuple[Check, ...]:
        """The rows that failed."""
        return tuple(check for check in self.checks if check.result == "fail")

    def require(self) -> None:
        """``RunError`` with every failure, if there is one."""
        if self.failures:
            raise RunError("; ".join(check.text for check in self.failures))

    def show(self, console: Console) -> None:
        """Print a table on a terminal, a line for each check elsewhere."""
        title = f"{self.title}: checked in {self.seconds:.1f} s"
        if not console.is_terminal:
            for line in (title, *(f"  {c.name:<16}{c.result:<6}{c.text}" for c in self.checks)):
                console.print(line, highlight=False, soft_wrap=True, markup=False)
            return
        table = Table("check", "result", "found", box=SIMPLE, title=title, title_justify="left")
        for check in self.checks:
            style = STYLES[check.result]
            fix = f"\n{check.fix}" if check.fix else ""
            table.add_row(check.name, f"[{style}]{check.result}[/]", f"{_plain(check.detail)}[{style}]{_plain(fix)}[/]")
        console.print(table, highlight=False)


def _plain(text: str) -> str:
    """Text in which rich sees no markup."""
    from rich.markup import escape

    return escape(text)


def preflight(
    assembly: Assembly,
    path: Path,
    *,
    known: Mapping[str, Any] | None = None,
    sample: int | None = None,
    world: World = ALONE,
) -> Preflight:
    """Check a run that is about to train in the folder ``path``. Changes nothing, in memory or on disk.

    Args:
        assembly: The run.
        path: Its folder, which need not exist yet.
        known: The content of an earlier ``teacher.json``; the teacher is not measured again if it holds the same
            teacher on the same images.
        sample: Measure the teacher on so many test images; by default on all.
        world: The processes of the run. Each checks its own part; a failure of one is a failure of all.
    """
    started = time.perf_counter()
    checks = [*check_data(assembly.data), check_batches(assembly, world), check_networks(assembly)]
    record = None
    if assembly.teacher is not None:
        try:
            record, found = check_teacher(assembly, known=known, sample=sample, world=world)
        except BadData as error:
            if world.size > 1:  # the others are in the midst of the evaluation
                raise
            found = (Check("test data", "fail", str(error)),)
        checks += found
    tried = rehearse(assembly, world)
    checks += tried.checks
    if assembly.device.type == "cuda":
        checks.append(check_memory(assembly, tried))
    if world.main:
        checks.append(check_folder(path))
        checks.append(check_disk(assembly, path, tried.optimizer_bytes))
    failures = [check.text for check in checks if check.result == "fail"]
    for rank, texts in enumerate(world.gather(failures)):
        if texts and rank != world.rank:
            checks.append(Check("processes", "fail", f"process {rank}: {'; '.join(texts)}"))
    name = f"{assembly.run.method['name']} in {path}"
    return Preflight(name, tuple(checks), time.perf_counter() - started, record)


# ---- data and networks -----------------------------------------------------------------------------------------------


def check_data(data: DataSet) -> tuple[Check, ...]:
    """Read a sample of each split, count the classes."""
    return tuple(_check_split(name, store) for name, store in (("train", data.train), ("test", data.test)))


def _check_split(name: str, store: Store) -> Check:
    targets = store.targets.cpu()
    outside = torch.nonzero((targets < 0) | (targets >= store.num_classes)).flatten()
    if len(outside):
        row = int(outside[0])
        return Check(
            f"{name} data",
            "fail",
            f"image {row} has label {int(targets[row])}, but there are {store.num_classes} classes",
            f"labels go from 0 to {store.num_classes - 1}",
        )
    chosen = torch.arange(min(SAMPLE, len(store)), device=store.targets.device) * len(store) // min(SAMPLE, len(store))
    try:
        images = store.batch(chosen)
    except BadData as error:  # which says what to do
        return Check(f"{name} data", "fail", str(error))
    except (ValueError, OSError) as error:
        return Check(f"{name} data", "fail", f"an image cannot be read: {error}", "repair it, or data.bad_images=skip")
    counts = targets.bincount(minlength=store.num_classes)
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    height, width = store.image_size
    text = (
        f"{len(store):,} images of {height}x{width}, {len(images)} of them read; {store.num_classes} classes, from "
        f"{int(counts[smallest]):,} ({store.classes[smallest]}) to {int(counts[largest]):,} ({store.classes[largest]})"
    )
    oddities = [f"{int((counts == 0).sum())} classes have no image"] * bool((counts == 0).any())
    oddities += ["the images read are of one colour"] * bool((images == images.flatten()[0]).all())
    oddities += [f"{len(store.skipped):,} unreadable images were left out"] * bool(store.skipped)
    return Check(f"{name} data", "note" if oddities else "ok", "; ".join([text, *oddities]))


def check_batches(assembly: Assembly, world: World = ALONE) -> Check:
    """How an epoch is cut into steps."""
    run, num = assembly.run, len(assembly.data.train)
    steps, last = -(-num // run.batch_size), num % run.batch_size or min(run.batch_size, num)
    text = f"{num:,} images in batches of {run.batch_size}: {steps:,} steps an epoch"
    if num < run.batch_size:
        return Check("batches", "note", f"{text}, as there are fewer images than batch_size")
    text += f", the last of {last}" if last != run.batch_size else ""
    text += f"; over {world.size} processes" if world.size > 1 else ""
    text += f"; each in {run.accumulate} parts" if run.accumulate > 1 else ""
    return Check("batches", "ok", text)


def check_networks(assembly: Assembly) -> Check:
    """Classes of heads, teacher and data, and which taps were matched. What does not fit was refused at assembly."""
    data, taps = assembly.data, assembly.taps
    cards = [("student", assembly.student.card)]
    cards += [("teacher", assembly.teacher_card)] if assembly.teacher_card is not None else []
    notes = []
    for role, card in cards:
        if card.classes != data.classes:
            place = next((i for i, (a, b) in enumerate(zip(card.classes, data.classes, strict=False)) if a != b), 0)
            notes.append(f"class {place} is {card.classes[place]!r} to the {role}, {data.classes[place]!r} in the data")
    names = ", ".join(f"{role} {card.architecture}" for role, card in cards)
    matched = [
        f"{s} {_shape(taps['student'][s])} with {t} {_shape(taps['teacher'][t])}" for s, t in taps.get("matched", ())
    ]
    text = f"{names} and {data.name}: {data.num_classes} classes"
    text += f"; matched: {', '.join(matched)}" if matched else "; no taps to match"
    return Check("networks", "note" if notes else "ok", "; ".join([text, *notes]))


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def content_hashes(assembly: Assembly) -> dict[str, str | None]:
    """What a run is trained on and with, that its settings only name."""
    data, teacher = assembly.data, assembly.teacher
    return {
        "training data": data.train.hash,
        "test data": data.test.hash,
        "teacher": None if teacher is None else models.weights_hash(teacher.teacher.network),
    }


# ---- the teacher -----------------------------------------------------------------------------------------------------


def teacher_key(assembly: Assembly) -> str | None:
    """What a measured accuracy belongs to: weights, images, and how these reach the network. ``None``: no teacher."""
    teacher, card = assembly.teacher, assembly.teacher_card
    if teacher is None or card is None:
        return None
    weights = models.weights_hash(teacher.teacher.network)
    return f"{weights}/{assembly.data.test.hash}/{card.input_size}/{card.mean}/{card.std}"


def read_teacher_record(folder: Path) -> dict[str, Any] | None:
    """What an earlier start measured of the teacher; ``None`` if that is missing or damaged, to be measured again."""
    try:
        record = read_json(folder / "teacher.json")
        numbers = [float(value) for value in record["scores"].values()]
        whole = tasks.load(record["task"]).primary.key in record["scores"] and isinstance(record["key"], str)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole and all(map(math.isfinite, numbers)) else None


def check_teacher(
    assembly: Assembly,
    *,
    known: Mapping[str, Any] | None = None,
    sample: int | None = None,
    world: World = ALONE,
) -> tuple[dict[str, Any], tuple[Check, ...]]:
    """Measure the teacher's accuracy and hold it against the recorded one; what ``teacher.json`` keeps, and rows.

    It fails ``WEAK_MARGIN`` points below what was recorded on the same data (on a sample, three standard deviations
    more), or if it is ``HOPELESS``; ``teacher.allow_weak=true`` makes that a note. Needs a teacher.
    """
    teacher, card, data, task = assembly.teacher, assembly.teacher_card, assembly.data, assembly.task
    if teacher is None or card is None:
        raise ValueError("this run has no teacher to check")
    count = len(data.test) if sample is None else min(sample, len(data.test))
    key = teacher_key(assembly)
    if known is not None and known.get("key") == key:
        record, count = dict(known), len(data.test)
    else:
        found = evaluate(teacher, data.test, task, sample=sample, world=world)
        record = {
            "key": key,
            "architecture": card.architecture,
            "task": task.name,
            "recorded": card.scores,
            "scores": found,
        }
    text = f"teacher {card.architecture}: {task.describe(record['scores'])} on "
    text += f"{count:,} test images" if count == len(data.test) else f"{count:,} of {len(data.test):,} test images"
    metric, chance = task.primary, task.chance(card.num_classes)
    measured = record["scores"][metric.key]
    recorded = card.scores[metric.key] if card.scores is not None else None
    same_data = (card.data, card.classes) == (data.name, data.classes)
    problem, fix = "", ""
    if recorded is not None and same_data and measured < recorded - _margin(task, recorded, count, len(data.test)):
        problem = f"the teacher reaches {metric.text(measured)} here, but {metric.text(recorded)} was recorded with "
        problem += "its weights"
        fix = f"check data and normalisation{_differences(assembly)}, or give teacher.allow_weak=true"
    elif measured < chance + HOPELESS * (metric.perfect - chance):
        problem = (
            f"the teacher's {metric.label} is {metric.text(measured)}, hardly above chance ({metric.text(chance)})"
        )
        fix = f"check weights, normalisation and class order{_differences(assembly)}, or give teacher.allow_weak=true"
    elif recorded is not None and same_data:
        text += f"; {metric.text(recorded)} recorded"
    elif recorded is not None:
        text += f"; {metric.text(recorded)} recorded on {card.data}, which is not compared"
    allowed = assembly.run.teacher is not None and assembly.run.teacher.allow_weak
    if problem and allowed:
        accuracy = Check("teacher", "note", f"{text}; {problem}: allowed by teacher.allow_weak")
    else:
        accuracy = Check("teacher", "fail" if problem else "ok", problem or text, fix)
    return record, (accuracy, _check_input(assembly), _check_steady(assembly))


def _margin(task: Task, recorded: float, count: int, whole: int) -> float:
    return WEAK_MARGIN + (3 * task.standard_error(recorded, count) if count < whole else 0.0)


def _differences(assembly: Assembly) -> str:
    """How the teacher's card differs from the data, in brackets."""
    card, data = assembly.teacher_card, assembly.data
    if card is None:
        return ""
    pairs = (
        ("mean", card.mean, data.mean),
        ("std", card.std, data.std),
        ("input size", card.input_size, data.image_size),
        ("data", card.data, data.name),
    )
    found = [f"{name} {_short(a)}, the data's {_short(b)}" for name, a, b in pairs if a != b]
    return f" (its {'; its '.join(found)})" if found else ""


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(f"{x:.4g}" for x in value) + ")"
    return str(value)


def _check_input(assembly: Assembly) -> Check:
    """How images reach the teacher."""
    card, data = assembly.teacher_card, assembly.data
    if card is None:
        raise ValueError("this run has no teacher to check")
    (height, width), (own_height, own_width) = data.image_size, card.input_size
    text = f"{height}x{width} images"
    if card.input_size != data.image_size:
        text += f" are resized to {own_height}x{own_width} for it, as its card says"
    same = (card.mean, card.std) == (data.mean, data.std)
    text += f"; mean {_short(card.mean)} and std {_short(card.std)}"
    text += ", those of the data" if same else f" of its card; the data have {_short(data.mean)} and {_short(data.std)}"
    return Check("teacher input", "ok", text)


def _check_steady(assembly: Assembly) -> Check:
    """The same images must give the same, finite answer."""
    teacher, store = assembly.teacher, assembly.data.test
    if teacher is None:
        raise ValueError("this run has no teacher to check")
    images = store.batch(torch.arange(min(8, len(store)), device=store.targets.device))
    with undisturbed(teacher):
        first, second = (teacher(images).logits.float() for _ in range(2))
    if not bool(torch.isfinite(first).all()):
        return Check("teacher output", "fail", "the teacher's logits are not finite", "give other weights")
    scale, change = float(first.abs().max()), float((first - second).abs().max())
    if change > 1e-3 * scale:
        return Check(
            "teacher output",
            "fail",
            f"the teacher answers the same images differently each time (by {change:.3g} in logits up to {scale:.3g}), "
            "although it is in eval mode",
            "switch off what it draws at random: F.dropout(x, training=self.training), or nn.Dropout",
        )
    return Check("teacher output", "ok", "finite, and the same for the same images")


# ---- one step of every phase -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rehearsal:
    """What trying one forward and backward pass of every phase showed.

    ``optimizer_bytes``: of the largest phase's momenta; ``peak_bytes``: of device memory, on CUDA.
    """

    checks: tuple[Check, ...]
    optimizer_bytes: int = 0
    peak_bytes: int = 0


def rehearse(assembly: Assembly, world: World = ALONE) -> Rehearsal:
    """One forward and backward pass on the first and on the last batch of epoch 1, in every phase, at full precision
    of the run; and its optimiser made. Leaves everything as it was.
    """
    checks: list[Check] = []
    reached: set[nn.Parameter] = set()
    trained: set[nn.Parameter] = set()
    optimizer_bytes = 0
    cuda = assembly.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(assembly.device)
    groups = assembly.learnable
    networks = [assembly.distiller] + ([assembly.teacher] if assembly.teacher is not None else [])
    with undisturbed(*networks):
        assembly.distiller.train()
        for phase in assembly.method.phases:
            for name, parameters in groups.items():
                for parameter in parameters:
                    parameter.requires_grad_(name in phase.trained)
            moving = [p for p in assembly.distiller.parameters() if p.requires_grad]
            trained.update(moving)
            try:
                optimizer = build_optimizer(assembly.run.optimizer, moving, assembly.method)
                optimizer_bytes = max(optimizer_bytes, _state_bytes(optimizer))
                del optimizer
                checks.append(_try_phase(assembly, phase, moving, reached, world))
            except torch.OutOfMemoryError as error:
                text = f"{_named(phase, assembly)}: {str(error).splitlines()[0]}"
                checks.append(Check("one step", "fail", text, "lower batch_size, or give accumulate=2 or more"))
            except (ValueError, RuntimeError) as error:
                fix = "" if isinstance(error, BadData) else "mend it there, or choose another network or method"
                checks.append(Check("one step", "fail", f"{_named(phase, assembly)}: {_told(error)}", fix))
    peak = torch.cuda.max_memory_allocated(assembly.device) if cuda else 0
    if cuda:
        torch.cuda.empty_cache()  # a recorded step has a memory pool of its own
    if not any(check.result == "fail" for check in checks):
        checks.append(_check_parameters(assembly, groups, trained, reached))
    return Rehearsal(tuple(checks), optimizer_bytes, peak)


def _told(error: Exception) -> str:
    """What an error says, in one line, and where it comes from."""
    if isinstance(error, BadData):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} ({Path(last.filename).name}, line {last.lineno})"


def _named(phase: Phase, assembly: Assembly) -> str:
    return f"phase {phase.name}" if len(assembly.method.phases) > 1 else "forward and backward"


def _try_phase(
    assembly: Assembly, phase: Phase, moving: Sequence[nn.Parameter], reached: set[nn.Parameter], world: World
) -> Check:
    """The row of one phase; ``reached`` gains the parameters that got a gradient."""
    run, distiller = assembly.run, assembly.distiller
    names = {parameter: name for name, parameter in distiller.named_parameters()}
    batches = epoch_batches(
        len(assembly.data.train), run.batch_size, seed=run.data_seed, epoch=1, device=assembly.device
    )
    parts = [world.part(batches[0]).chunk(run.accumulate)[0]]
    parts += [world.part(batches[-1]).chunk(run.accumulate)[-1]] if len(batches) > 1 else []
    found, bad = [], []
    feed = assembly.data.train.batches(
        parts, epoch=1, seed=run.data_seed, policy=assembly.policy, num_virtual=distiller.num_virtual
    )
    for index, *images in feed:
        terms, gradients = _forward_backward(assembly, phase, index, images, moving)
        total = float(terms.pop("total"))
        found.append(f"{len(index)}: loss {total:.4g}")
        bad += [f"loss term {name}" for name, value in terms.items() if not math.isfinite(value)]
        for parameter, gradient in gradients:
            reached.add(parameter)
            if not bool(torch.isfinite(gradient).all()):
                bad.append(f"gradient of {names[parameter]}")
    text = f"{_named(phase, assembly)} in {run.precision} on batches of " + ", ".join(found)
    if not bad:
        return Check("one step", "ok", f"{text}; loss and gradients finite")
    bad = list(dict.fromkeys(bad))
    text += f"; not finite: {', '.join(bad[:4])}" + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
    if run.nan == "stop":
        return Check("one step", "fail", text, "try precision=float32; check data and weights; or give nan=skip")
    return Check("one step", "note", f"{text}; nan={run.nan} goes on")


def _forward_backward(
    assembly: Assembly, phase: Phase, index_B: Tensor, images: Sequence[Tensor], moving: Sequence[nn.Parameter]
) -> tuple[dict[str, float], list[tuple[nn.Parameter, Tensor]]]:
    """Loss terms (and their ``total``) of a batch, and the gradients that there are; then the method's memory moves."""
    run, distiller, store = assembly.run, assembly.distiller, assembly.data.train
    device, needs = assembly.device, assembly.method.needs
    progress = Progress(
        epoch=torch.ones((), dtype=torch.int64, device=device),
        step=torch.zeros((), dtype=torch.int64, device=device),
        num_epochs=phase.epochs or run.epochs,
        num_steps=sum(p.epochs or run.epochs for p in assembly.method.phases) * -(-len(store) // run.batch_size),
        phase=phase.name,
        seed=run.seed,
    )
    batch = Batch(index_B, store.targets[index_B])
    cropped = store.crops(assembly.policy)
    pixels = tuple(images) if cropped else images[0] if images else store.batch(index_B)
    views = assembly.policy(pixels, index_B, epoch=1, seed=run.data_seed, num_virtual=distiller.num_virtual)
    with autocast(run.precision, device):
        taught = run_teacher(assembly.teacher, views, needs)
        losses, student = distiller(views, taught, batch, progress, phase.terms)
    total = losses.total(names=phase.terms)
    wanted = [losses.total(role=role) for role in ("task", "distillation")] if needs.separate_gradients else [total]
    gradients: list[tuple[nn.Parameter, Tensor]] = []
    for loss in wanted:
        if not loss.requires_grad:
            raise ValueError(f"no active loss term leads to what this phase trains: {' and '.join(phase.trained)}")
        of_each = torch.autograd.grad(loss, moving, retain_graph=True, allow_unused=True)
        gradients += [(p, g) for p, g in zip(moving, of_each, strict=True) if g is not None]
    assembly.method.after_step(student, taught, batch, progress)
    terms = {name: float(term.value.detach()) for name, term in losses.items()}
    return terms | {"total": float(total.detach())}, gradients


def _check_parameters(
    assembly: Assembly,
    groups: Mapping[str, Sequence[nn.Parameter]],
    trained: set[nn.Parameter],
    reached: set[nn.Parameter],
) -> Check:
    """Count what is trained, and name what no loss term of any phase reaches."""
    parameters = dict(assembly.distiller.named_parameters())
    frozen = {n: p for n, p in assembly.student.network.named_parameters() if not p.requires_grad}
    counts = [f"{sum(p.numel() for p in group):,} of the {name}" for name, group in groups.items() if group]
    text = f"trained: {', '.join(counts)}"
    if frozen:
        text += f"; frozen: {sum(p.numel() for p in frozen.values()):,} of the student"
    if not any(parameter in reached for parameter in groups["student"]):
        return Check(
            "parameters", "fail", "no loss reaches the student: it would learn nothing", "choose another method"
        )
    lost = [name for name, parameter in parameters.items() if parameter in trained - reached]
    if lost:
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        return Check("parameters", "note", f"{text}; no loss reaches {', '.join(lost[:4])}{more}, which will not move")
    return Check("parameters", "ok", f"{text}; each gets a gradient")


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(_bytes(v) for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- memory and disk -------------------------------------------------------------------------------------------------


def check_memory(assembly: Assembly, tried: Rehearsal) -> Check:
    """What the run will need of the device, from what the rehearsal needed."""
    buffers = sum(_bytes(buffer) for buffer in assembly.distiller.buffers())
    copies = sum(_bytes(t) for t in assembly.student.network.state_dict().values())
    needed = tried.peak_bytes + tried.optimizer_bytes + buffers + copies * (1 + (assembly.run.ema is not None))
    free, total = torch.cuda.mem_get_info(assembly.device)
    available = free + torch.cuda.memory_reserved(assembly.device)
    text = f"about {_size(needed)} of the {_size(total)} of {torch.cuda.get_device_name(assembly.device)}"
    if needed > available:
        return Check("memory", "fail", f"{text}, of which {_size(available)} are free", "lower batch_size")
    return Check("memory", "ok", text)


def checkpoint_bytes(assembly: Assembly, optimizer_bytes: int) -> tuple[int, int]:
    """The tensors of one checkpoint, and of the student alone."""
    student = sum(_bytes(t) for t in assembly.student.network.state_dict().values())
    method = sum(_bytes(t) for t in assembly.method.state_dict().values())
    copies = 2 + (assembly.run.ema is not None)  # now, at its best, averaged
    return copies * student + method + optimizer_bytes, student


def check_disk(assembly: Assembly, path: Path, optimizer_bytes: int) -> Check:
    """Room for ``checkpoint.keep`` checkpoints and one being written, last and best weights, and the teacher's cache.

    What already lies there, of this run or in the cache, is counted as room.
    """
    run = assembly.run
    one, student = checkpoint_bytes(assembly, optimizer_bytes)
    weights = (2 + (run.ema is not None)) * student
    wanted = [
        (path, (run.checkpoint.keep + 1) * one + weights, f"{run.checkpoint.keep} + 1 checkpoints of {_size(one)}")
    ]
    if run.teacher is not None and run.teacher.cache is not None:
        views = 1 + assembly.distiller.num_virtual
        epochs = sum(phase.epochs or run.epochs for phase in assembly.method.phases)
        if run.steps is not None:
            epochs = min(epochs, -(-run.steps // -(-len(assembly.data.train) // run.batch_size)))
        size = 4 if run.teacher.cache_precision == "float32" else 2
        cached = len(assembly.data.train) * epochs * views * assembly.data.num_classes * size
        wanted.append((run.teacher.cache, cached, "the teacher's cache"))
    needed: dict[Path, int] = {}
    texts = []
    for folder, size, what in wanted:
        place = existing(folder)
        known = next((p for p in needed if p.stat().st_dev == place.stat().st_dev), place)
        needed[known] = needed.get(known, 0) + size - min(size, _lying(folder))
        texts.append(f"{_size(size)} for {what}")
    text = " and ".join(texts)
    short = [(place, size, free) for place, size in needed.items() if size > (free := shutil.disk_usage(place).free)]
    if short:
        place, size, free = short[0]
        halve = ", give teacher.cache_precision=float16" if run.teacher is not None and run.teacher.cache else ""
        fix = f"make room, lower checkpoint.keep{halve}, or give run=FOLDER on another disk"
        return Check("disk", "fail", f"{text}: {_size(size)} more are needed at {place}, {_size(free)} are free", fix)
    free = min(shutil.disk_usage(place).free for place in needed)
    return Check("disk", "ok", f"{text}; {_size(free)} are free")


def check_folder(path: Path) -> Check:
    """Whether the run's folder, or the one it will be made in, can be written."""
    place = existing(path)
    if not os.access(place, os.W_OK | os.X_OK):
        return Check("folder", "fail", f"{place} cannot be written", "give run=ANOTHER_FOLDER")
    return Check("folder", "ok", f"{path} can be written")


def teacher_cache(assembly: Assembly, world: World = ALONE) -> TeacherCache | None:
    """Return the cache that ``teacher.cache`` names, or None without one.

    Raise ``ConfigError`` if the method reads more than logits, or if the cache was made with other settings.
    """
    run, train, teacher, card = assembly.run, assembly.data.train, assembly.teacher, assembly.teacher_card
    if run.teacher is None or run.teacher.cache is None or teacher is None or card is None or assembly.probes is None:
        return None
    data = DataInfo(len(train), train.num_classes, run.batch_size, train.targets)
    check_method(config.build_method(run.method), *assembly.probes, data)
    return TeacherCache(
        run.teacher.cache,
        cache_key(
            run,
            teacher,
            architecture=card.architecture,
            policy=assembly.policy,
            data_hash=train.hash,
            device=assembly.device,
            processes=world.size,
        ),
        num_samples=len(train),
        num_classes=train.num_classes,
        num_views=1 + assembly.distiller.num_virtual,
        precision=run.teacher.cache_precision,
        device=assembly.device,
        world=world,
    )


def existing(path: Path) -> Path:
    """The nearest folder above (or at) a path that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def _lying(folder: Path) -> int:
    """Bytes of the large files in a folder."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".bin", ".npy"))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
