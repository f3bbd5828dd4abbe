"""Trains one run: it goes on from the newest checkpoint of its folder, or from the start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vrm import models
from vrm.config import ConfigError
from vrm.contract import Method
from vrm.data import BadData, epoch_batches
from vrm.engine.cuda_graphs import CudaGraphRecorder, RecordedFunction
from vrm.engine.distribution import ALONE, World, explained
from vrm.engine.evaluation import Stopped, evaluate
from vrm.engine.optimizers import learning_rate
from vrm.engine.step import Step
from vrm.engine.teacher_cache import TeacherCache
from vrm.files import write_json
from vrm.runs.assembly import Assembly, check_parts
from vrm.runs.checkpoint import Checkpoint
from vrm.runs.checks.start import check_start, open_teacher_cache
from vrm.runs.display import Display
from vrm.runs.environment import Facts
from vrm.runs.errors import Preempted, RunError
from vrm.runs.folder import ENVIRONMENT, SKIPPED, TAPS, TEACHER, RunFolder, read_teacher_record
from vrm.runs.keeper import Keeper
from vrm.runs.networks import attach_taps
from vrm.runs.phase import build_step, freeze_for, why_eager
from vrm.runs.plan import Stretch
from vrm.runs.recorder import Recorder, RollBack
from vrm.runs.resumption import Resumption
from vrm.runs.signals import on_stop_signal
from vrm.runs.state import TrainingState
from vrm.wording import counted


class Trainer:
    """One run, from where :class:`~vrm.runs.resumption.Resumption` says to its end."""

    def __init__(
        self,
        assembly: Assembly,
        facts: Facts,
        folder: RunFolder | None,
        *,
        console: Console,
        quiet: bool = False,
        world: World = ALONE,
    ) -> None:
        """Train ``assembly`` in place. ``folder`` is open in the main process, None in others.

        Raise ``ConfigError`` for what cannot be divided over processes or parts of a batch.
        """
        self.assembly, self.facts, self.plan, self.folder = assembly, facts, facts.plan, folder
        self.console, self.quiet, self.world = console, quiet or not world.main, world
        self.run = assembly.run
        check_parts(self.run, assembly.distiller, len(assembly.data.train), processes=world.size)
        if world.size > 1 and type(assembly.method).after_step is not Method.after_step:
            raise ConfigError(
                f"method={self.run.method['name']} keeps a memory of the training set, which {world.size} processes "
                "would each fill with their own share only; run it in one process"
            )
        self.state = TrainingState.of(assembly)
        self.stopping = False

    def train(self, found: Resumption) -> dict[str, Any]:
        """Train to the end; return the content of ``model.json``. Raise ``Preempted`` when told to stop."""
        if found.checkpoint is None and found.card is not None:
            return self._load_finished(dict(found.card))
        torch.manual_seed(self.run.seed + 1_000_003 * self.world.rank)
        notes = [*found.notes, *self._describe(resumed=found.checkpoint is not None)]
        self._check()
        cache = open_teacher_cache(self.assembly, self.world)
        title, total, done = self.run.method["name"], self.plan.last_step, found.step
        with Display(self.console, title=title, total=total, done=done, unit="steps", quiet=self.quiet) as display:
            self.display = display
            self.keeper = Keeper(self.assembly, self.state, self.facts, self.folder, self.world, display.warn)
            self.recorder = Recorder(self.assembly, self.plan, self.state, self.folder, self.world, display)
            for text in notes:
                display.warn(text)
            self._announce(found.checkpoint, cache)
            with on_stop_signal(self._stop), self._parameters_unfrozen():
                self._train_with_rollback(found.checkpoint, cache)
        self.recorder.close()
        return self.keeper.finish()

    # ---- before the first step

    def _load_finished(self, card: dict[str, Any]) -> dict[str, Any]:
        """Load the weights of a finished run whose checkpoints were removed since; write nothing."""
        try:
            models.load_weights(self.assembly.student.network, self.run.run / "model.safetensors")
        except ValueError as error:
            raise RunError(f"{self.run.run} is finished and has no checkpoints, but {error}") from None
        return card

    def _describe(self, *, resumed: bool) -> list[str]:
        """Write what is trained with what; of a resumed run only what is missing or damaged, which is returned."""
        if self.folder is None:
            return []
        data = self.assembly.data
        skipped = {"train": data.train.skipped, "test": data.test.skipped}
        files = {ENVIRONMENT: self.facts.environment, TAPS: self.assembly.taps}
        if any(skipped.values()):
            files[SKIPPED] = skipped
        if not resumed:
            self.folder.rewind(None, last_step=self.plan.last_step)
        return [text for name, content in files.items() for text in self.folder.write_once(name, content, keep=resumed)]

    def _check(self) -> None:
        """Check that all is in place, show it, and stop at what is not; keep what was measured of the teacher."""
        folder = self.folder
        known = self.world.from_main(None if folder is None else read_teacher_record(folder.path))
        report = check_start(
            self.assembly,
            self.plan,
            self.run.run,
            known=known,
            world=self.world,
            console=self.console,
            quiet=self.quiet,
            keep=lambda record: None if folder is None else write_json(folder.path / TEACHER, record),
        )
        if not self.quiet:
            report.show(self.console)
        report.require()

    def _announce(self, checkpoint: Checkpoint | None, cache: TeacherCache | None) -> None:
        if checkpoint is not None:
            self.display.note(f"resuming {self.run.run} at step {checkpoint.step} of {self.plan.last_step}")
        if self.assembly.device.type == "cuda":
            reason = why_eager(self.assembly, self.world)
            self.display.note("the step is recorded as a CUDA graph" if reason is None else f"eager: {reason}")
        if cache is not None:
            cache.tell = self.display.warn
            self.display.note(cache.describe())

    # ---- the loop

    def _train_with_rollback(self, checkpoint: Checkpoint | None, cache: TeacherCache | None) -> None:
        while True:
            try:
                return self._train_from(checkpoint, cache)
            except RollBack:
                before = self.state.step
                checkpoint = self.keeper.roll_back()
                self.display.step(checkpoint.step - before)

    def _train_from(self, checkpoint: Checkpoint | None, cache: TeacherCache | None) -> None:
        """Train to the last step, from a checkpoint or from the networks as they are."""
        state, plan, recorder = self.state, self.plan, self.recorder
        if checkpoint is not None:
            self.keeper.restore(checkpoint)
        recorder.start_interval()
        clock = time.perf_counter()
        self._evaluate_again()
        step: Step | None = None
        while state.step < plan.last_step:
            epoch = plan.epoch_at(state.step)
            stretch = plan.stretch_at(epoch)
            if step is None or step.phase is not stretch.phase:
                step = self._enter(stretch, step, checkpoint, cache)
                call = self._record(step)
                checkpoint = None
            with self._keeping_what_was_learned(step):
                for weight, (index, *images) in self._batches(step, epoch, stretch):
                    self._set_rate(step, stretch, epoch)
                    step.weight = weight
                    with explained():
                        call(index, *images)
                    state.step += 1
                    self.display.step()
                    at_end = plan.ends_epoch(state.step)
                    if at_end or state.step % plan.steps_per_epoch % self.run.log_every == 0:
                        recorder.read(step, epoch)
                        if at_end:
                            self._evaluate(epoch)
                        recorder.show(line=at_end)
                    if at_end and cache is not None:
                        cache.end(epoch)
                    stopping = self.world.any(self.stopping)
                    if stopping or self._checkpoint_is_due(at_end):
                        now = time.perf_counter()
                        state.seconds["all"], clock = state.seconds["all"] + now - clock, now
                        self.keeper.save(step)
                    if stopping:
                        raise self._preempted()

    def _enter(
        self, stretch: Stretch, before: Step | None, checkpoint: Checkpoint | None, cache: TeacherCache | None
    ) -> Step:
        """Build the step of a phase; restore its momenta from a checkpoint of that phase."""
        freeze_for(self.assembly, stretch)
        if len(self.plan.stretches) > 1:
            self.display.note(f"phase {stretch.phase.name}: {counted(stretch.epochs, 'epoch')}")
        step = build_step(
            self.assembly,
            self.plan,
            stretch,
            self.state,
            world=self.world,
            cache=cache,
            optimizer=before.optimizer if before is not None and not stretch.phase.fresh_optimizer else None,
        )
        if checkpoint is not None and checkpoint.state["phase"] == stretch.phase.name:
            self.keeper.restore_phase(step, checkpoint)
        elif self.state.step == 0 and self.run.nan == "rollback":
            self.keeper.save(step)
        return step

    def _record(self, step: Step) -> Callable[..., None]:
        """Return the step, recorded as a CUDA graph where that can be; a recording belongs to one phase."""
        if why_eager(self.assembly, self.world) is not None:
            return step
        recorder = CudaGraphRecorder(self.assembly.device)
        return RecordedFunction(step, recorder, variant=lambda: step.variant)

    def _batches(self, step: Step, epoch: int, stretch: Stretch) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
        """Yield the rest of an epoch: this process's part of each batch, and its weight in the mean over processes."""
        run, data, first = self.run, self.assembly.data.train, self.state.step % self.plan.steps_per_epoch
        step.progress.epoch.fill_(epoch - stretch.first + 1)
        step.epoch.fill_(epoch)
        self.assembly.distiller.train()
        order = epoch_batches(len(data), run.batch_size, seed=run.data_seed, epoch=epoch, device=self.assembly.device)[
            first : first + self.plan.last_step - self.state.step
        ]
        if step.cache is not None:
            step.cache.begin(epoch)
        parts = data.batches(
            [self.world.part(batch) for batch in order],
            epoch=epoch,
            seed=run.data_seed,
            policy=self.assembly.policy,
            num_virtual=self.assembly.distiller.num_virtual,
        )
        yield from zip((self.world.weight(batch) for batch in order), parts, strict=True)

    def _set_rate(self, step: Step, stretch: Stretch, epoch: int) -> None:
        rate = learning_rate(
            self.run.schedule,
            self.run.optimizer.lr,
            stretch.phase,
            epoch=epoch - stretch.first + 1,
            step=self.state.step - (stretch.first - 1) * self.plan.steps_per_epoch,
            epochs=stretch.epochs,
            steps_per_epoch=self.plan.steps_per_epoch,
        )
        for group in step.optimizer.param_groups:
            group["lr"].fill_(self.state.rate_scale * rate)

    def _checkpoint_is_due(self, at_end: bool) -> bool:
        every = self.run.checkpoint.every
        due = at_end if every is None else self.state.step % every == 0
        return due or self.state.step == self.plan.last_step

    @contextmanager
    def _keeping_what_was_learned(self, step: Step) -> Iterator[None]:
        """Write a checkpoint before data that cannot be used end the run."""
        try:
            yield
        except BadData:
            if self.state.step and self.world.size == 1:  # other processes are in the middle of a step
                self.keeper.save(step)
            raise

    # ---- evaluation

    def _evaluate(self, epoch: int) -> None:
        """Evaluate on the test images after an epoch; keep the best weights beside the last.

        Leave all as it is if the run is told to stop meanwhile: the epoch is evaluated when the run goes on.
        """
        started = time.perf_counter()
        assembly, state, sample = self.assembly, self.state, self._sample
        self.world.copy_buffers(assembly.distiller)
        try:
            scores = self._measure(assembly.distiller.student, "the student")
            if state.average is not None:
                averaged = replace(assembly.student, network=state.average.average)
                tapped = attach_taps(averaged, (), assembly.data.image_size).to(assembly.device)
                found = self._measure(tapped, "the average of its weights")
                tapped.close()
                scores |= {f"ema_{name}": value for name, value in found.items()}
        except Stopped:
            return
        comparable = state.best if state.best.get("images") == sample else {}
        better = assembly.task.is_better(scores, comparable)
        found = {**scores, "epoch": epoch} | ({} if sample is None else {"images": sample})
        state.last = dict(sorted(found.items()))  # in the order of a checkpoint's JSON
        if better:
            state.best = state.last
            self.keeper.save_best()
        self.recorder.evaluation(epoch, scores, time.perf_counter() - started)

    @property
    def _sample(self) -> int | None:
        """On how many test images networks are measured; None for all."""
        return self.plan.test_sample(len(self.assembly.data.test))

    def _measure(self, network: nn.Module, name: str) -> dict[str, float]:
        """Return the scores of a network, showing how far the evaluation is. Raise ``Stopped`` when told to stop."""
        test, sample, size = self.assembly.data.test, self._sample, self.world.size
        count = self.display.count(f"evaluating {name}", len(test) if sample is None else sample)
        return evaluate(
            network,
            test,
            self.assembly.task,
            sample=sample,
            on_batch=lambda images: count(images * size),
            stopping=lambda: self.stopping,
            world=self.world,
        )

    def _evaluate_again(self) -> None:
        """Evaluate an epoch that ended without, or on fewer images; raise ``Preempted`` when told to stop."""
        ended = self.state.step and self.plan.ends_epoch(self.state.step)
        epoch, last = self.plan.epoch_at(self.state.step - 1), self.state.last
        if ended and (last.get("epoch"), last.get("images")) != (epoch, self._sample):
            self._evaluate(epoch)
            if self.world.any(self.stopping):
                raise self._preempted()

    def _preempted(self) -> Preempted:
        return Preempted(f"stopped at step {self.state.step}; `vrm resume {self.run.run}` goes on")

    # ---- leaving the process as it was

    def _stop(self) -> None:
        """Stop the run after the current step; at the second call stop it at once."""
        if self.stopping:
            raise SystemExit(Preempted.exit_code)
        self.stopping = True

    @contextmanager
    def _parameters_unfrozen(self) -> Iterator[None]:
        """Let what a phase froze move again afterwards: the networks may be the caller's own."""
        try:
            yield
        finally:
            for parameters in self.assembly.learnable.values():
                for parameter in parameters:
                    parameter.requires_grad_(True)
