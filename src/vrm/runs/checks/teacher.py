"""Checks of the teacher: how good it is here, how images reach it, and that it answers alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vrm import models
from vrm.data import DataSet, Store
from vrm.engine.distribution import ALONE, World
from vrm.engine.evaluation import evaluate
from vrm.engine.process_state import undisturbed
from vrm.models import Card, FrozenTeacher, Preprocess
from vrm.runs.assembly import Assembly
from vrm.runs.checks.table import Check
from vrm.runs.inputs import CARD, describe_input
from vrm.runs.networks import LoadedNetwork
from vrm.tasks import Task
from vrm.wording import counted

Input = tuple[tuple[float, ...], tuple[float, ...], tuple[int, int]]
"""Mean and standard deviation of each channel, and (height, width)."""

WEAK_MARGIN = 1.0
"""Points of the primary score by which a teacher may fall short of its recorded score."""

HOPELESS = 0.1
"""Share of the way from chance to a perfect score below which a teacher is taken for one with wrong weights."""


USUAL_INPUTS = {
    "mean and std of ImageNet": models.IMAGENET,
    "mean and std of 0.5": ((0.5,) * 3, (0.5,) * 3),
    "no normalisation": ((0.0,) * 3, (1.0,) * 3),
}
"""Normalisations that networks are often trained with."""

AS_IS = "as it is"
"""The key of the teacher's own input in the record of those that were tried."""

TRIED = 200
"""Images on which a teacher of unknown input is tried with the usual ones."""


def _teacher_of(assembly: Assembly) -> tuple[FrozenTeacher, LoadedNetwork]:
    """Return the teacher, and its network with the card. Raise ``ValueError`` for a run without one."""
    if assembly.teacher is None or assembly.master is None:
        raise ValueError("this run has no teacher to check")
    return assembly.teacher, assembly.master


def teacher_key(assembly: Assembly) -> str:
    """Return what a measured score belongs to: weights, images, and how these reach the network."""
    teacher, master = _teacher_of(assembly)
    card, assumed = master.card, "assumed/" * _is_assumed(master)
    weights = models.weights_hash(teacher.teacher.network)
    contract = f"{card.input_size}/{card.antialias}/{card.mean}/{card.std}/{card.outputs}"
    return f"{weights}/{assembly.data.test.hash}/{assumed}{contract}"


def _is_assumed(master: LoadedNetwork) -> bool:
    """Return whether nobody said with which normalisation these weights were trained."""
    said = {CARD, "teacher.mean", "teacher.std"}
    return not {master.origins["mean"], master.origins["std"]} <= said


