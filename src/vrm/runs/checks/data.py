"""Checks of the data and of how they fit the networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vrm.config import Run
from vrm.data import BadData, DataSet, Store, describe_spread
from vrm.engine.distribution import ALONE, World
from vrm.runs.assembly import Assembly
from vrm.runs.checks.table import Check
from vrm.runs.plan import Plan
from vrm.wording import counted, listed, shape_in_words

SAMPLE = 64
"""Number of images of each split that are read."""


def check_data(data: DataSet) -> tuple[Check, ...]:
    """Read a sample of each split and count the classes."""
    return tuple(_check_split(name, store, data) for name, store in (("train", data.train), ("test", data.test)))


def _check_split(name: str, store: Store, data: DataSet) -> Check:
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
    counts = targets.bincount(minlength=store.num_classes)
    if name == "train" and int((counts > 0).sum()) < 2:
        found = f"{counted(len(store), 'image')}, all of class {store.classes[int(counts.argmax())]!r}"
        return Check("train data", "fail", found, "nothing can be learned of one class; give images of two or more")
    chosen = torch.arange(min(SAMPLE, len(store)), device=store.targets.device) * len(store) // min(SAMPLE, len(store))
    try:
        images = store.batch(chosen)
    except BadData as error:  # its message says what to do
        return Check(f"{name} data", "fail", str(error))
    except (ValueError, OSError) as error:
        return Check(f"{name} data", "fail", f"an image cannot be read: {error}", "repair it, or data.bad_images=skip")
    text = f"{counted(len(store), 'image')} of {shape_in_words(store.image_size)}, {len(images)} of them read; "
    text += f"{counted(store.num_classes, 'class', 'classes')}, {describe_spread(store)}"
    absent = [store.classes[label] for label in (counts == 0).nonzero()]
    oddities = [f"no image of {counted(len(absent), 'class', 'classes')} ({listed(absent)})"] * bool(absent)
    oddities += ["the images read are of one colour"] * bool((images == images.flatten()[0]).all())
    oddities += [f"{counted(len(store.skipped), 'unreadable image')} left out"] * bool(store.skipped)
    oddities += ["floats, which networks see as they are, normalised by mean and std"] * images.is_floating_point()
    for channel, std, values in zip(("red", "green", "blue"), data.std, images.unbind(1), strict=True):
        if std == 1 and bool((values == values.flatten()[0]).all()):
            oddities.append(f"the {channel} channel never varies: its standard deviation is taken as 1")
    return Check(f"{name} data", "note" if oddities else "ok", "; ".join([text, *oddities]))


def check_batches(assembly: Assembly, plan: Plan, world: World = ALONE) -> Check:
    """Say how an epoch is cut into steps."""
    run, num = assembly.run, plan.num_samples
    text = f"{num:,} images in batches of {run.batch_size}: {counted(plan.steps_per_epoch, 'step')} an epoch"
    if num < run.batch_size:
        return Check("batches", "note", f"{text}, as there are fewer images than batch_size")
    text += f", the last of {num % run.batch_size}" if num % run.batch_size else ""
    text += f"; over {world.size} processes" if world.size > 1 else ""
    text += f"; each in {run.accumulate} parts" if run.accumulate > 1 else ""
    idle = []
    if run.steps is not None and run.steps > plan.num_steps:
        idle.append(f"steps={run.steps} has no effect, as the whole run has {counted(plan.num_steps, 'step')}")
    if world.size == 1 and run.timeout != Run.model_fields["timeout"].default:
        idle.append(f"timeout={run.timeout:g} has no effect, as the run is one process")
    return Check("batches", "note" if idle else "ok", "; ".join([text, *idle]))


def check_networks(assembly: Assembly) -> Check:
    """Say which networks meet which data, and which taps were matched. What cannot be was refused at assembly."""
    data, taps = assembly.data, assembly.taps
    cards = [("student", assembly.student.card)]
    cards += [("teacher", assembly.teacher_card)] if assembly.teacher_card is not None else []
    notes = []
    for role, card in cards:
        if card.classes != data.classes:
            place = next((i for i, (a, b) in enumerate(zip(card.classes, data.classes, strict=False)) if a != b), 0)
            notes.append(f"class {place} is {card.classes[place]!r} to the {role}, {data.classes[place]!r} in the data")
    text = ", ".join(f"{role} {card.architecture}" for role, card in cards)
    text += f" and {data.name}: {counted(data.num_classes, 'class', 'classes')}"
    matched = matched_taps(taps)
    text += f"; matched: {', '.join(matched)}" if matched else "; no taps to match"
    return Check("networks", "note" if notes else "ok", "; ".join([text, *notes]))


def matched_taps(taps: Mapping[str, Any]) -> list[str]:
    """Return the pairs of taps that a method matched, with their shapes, in words."""
    return [
        f"{s} {shape_in_words(taps['student'][s])} with {t} {shape_in_words(taps['teacher'][t])}"
        for s, t in taps.get("matched", ())
    ]
