"""The loop: epochs and phases, logs, checkpoints, evaluation; it starts where the run folder left off."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from vrm import models
from vrm.config import ConfigError
from vrm.contract import Method
from vrm.data import BadData, epoch_batches
from vrm.engine.cuda_graphs import CudaGraphRecorder, RecordedFunction
from vrm.engine.devices import device_name
from vrm.engine.distribution import ALONE, World, explained
from vrm.engine.evaluation import evaluate
from vrm.engine.guard import Average, Incident, LossScale
from vrm.engine.optimizers import learning_rate
from vrm.engine.step import Step
from vrm.runs.assembly import Assembly, check_parts, tapped
from vrm.runs.checkpoint import DamagedCheckpoint, NotWritten, read_checkpoint
from vrm.runs.checks.start import content_hashes, preflight, read_teacher_record, teacher_cache
from vrm.runs.display import Display
from vrm.runs.folder import SETTINGS, RunError, RunFolder, environment
from vrm.runs.phase import build_step, freeze_for, why_eager
from vrm.runs.plan import Plan, Stretch
from vrm.runs.snapshot import Saved, Snapshot, random_state, restore_phase, restore_random_state

ROLLBACK_FACTOR = 0.5
"""By how much ``nan=rollback`` lowers the learning rate each time."""

SMALLEST_RATE = 2.0**-6
"""The share of its schedule's rate at which a run that keeps meeting NaN gives up."""


class Preempted(Exception):
    """The run was told to stop (a signal), wrote a checkpoint and can be resumed."""

    exit_code = 75


class NonFinite(RuntimeError):
    """Training met NaN or infinity; the weights are those of the last finite step."""

    exit_code = 1


class _RollBack(Exception):
    """A non-finite step under ``nan=rollback``."""