def measure_teacher(
    assembly: Assembly,
    *,
    sample: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Evaluate the teacher on the test images, or on so many of them; return what ``teacher.json`` keeps.

    Where its normalisation is assumed, ``tried`` holds what it reaches on a few images with the usual ones.
    """
    (teacher, master), task = _teacher_of(assembly), assembly.task
    card = master.card
    found = evaluate(teacher, assembly.data.test, task, sample=sample, on_batch=on_batch, world=world)
    return {
        "key": teacher_key(assembly),
        "architecture": card.architecture,
        "task": task.name,
        "recorded": card.scores,
        "scores": found,
        "images": min(sample or len(assembly.data.test), len(assembly.data.test)),
        "tried": _try_inputs(assembly, min(sample or TRIED, TRIED), world) if _is_assumed(master) else {},
    }


def _try_inputs(assembly: Assembly, sample: int, world: World) -> dict[str, float]:
    """Return the primary score on a few test images with the teacher's own input (``AS_IS``) and the usual ones."""
    (teacher, master), task, data = _teacher_of(assembly), assembly.task, assembly.data
    tapped, card = teacher.teacher, master.card
    inputs = {AS_IS: (card.mean, card.std, card.input_size), **_other_inputs(master, data)}
    own, found = tapped.preprocess, dict[str, float]()
    try:
        for name, (mean, std, size) in inputs.items():
            resized = None if size == data.image_size else size
            other = Preprocess(mean, std, resized, antialias=card.antialias is not False)
            tapped.preprocess = other if own is None else other.to(own.get_buffer("mean"))
            found[name] = evaluate(tapped, data.test, task, sample=sample, world=world)[task.primary.key]
    finally:
        tapped.preprocess = own
    return found


def _other_inputs(master: LoadedNetwork, data: DataSet) -> dict[str, Input]:
    """Return the usual inputs, and that of the data if the network runs on it, without the teacher's own."""
    card = master.card
    others: dict[str, Input] = {name: (*values, card.input_size) for name, values in USUAL_INPUTS.items()}
    others["the data's own mean, std and size"] = (data.mean, data.std, data.image_size)
    others["the images' size before the views"] = (card.mean, card.std, data.test.stored_size)
    if card.channels == 1:
        grey = models.grey_statistics
        others = {
            name: (mean if len(mean) == 1 else grey(mean), std if len(std) == 1 else grey(std), size)
            for name, (mean, std, size) in others.items()
        }
    own = (card.mean, card.std, card.input_size)
    sizes = {size for _, _, size in others.values()} - {card.input_size}
    refused = {size for size in sizes if not models.accepts(master.network, input_size=size, in_channels=card.channels)}
    return {name: each for name, each in others.items() if each != own and each[2] not in refused}


def check_teacher(assembly: Assembly, record: Mapping[str, Any]) -> tuple[Check, ...]:
    """Hold the teacher's measured score against the recorded one, and look at its input and output.

    It fails ``WEAK_MARGIN`` points below what was recorded on the same data (on a sample, three standard errors
    more), or if it is ``HOPELESS``; ``teacher.allow_weak=true`` makes that a note.
    """
    (teacher, master), data, task = _teacher_of(assembly), assembly.data, assembly.task
    card, suspicion = master.card, _suspicion(assembly, record)
    count, whole = record["images"], len(data.test)
    text = f"teacher {card.architecture}: {task.describe(record['scores'])} on "
    text += counted(count, "test image") if count == whole else f"{count:,} of {whole:,} test images"
    metric, chance = task.primary, task.chance(card.num_classes)
    measured = record["scores"][metric.key]
    recorded = card.scores[metric.key] if card.scores is not None else None
    same_data = (card.data, card.classes) == (data.name, data.classes)
    problem, fix = "", ""
    if recorded is not None and same_data and measured < recorded - _margin(task, recorded, count, whole):
        problem = f"the teacher reaches {metric.text(measured)} here, but {metric.text(recorded)} was recorded with "
        problem += "its weights"
        fix = f"check data and normalisation{_differences(card, data)}{suspicion}, or give teacher.allow_weak=true"
    elif measured < chance + HOPELESS * (metric.perfect - chance):
        problem = (
            f"the teacher's {metric.label} is {metric.text(measured)}, hardly above chance ({metric.text(chance)})"
        )
        fix = f"check weights, class order and normalisation{_differences(card, data)}{suspicion}, or give "
        fix += "teacher.allow_weak=true"
    elif recorded is not None and same_data:
        text += f"; {metric.text(recorded)} recorded"
    elif recorded is not None:
        text += f"; {metric.text(recorded)} recorded on {card.data}, which is not compared"
    if problem and assembly.run.teacher is not None and assembly.run.teacher.allow_weak:
        score = Check("teacher", "note", f"{text}; {problem}: allowed by teacher.allow_weak=true")
    else:
        score = Check("teacher", "fail" if problem else "ok", problem or text, fix)
    input_check = Check("teacher input", "note" if suspicion else "ok", describe_input(master, data) + suspicion)
    return score, input_check, _check_output(teacher, data.test)


def _suspicion(assembly: Assembly, record: Mapping[str, Any]) -> str:
    """Return a sentence, after a semicolon, if the teacher does much better with another of the usual inputs."""
    (_, master), task, tried = _teacher_of(assembly), assembly.task, dict(record["tried"])
    here = tried.pop(AS_IS, None)
    best = max(tried, key=tried.__getitem__, default="")
    count, metric = min(TRIED, record["images"]), task.primary
    if here is None or not best or tried[best] < here + WEAK_MARGIN + 3 * task.standard_error(here, count):
        return ""
    mean, std, (height, width) = _other_inputs(master, assembly.data)[best]
    words = f"teacher.mean={numbers_as_typed(mean)} teacher.std={numbers_as_typed(std)}"
    words += f" teacher.size={height}" * ((height, width) != master.card.input_size and height == width)
    return (
        f"; its normalisation or size is a suspect: on {count} images it reaches {metric.text(tried[best])} with "
        f"{best} instead of {metric.text(here)}; if it was trained so, give {words}"
    )


def numbers_as_typed(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:.4g}' for value in values)}]"


def _margin(task: Task, recorded: float, count: int, whole: int) -> float:
    return WEAK_MARGIN + (3 * task.standard_error(recorded, count) if count < whole else 0.0)


def _differences(card: Card, data: DataSet) -> str:
    """Return how the teacher's card differs from the data, in brackets."""
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


def _check_output(teacher: FrozenTeacher, store: Store) -> Check:
    """Check that the same images give the same, finite answer, of logits or else of what it was said to be."""
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
    return check_kind("teacher", first, teacher.teacher.probabilities)


def check_kind(role: str, logits: Tensor, probabilities: bool) -> Check:
    """Check whether what a network returns are probabilities, as was said or not."""
    name, text = f"{role} output", "finite, and the same for the same images"
    values = logits.exp() if probabilities else logits
    looks_so = bool((values >= 0).all()) and bool(((values.sum(1) - 1).abs() < 1e-2).all()) and logits.shape[1] > 1
    if probabilities and not looks_so:
        found = f"{role}.outputs=probabilities, but what it returns does not add up to 1 for each image"
        return Check(name, "fail", found, "leave that out, or give logits")
    if looks_so and not probabilities:
        found = (
            "its outputs look like probabilities (none below 0, and they add up to 1 for each image), as of a softmax"
        )
        return Check(name, "note", f"{found}, but are taken for logits; give {role}.outputs=probabilities")
    return Check(name, "ok", text + ", probabilities taken for their logarithms" * probabilities)
