"""Checks of the teacher: how good it is here, how images reach it, and that it answers alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vrm import models
from vrm.data import DataSet, Store
from vrm.engine.distribution import ALONE, World
from vrm.engine.evaluation import evaluate
from vrm.engine.process_state import undisturbed
from vrm.models import Card, FrozenTeacher
from vrm.runs.assembly import Assembly
from vrm.runs.checks.table import Check
from vrm.tasks import Task
from vrm.wording import counted, shape_in_words

WEAK_MARGIN = 1.0
"""Points of the primary score by which a teacher may fall short of its recorded score."""

HOPELESS = 0.1
"""Share of the way from chance to a perfect score below which a teacher is taken for one with wrong weights."""


def _teacher_of(assembly: Assembly) -> tuple[FrozenTeacher, Card]:
    """Return the teacher and its card. Raise ``ValueError`` for a run without one."""
    if assembly.teacher is None or assembly.teacher_card is None:
        raise ValueError("this run has no teacher to check")
    return assembly.teacher, assembly.teacher_card


def teacher_key(assembly: Assembly) -> str:
    """Return what a measured score belongs to: weights, images, and how these reach the network."""
    teacher, card = _teacher_of(assembly)
    weights = models.weights_hash(teacher.teacher.network)
    return f"{weights}/{assembly.data.test.hash}/{card.input_size}/{card.mean}/{card.std}"


def measure_teacher(
    assembly: Assembly,
    *,
    sample: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Evaluate the teacher on the test images, or on so many of them; return what ``teacher.json`` keeps."""
    (teacher, card), task = _teacher_of(assembly), assembly.task
    found = evaluate(teacher, assembly.data.test, task, sample=sample, on_batch=on_batch, world=world)
    return {
        "key": teacher_key(assembly),
        "architecture": card.architecture,
        "task": task.name,
        "recorded": card.scores,
        "scores": found,
        "images": min(sample or len(assembly.data.test), len(assembly.data.test)),
    }


def check_teacher(assembly: Assembly, record: Mapping[str, Any]) -> tuple[Check, ...]:
    """Hold the teacher's measured score against the recorded one, and look at its input and output.

    It fails ``WEAK_MARGIN`` points below what was recorded on the same data (on a sample, three standard errors
    more), or if it is ``HOPELESS``; ``teacher.allow_weak=true`` makes that a note.
    """
    (teacher, card), data, task = _teacher_of(assembly), assembly.data, assembly.task
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
        fix = f"check data and normalisation{_differences(card, data)}, or give teacher.allow_weak=true"
    elif measured < chance + HOPELESS * (metric.perfect - chance):
        problem = (
            f"the teacher's {metric.label} is {metric.text(measured)}, hardly above chance ({metric.text(chance)})"
        )
        fix = f"check weights, normalisation and class order{_differences(card, data)}, or give teacher.allow_weak=true"
    elif recorded is not None and same_data:
        text += f"; {metric.text(recorded)} recorded"
    elif recorded is not None:
        text += f"; {metric.text(recorded)} recorded on {card.data}, which is not compared"
    if problem and assembly.run.teacher is not None and assembly.run.teacher.allow_weak:
        score = Check("teacher", "note", f"{text}; {problem}: allowed by teacher.allow_weak=true")
    else:
        score = Check("teacher", "fail" if problem else "ok", problem or text, fix)
    return score, _check_input(card, data), _check_steady(teacher, data.test)


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


def _check_input(card: Card, data: DataSet) -> Check:
    """Say how images reach the teacher."""
    text = f"{shape_in_words(data.image_size)} images"
    if card.input_size != data.image_size:
        text += f" are resized to {shape_in_words(card.input_size)} for it, as its card says"
    same = (card.mean, card.std) == (data.mean, data.std)
    text += f"; mean {_short(card.mean)} and std {_short(card.std)}"
    text += ", those of the data" if same else f" of its card; the data have {_short(data.mean)} and {_short(data.std)}"
    return Check("teacher input", "ok", text)


def _check_steady(teacher: FrozenTeacher, store: Store) -> Check:
    """Check that the same images give the same, finite answer."""
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