class Training:
    """One run. :meth:`train` goes on from the newest checkpoint of its folder, or from the start."""

    def __init__(
        self,
        assembly: Assembly,
        folder: RunFolder | None,
        *,
        console: Console,
        quiet: bool = False,
        world: World = ALONE,
    ) -> None:
        """``assembly`` is trained in place; ``folder`` is open and locked by the main process, ``None`` in others."""
        self.assembly, self.console, self.quiet, self.world = assembly, console, quiet or not world.main, world
        self.run = assembly.run
        self._folder = folder
        check_parts(self.run, assembly.distiller, len(assembly.data.train), processes=world.size)
        if world.size > 1 and type(assembly.method).after_step is not Method.after_step:
            raise ConfigError(
                f"method={self.run.method['name']} keeps a memory of the training set, which {world.size} processes "
                "would each fill with their own share only; run it in one process"
            )
        self.plan = Plan.of(self.run, assembly.method.phases, len(assembly.data.train))
        self.step = 0
        self.rate_scale = 1.0
        self.best: dict[str, float] = {}
        self.best_weights: dict[str, Tensor] = {}
        self.last: dict[str, float] = {}
        self.seconds = {"all": 0.0, "training": 0.0, "evaluation": 0.0}
        self.incident = Incident(self.run.batch_size, assembly.device)
        network = assembly.student.network
        self.average = Average(network, deepcopy(network), self.run.ema) if self.run.ema else None
        self.averaged: nn.Module | None = None
        if self.average is not None:
            ready = replace(assembly.student, network=self.average.average)
            self.averaged = tapped(ready, (), assembly.data.image_size).to(assembly.device)
        self.loss_scale = LossScale.at_start(assembly.device) if self.run.precision == "float16" else None
        self.stopping = False
        self.tensorboard = tensorboard_writer(self.folder.path) if self.run.tensorboard and world.main else None

    @property
    def folder(self) -> RunFolder:
        """The run's folder, in the main process."""
        if self._folder is None:
            raise RuntimeError("only the main process of a distributed run has its folder open")
        return self._folder

    # ---- start ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the content of ``model.json``. Raises :class:`Preempted` when told to stop."""
        torch.manual_seed(self.run.seed + 1_000_003 * self.world.rank)
        self.hashes = content_hashes(self.assembly)
        saved = self._newest()
        if saved is not None:
            self._check_same(saved.state)
        elif (card := self.world.from_main(self.folder.card() if self.world.main else None)) is not None:
            return self._finished(card)
        self.told = self._describe(resumed=saved is not None) if self.world.main else []
        done = saved.state["step"] if saved else 0
        with self._signals(), self._flags_restored():
            self._preflight()
            self.cache = teacher_cache(self.assembly, self.world)
            self._train(saved, done)
        if self.tensorboard is not None:
            with self._shown():
                self.tensorboard.close()
        return self._finish()

    def _finished(self, card: dict[str, Any]) -> dict[str, Any]:
        """The end of a run whose checkpoints were removed since, to save room; nothing is written."""
        try:
            models.load_weights(self.assembly.student.network, self.run.run / "model.safetensors")
        except ValueError as error:
            raise RunError(f"{self.run.run} is finished and has no checkpoints, but {error}") from None
        return card

    def _train(self, saved: Saved | None, done: int) -> None:
        """Train to the end, showing it."""
        title = self.run.method["name"]
        with Display(self.console, title=title, total=self.plan.last_step, done=done, quiet=self.quiet) as self.display:
            if self.world.main:
                self.folder.metrics.tell = self.folder.timings.tell = self.display.note
            for complaint in saved.complaints if saved else ():
                self.display.note(f"[yellow]passed over a damaged checkpoint:[/] {escape(complaint)}")
            for text in self.told:
                self.display.note(f"[yellow]{escape(text)}[/]")
            if saved is not None:
                self.display.note(f"resuming {self.run.run} at step {done} of {self.plan.last_step}")
            if self.assembly.device.type == "cuda":
                reason = why_eager(self.assembly, self.world)
                self.display.note("the step is recorded as a CUDA graph" if reason is None else f"eager: {reason}")
            if self.cache is not None:
                self.cache.tell = self.display.note
                self.display.note(self.cache.describe())
            while True:
                try:
                    self._train_from(saved)
                    break
                except _RollBack:
                    saved = self._roll_back()

    def _describe(self, *, resumed: bool) -> list[str]:
        """Write what is trained with what; of a resumed run only what is missing or damaged, which is told."""
        skipped = {"train": self.assembly.data.train.skipped, "test": self.assembly.data.test.skipped}
        files = {"environment.json": self._environment(), "taps.json": self.assembly.taps}
        if any(skipped.values()):
            files["skipped.json"] = skipped
        if not resumed:
            self.folder.begin()
        return [text for name, content in files.items() for text in self.folder.write_once(name, content, keep=resumed)]

    def _environment(self) -> dict[str, object]:
        return environment(self.assembly.device) | {"processes": self.world.size, "task": self.assembly.task.name}

    def _check_same(self, state: dict[str, Any]) -> None:
        """Refuse to resume on other data or from another teacher; say what else may change the result's last bits."""
        step, phase = state["step"], self.plan.stretch_at(self.plan.epoch_at(max(state["step"] - 1, 0))).phase.name
        if step > self.plan.last_step or state["phase"] != phase:
            raise DamagedCheckpoint(
                f"the checkpoint of step {step} and phase {state['phase']!r} is of no run that has "
                f"{self.plan.last_step} steps and is in phase {phase!r} there"
            )
        for name, found in self.hashes.items():
            then = state["hashes"].get(name)
            if then != found:
                raise RunError(
                    f"{self.run.run}: the {name} changed since the run started (hash {str(then)[:12]} then, "
                    f"{str(found)[:12]} now); give the same {name} back, or start a new run"
                )
        now = self._environment()
        for key in ("threads", "torch", "device", "processes"):
            if state["environment"].get(key) != now[key] and not self.quiet:
                self.console.print(
                    f"[yellow]{key} was {state['environment'].get(key)}, is {now[key]}: the result may not be bitwise "
                    "the same[/]"
                )

    def _preflight(self) -> None:
        """Check that all is in place, show it, and stop at what is not; the teacher's accuracy is kept."""
        known = self.world.from_main(read_teacher_record(self.folder.path) if self.world.main else None)
        report = preflight(self.assembly, self.run.run, known=known, world=self.world)
        if report.teacher is not None and report.teacher != known and self.world.main:
            self.folder.write_json("teacher.json", report.teacher)
        if not self.quiet:
            report.show(self.console)
        report.require()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _train_from(self, saved: Saved | None) -> None:
        """Train to the last step, from a checkpoint's state or from the networks as they are."""
        if saved is not None:
            self._restore(saved)
        data, distiller = self.assembly.data, self.assembly.distiller
        step: Step | None = None
        call: Callable[..., None] = _unready
        clock = time.perf_counter()
        self.interval = (clock, self.step)
        ended = self.step % self.plan.steps_per_epoch == 0 or self.step == self.plan.last_step
        if (
            self.step and ended and self.last.get("epoch") != self.plan.epoch_at(self.step - 1)
        ):  # its test images were bad
            self._evaluate(self.plan.epoch_at(self.step - 1))
        while self.step < self.plan.last_step:
            epoch = self.plan.epoch_at(self.step)
            stretch = self.plan.stretch_at(epoch)
            if step is None or step.phase is not stretch.phase:
                step = self._enter(stretch, step)
                call = self._captured(step)
                if saved is not None:
                    if saved.state["phase"] == stretch.phase.name:
                        with saved.fitted():
                            restore_phase(step.optimizer, step.meter, saved, main=self.world.main)
                    saved = None
                elif self.step == 0 and self.run.nan == "rollback":
                    self._save(step)
            step.progress.epoch.fill_(epoch - stretch.first + 1)
            step.epoch.fill_(epoch)
            distiller.train()
            first = self.step % self.plan.steps_per_epoch
            batches = epoch_batches(
                len(data.train), self.run.batch_size, seed=self.run.data_seed, epoch=epoch, device=self.assembly.device
            )[first : first + self.plan.last_step - self.step]
            weights = [self.world.weight(batch) for batch in batches]
            if step.cache is not None:
                step.cache.begin(epoch)
            feed = data.train.batches(
                [self.world.part(batch) for batch in batches],
                epoch=epoch,
                seed=self.run.data_seed,
                policy=self.assembly.policy,
                num_virtual=distiller.num_virtual,
            )
            for weight, (index, *images) in zip(weights, self._kept_from(feed, step), strict=True):
                self._set_rate(step, stretch, epoch)
                step.weight = weight
                with explained():
                    call(index, *images)
                self.step += 1
                self.display.step()
                at_end = self.step % self.plan.steps_per_epoch == 0 or self.step == self.plan.last_step
                if at_end or (self.step % self.plan.steps_per_epoch) % self.run.log_every == 0:
                    self._log(epoch, step)
                    if at_end:
                        with self._keeping(step):
                            self._evaluate(epoch)
                    self._tell(at_end)
                if at_end and step.cache is not None:
                    step.cache.end(epoch)
                stopping = self.world.any(self.stopping)
                due = self.run.checkpoint.every
                if stopping or self.step == self.plan.last_step or (at_end if due is None else self.step % due == 0):
                    self.seconds["all"] += time.perf_counter() - clock
                    clock = time.perf_counter()
                    self._save(step)
                if stopping:
                    raise Preempted(f"stopped at step {self.step}; `vrm resume {self.run.run}` goes on")

    def _kept_from(self, feed: Iterator[tuple[Tensor, ...]], step: Step) -> Iterator[tuple[Tensor, ...]]:
        with self._keeping(step):
            yield from feed

    @contextmanager
    def _keeping(self, step: Step) -> Iterator[None]:
        """Data that cannot be used end the run, but what was learned until then is kept."""
        try:
            yield
        except BadData:
            if self.step and self.world.size == 1:  # other processes, which are in the midst of a step, cannot join in
                self._save(step)
            raise

    def _enter(self, stretch: Stretch, before: Step | None) -> Step:
        """Make ready for a phase: which parameters move, by which optimiser."""
        freeze_for(self.assembly, stretch)
        if len(self.plan.stretches) > 1:
            self.display.note(f"phase {stretch.phase.name}: {stretch.epochs} epochs")
        return build_step(
            self.assembly,
            self.plan,
            stretch,
            world=self.world,
            cache=self.cache,
            optimizer=before.optimizer if before is not None and not stretch.phase.fresh_optimizer else None,
            incident=self.incident,
            loss_scale=self.loss_scale,
            average=self.average,
            first_step=self.step,
        )

    def _captured(self, step: Step) -> Callable[..., None]:
        """The step, recorded as a CUDA graph where that can be; a recording belongs to one phase."""
        if why_eager(self.assembly, self.world) is not None:
            return step
        return RecordedFunction(step, CudaGraphRecorder(self.assembly.device), variant=lambda: step.variant)

    def _set_rate(self, step: Step, stretch: Stretch, epoch: int) -> None:
        rate = learning_rate(
            self.run.schedule,
            self.run.optimizer.lr,
            stretch.phase,
            epoch=epoch - stretch.first + 1,
            step=self.step - (stretch.first - 1) * self.plan.steps_per_epoch,
            epochs=stretch.epochs,
            steps_per_epoch=self.plan.steps_per_epoch,
        )
        for group in step.optimizer.param_groups:
            group["lr"].fill_(self.rate_scale * rate)

    def _log(self, epoch: int, step: Step) -> None:
        """Read the meter (the one place where training waits for the device), log, and see to non-finite steps."""
        found = step.meter.read(self.world)
        rate = float(step.optimizer.param_groups[0]["lr"])
        nonfinite, overflows, samples = (found.pop(name) for name in ("nonfinite", "overflows", "samples"))
        if samples:
            for name, value in (*found.items(), ("lr", rate)):
                self._metric(epoch, "train", name, value)
        if self.loss_scale is not None:
            self._metric(epoch, "train", "loss_scale", float(self.loss_scale.value))
            self._metric(epoch, "train", "overflows", overflows)
        if nonfinite:
            self._metric(epoch, "train", "nonfinite_steps", nonfinite)
            self._see_to(nonfinite)
        now, (then, before) = time.perf_counter(), self.interval
        speed = (self.step - before) * self.run.batch_size / max(now - then, 1e-9)
        self.interval = (now, self.step)
        self.seconds["training"] += now - then
        if self.world.main:
            self.folder.timings.write(
                {"step": self.step, "epoch": epoch, "images_per_second": round(speed, 2), "seconds": now - then}
            )
        self.text = (
            f"epoch {epoch}/{self.plan.num_epochs}  loss {found.get('loss', float('nan')):.3f}  {speed:,.0f} images/s"
        )

    def _see_to(self, count: float) -> None:
        """Report non-finite steps, and do what ``nan`` says."""
        incidents = self.world.gather(self.incident.read())
        step = max(found for found, _, _ in incidents)
        index = [sample for found, samples, _ in incidents if found == step for sample in samples]
        terms = next(values for found, _, values in incidents if found == step)
        newest = str(self.folder.saved()[0]) if self.world.main and self.folder.saved() else None
        report = {
            "step": step,
            "steps": count,
            "samples": index,
            "values": {name: value if math.isfinite(value) else str(value) for name, value in terms.items()},
            "checkpoint": newest,
        }
        if self.world.main:
            self.folder.write_json("nonfinite.json", report)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items() if name.startswith("loss"))
        shown += ": in gradients or statistics" * all(map(math.isfinite, terms.values()))
        ids = ", ".join(map(str, index[:8])) + (f" and {len(index) - 8} more" if len(index) > 8 else "")
        text = (
            f"{count:.0f} step(s) before step {self.step} gave NaN or infinity and were taken back, the first at step "
            f"{step} ({shown}; samples {ids}; all in {self.run.run / 'nonfinite.json'}; newest checkpoint: {newest})"
        )
        if self.run.nan == "stop":
            raise NonFinite(
                f"{text}; start anew with a lower optimizer.lr or precision=float32, or write nan: skip (go on without "
                f"such steps) or nan: rollback (from the checkpoint, with half the rate) into "
                f"{self.run.run / SETTINGS} and resume"
            )
        self.display.note(f"[yellow]{text}[/]")
        if self.run.nan == "rollback":
            raise _RollBack

    def _roll_back(self) -> Saved:
        """The newest checkpoint, to be trained on from with a lower rate."""
        scale = self.rate_scale * ROLLBACK_FACTOR
        saved = self._newest()
        if saved is None:
            raise RunError(f"{self.run.run}: no checkpoint to roll back to")
        if scale < SMALLEST_RATE:
            raise NonFinite(
                f"training from step {saved.state['step']} still gives NaN or infinity at {self.rate_scale:.3g} times "
                "the learning rate; look at the samples and loss terms in nonfinite.json"
            )
        saved.state["rate_scale"] = scale
        self.display.step(saved.state["step"] - self.step)
        self.display.note(f"[yellow]back to step {saved.state['step']}, with {scale:g} times the learning rate[/]")
        return saved

    def _tell(self, line: bool) -> None:
        """Show where training stands; a line of its own at the end of an epoch."""
        metric = self.assembly.task.primary
        tested = ""
        if self.last:
            tested = f"  test {metric.describe(self.last[metric.key])} (best {metric.text(self.best[metric.key])})"
        self.display.info(self.text + tested, line=line)

    def _metric(self, epoch: int, split: str, name: str, value: float) -> None:
        if not self.world.main:
            return
        self.folder.metrics.write({"step": self.step, "epoch": epoch, "split": split, "name": name, "value": value})
        if self.tensorboard is not None:
            with self._shown():
                self.tensorboard.add_scalar(f"{split}/{name}", value, self.step)

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """What TensorBoard shows is in the logs too: if the disk does not take it, training goes on without."""
        try:
            yield
        except OSError as error:
            self.tensorboard = None
            self.display.note(
                f"[yellow]TensorBoard's files cannot be written ({escape(error.strerror or str(error))}); training "
                "goes on without them[/]"
            )

    def _evaluate(self, epoch: int) -> None:
        """Test accuracy after an epoch; the best weights are kept beside the last."""
        started = time.perf_counter()
        self.world.copy_buffers(self.assembly.distiller)
        task, test = self.assembly.task, self.assembly.data.test
        found = evaluate(self.assembly.distiller.student, test, task, world=self.world)
        if self.averaged is not None:
            averaged = evaluate(self.averaged, test, task, world=self.world)
            found |= {f"ema_{name}": value for name, value in averaged.items()}
        for name, value in found.items():
            self._metric(epoch, "test", name, value)
        if not math.isfinite(found["loss"]):
            text = "the student's logits on test images are not finite (with NaN they count as wrong)"
            self.display.note(f"[yellow]epoch {epoch}: test loss {found['loss']}, {text}[/]")
        self.last = dict(sorted({**found, "epoch": epoch}.items()))  # as a checkpoint has it: the same card again
        if task.is_better(found, self.best):
            self.best = self.last
            self.best_weights = {n: t.detach().clone() for n, t in self.assembly.student.network.state_dict().items()}
            if self.world.main:
                with self._kept():
                    self.folder.write_weights("best.safetensors", self.best_weights)
        spent = time.perf_counter() - started
        self.seconds["evaluation"] += spent
        self.interval = (self.interval[0] + spent, self.interval[1])

    # ---- saving and loading ------------------------------------------------------------------------------------------

    def _newest(self) -> Saved | None:
        """The newest whole checkpoint, the same one in every process."""
        found = self.folder.newest() if self.world.main else None
        if self.world.size > 1:
            path = self.world.from_main(None if found is None else self.folder.checkpoint_path(found[1]["step"]))
            if not self.world.main and path is not None:
                found = (*read_checkpoint(path), [])
        return None if found is None else Saved(found[0], found[1], tuple(found[2]))

    @property
    def _snapshot(self) -> Snapshot:
        modules = {"student": self.assembly.student.network, "method": self.assembly.method}
        if self.average is not None:
            modules["ema"] = self.average.average
        return Snapshot(modules, self.incident, self.loss_scale, self.best_weights)

    def _save(self, step: Step) -> None:
        """Write a checkpoint and drop the oldest ones."""
        self.world.copy_buffers(self.assembly.distiller)
        draws = self.world.gather(random_state(self.assembly.device))
        measured = {name: self.world.sum(value) for name, value in step.meter.sums.items()}
        if not self.world.main:
            return
        tensors = self._snapshot.tensors(step.optimizer, measured)
        tensors |= {f"rng.{rank}.{kind}": value for rank, kinds in enumerate(draws) for kind, value in kinds.items()}
        with self._kept():
            self.folder.save(tensors, self._state(step), keep=self.run.checkpoint.keep)

    def _state(self, step: Step) -> dict[str, Any]:
        """The plain values of a checkpoint."""
        return {
            "step": self.step,
            "phase": step.phase.name,
            "meter": list(step.meter.sums),
            "rate_scale": self.rate_scale,
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
            "hashes": self.hashes,
            "environment": self._environment(),
        }

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """What cannot be written stops the run, or (``checkpoint.on_error=continue``) is told."""
        try:
            yield
        except NotWritten as error:
            if self.run.checkpoint.on_error == "stop":
                raise
            self.display.note(
                f"[yellow]{escape(str(error))}[/]; training goes on, as checkpoint.on_error=continue says"
            )

    def _restore(self, saved: Saved) -> None:
        """Take networks, counters and logs back to a checkpoint."""
        state = saved.state
        self.step, self.rate_scale = state["step"], state["rate_scale"]
        self.best, self.last, self.seconds = state["best"], state["last"], state["seconds"]
        with saved.fitted():
            self._snapshot.restore(saved)
            restore_random_state(saved.part(f"rng.{self.world.rank}"), self.assembly.device)
        if self.world.main:
            for text in self.folder.rewind(self.step):
                self.display.note(f"[yellow]{escape(text)}[/]")
            if self.best_weights:  # those of a stretch that is trained again may have been written since
                self.folder.write_weights("best.safetensors", self.best_weights)

    def _finish(self) -> dict[str, Any]:
        """Write the student and its card; the same again if it was written before."""
        network = self.assembly.student.network
        extra = self.plan.num_epochs - self.run.epochs
        whole, steps = divmod(self.step, self.plan.steps_per_epoch)
        samples = len(self.assembly.data.train)
        images = whole * samples + min(steps * self.run.batch_size, samples)
        metrics = self.assembly.task.metrics(self.assembly.data.num_classes)
        scores = {metric.key: self.last[metric.key] for metric in metrics} if self.last else None
        card = asdict(replace(self.assembly.student.card, scores=scores))
        content = card | {
            "weights_sha256": models.weights_hash(network),
            "last": self.last,
            "best": self.best,
            "parameters": sum(p.numel() for p in network.parameters()),
            "steps": self.step,
            "all_steps": self.plan.num_steps,
            "images_per_second": round(images / max(self.seconds["training"], 1e-9), 1),
            "full_run_seconds": round(self._full_run_seconds()),
            "epochs": self.step / self.plan.steps_per_epoch,
            "extra_epochs": extra,
            "student_passes": (1 + self.assembly.distiller.num_virtual) * images,
            "student_views": 1 + self.assembly.distiller.num_virtual,
            "seconds": round(self.seconds["all"], 3),
            "device": device_name(self.assembly.device),
        }
        if self.world.main:
            weights = {"best.safetensors": self.best_weights, "model.safetensors": network.state_dict()}
            if self.average is not None:
                weights["ema.safetensors"] = self.average.average.state_dict()
            self.folder.finish(content, weights)
        return content

    def _full_run_seconds(self) -> float:
        """What all steps and one evaluation an epoch take at the speed measured so far."""
        per_step = self.seconds["training"] / max(self.step, 1)
        per_evaluation = self.seconds["evaluation"] / max(-(-self.step // self.plan.steps_per_epoch), 1)
        return per_step * self.plan.num_steps + per_evaluation * self.plan.num_epochs

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 and Ctrl-C stop the run at the next step; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may take signals
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self.stopping:
                raise SystemExit(75)
            self.stopping = True

        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _flags_restored(self) -> Iterator[None]:
        """What a phase froze moves again afterwards: the networks may be the caller's own."""
        try:
            yield
        finally:
            for parameters in self.assembly.learnable.values():
                for parameter in parameters:
                    parameter.requires_grad_(True)


def _unready(*inputs: Tensor) -> None:
    raise RuntimeError("no phase was entered yet")


def tensorboard_writer(path: Path) -> Any:
    """A TensorBoard writer for a run. ``ConfigError`` if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ConfigError("tensorboard=true needs the package tensorboard: pip install 'vrm[track]'") from None
    return SummaryWriter(str(path / "tensorboard"))
