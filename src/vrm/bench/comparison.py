"""The cost of a training step, methods side by side on one pair of networks, as in Table 10 of the VRM paper.

Every subject takes the step that training takes, recorded as a CUDA graph where training would record it. All take
turns, a few steps each, round after round, so that what else the machine does affects all; ratios are medians over the
rounds. Measured with them are cross entropy alone, KD, and the bare networks. Without ``data.root`` the images are made
up, and a teacher without weights is random. The student really trains.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vrm.bench.inputs import is_made_up, load_images, place_images, with_weights
from vrm.bench.peak_memory import measure_peak_memory
from vrm.bench.step_time import BareTimings, Prepared, Timings, prepare_subject
from vrm.bench.subjects import REFERENCES, Settings, Subject, list_subjects
from vrm.config import ConfigError
from vrm.data import DataSet
from vrm.engine.cuda_graphs import CudaGraphRecorder
from vrm.engine.devices import choose_device, processor_name
from vrm.engine.streams import SideStreams
from vrm.runs.environment import describe_environment
from vrm.wording import first_line


def measure_step(recipe: str, words: Sequence[str], settings: Settings, *, console: Console) -> dict[str, Any]:
    """Measure all methods in turns; return what the file ``out`` holds.

    Args:
        recipe: As for ``vrm distill``.
        words: Settings of runs, without a method. ``pair=TEACHER/STUDENT`` may be any pair; ``NAME.option=value`` is
            an option of the method NAME.
        settings: What to measure, and how often.
        console: Shows the progress.

    Raises:
        ConfigError: Settings that are refused. What a method cannot do on this pair is listed in the result.
    """
    subjects = list_subjects(recipe, words, settings)
    base = subjects[0].run
    dataset, placement = place_images(load_images(base.data, settings, console), base)
    with tempfile.TemporaryDirectory(prefix="vrm-bench-") as folder:
        named = {subject.run.teacher.name: subject.run.teacher for subject in subjects if subject.run.teacher}
        teachers = {name: with_weights(teacher, dataset, Path(folder)) for name, teacher in named.items()}
        comparison = _Comparison(settings, dataset, choose_device(base.device))
        for subject in subjects:
            run = subject.run
            if run.data.placement == base.data.placement:
                run = run.model_copy(update={"data": run.data.model_copy(update={"placement": placement})})
            if run.teacher is not None:
                weights = teachers[run.teacher.name].weights
                run = run.model_copy(update={"teacher": run.teacher.model_copy(update={"weights": weights})})
            comparison.subjects.append(replace(subject, run=run))
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar:
            comparison.prepare(bar)
            comparison.take_turns(bar)
            comparison.measure_memory(bar)
    teacher_name = next(iter(named), None)
    return {
        "what": "vrm bench step",
        "recipe": recipe,
        "words": list(words),
        "pair": f"{teacher_name}/{base.student.name}" if teacher_name else base.student.name,
        "made_up_images": is_made_up(base.data, settings),
        **comparison.result(),
    }


class _Comparison:
    """The subjects of one measurement, and what was measured of them."""

    def __init__(self, settings: Settings, dataset: DataSet, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.settings, self.dataset, self.device = settings, dataset, device
        self.rounds, self.steps = settings.rounds or (10 if cuda else 5), settings.steps or (20 if cuda else 3)
        self.subjects: list[Subject] = []
        self.prepared: list[Prepared] = []
        self.bare_timings: BareTimings = {}
        self.failed: list[dict[str, str]] = []
        self.notes: dict[str, str] = {}
        self.load = os.getloadavg()[0]

    def prepare(self, bar: Progress) -> None:
        """Build all steps; list those that cannot be built."""
        recorder = None
        if self.device.type == "cuda":
            recorder = CudaGraphRecorder(self.device)
            # Allocate the workspaces of streams and of the backward thread, which would count as the first step's.
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
                found = prepare_subject(subject, self.dataset, recorder=recorder, bare_timings=self.bare_timings)
                self.prepared.append(found)
            except (ValueError, RuntimeError) as error:
                self._fail(subject, error)
            bar.advance(task)

    def _fail(self, subject: Subject, error: Exception) -> None:
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        self.failed.append({"name": subject.name, "reason": kind + first_line(error)})
        error.__traceback__ = None  # its frames hold the memory that the subject took
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def take_turns(self, bar: Progress) -> None:
        """Give every subject and all bare networks one turn in each round."""
        task = bar.add_task("measuring", total=self.rounds * (len(self.prepared) + len(self.bare_timings)))
        for _ in range(self.rounds):
            for timings in self.bare_timings.values():
                timings.add_round(self.device, steps=self.steps, warmup=self.settings.warmup)
                bar.advance(task)
            for found in list(self.prepared):
                try:
                    found.timings.add_round(self.device, steps=self.steps, warmup=self.settings.warmup)
                except RuntimeError as error:
                    self.prepared.remove(found)
                    self._fail(found.subject, error)
                bar.advance(task)

    def measure_memory(self, bar: Progress) -> None:
        """On the CPU, measure each subject's peak memory in a process of its own."""
        if self.device.type == "cuda" or not self.settings.memory:
            return
        task = bar.add_task("memory", total=len(self.prepared))
        for found in self.prepared:
            found.peak, note = measure_peak_memory(found.subject, self.settings)
            if note:
                self.notes[found.subject.name] = note
            bar.advance(task)

    def _unchanged(self, method: str, phase: int | None = None) -> Timings | None:
        """Return the timings of a method without a change, in one of its phases; by default in its main one."""
        for found in self.prepared:
            here = found.subject.phase == phase if phase is not None else found.phase.epochs is None
            if found.subject.method == method and not found.subject.change and here:
                return found.timings
        return None

    def _row(self, found: Prepared) -> dict[str, Any]:
        subject, timings = found.subject, found.timings
        all_ms = torch.tensor(timings.all, dtype=torch.float64)
        median_ms = float(all_ms.quantile(0.5))
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
            "median_ms": median_ms,
            "p95_ms": float(all_ms.quantile(0.95)),
            "least_ms": float(all_ms.min()),
            "timed_steps": len(all_ms),
            "images_per_second": 1e3 * subject.run.batch_size / median_ms,
            "bare_networks_ms": None if found.bare is None else median(found.bare.all),
            "over_bare_networks": timings.over(found.bare),
            "over": {name: timings.over(self._unchanged(name)) for name in REFERENCES},
            "over_unchanged": timings.over(self._unchanged(subject.method, subject.phase)) if subject.change else None,
            "peak_memory_bytes": found.peak,
            "launches": found.launches,
            "shares": found.shares,
            "nonfinite_steps": float(found.step.meter.sums["nonfinite"]),
            "disagreement_of_forms": found.disagreement,
        }

    def result(self) -> dict[str, Any]:
        """Return everything that was measured, and how."""
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
            "environment": describe_environment(self.device) | {"processor": processor_name()},
            "load_average": [self.load, os.getloadavg()[0]],
            "rows": [self._row(found) for found in self.prepared],
            "failed": self.failed,
            "notes": self.notes,
        }
