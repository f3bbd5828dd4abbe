"""The loop: epochs and phases, logs, checkpoints, evaluation; it starts where the run folder left off."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vrm import models
from vrm.config import ConfigError
from vrm.contract import Phase, Progress
from vrm.data import epoch_batches
from vrm.training import device_name
from vrm.training.assembly import Assembly
from vrm.training.display import Display
from vrm.training.evaluation import evaluate
from vrm.training.files import write_checkpoint
from vrm.training.optimization import build_optimizer, learning_rate
from vrm.training.run_folder import RunError, RunFolder, environment
from vrm.training.step import Guard, Meter, Step

WEAK_MARGIN = 1.0
"""Points of top-1 by which a teacher may fall short of its recorded accuracy."""

HOPELESS = 0.1
"""A teacher that has come less far than this from chance to 100 % is taken for one with the wrong weights."""


class Preempted(Exception):
    """The run was told to stop (a signal), wrote a checkpoint and can be resumed."""


class NonFinite(RuntimeError):
    """Training met NaN or infinity and ``nonfinite=stop``; the weights are those of the last finite step."""


@dataclass(frozen=True)
class Stretch:
    """A phase placed in the run: its first epoch (from 1, over the whole run) and how many it has."""

    phase: Phase
    first: int
    epochs: int


def plan(phases: tuple[Phase, ...], epochs: int) -> tuple[Stretch, ...]:
    """Lay the phases one after the other. ``ValueError`` unless exactly one takes the run's own number of epochs."""
    if sum(phase.epochs is None for phase in phases) != 1:
        raise ValueError("exactly one phase must leave its number of epochs to the run (epochs=None)")
    stretches: list[Stretch] = []
    first = 1
    for phase in phases:
        stretches.append(Stretch(phase, first, phase.epochs or epochs))
        first += stretches[-1].epochs
    return tuple(stretches)


class Training:
    """One run. :meth:`train` goes on from the newest checkpoint of its folder, or from the start."""

    def __init__(self, assembly: Assembly, folder: RunFolder, *, console: Console, quiet: bool = False) -> None:
        """``assembly`` is trained in place; ``folder`` is open and locked."""
        self.assembly, self.folder, self.console, self.quiet = assembly, folder, console, quiet
        self.run = assembly.run
        self.stretches = plan(assembly.method.phases, self.run.epochs)
        self.num_epochs = sum(stretch.epochs for stretch in self.stretches)
        self.steps_per_epoch = -(-len(assembly.data.train) // self.run.batch_size)
        self.num_steps = self.num_epochs * self.steps_per_epoch
        self.last_step = min(self.num_steps, self.run.steps or self.num_steps)
        self.step = 0
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.seconds = {"all": 0.0, "training": 0.0, "evaluation": 0.0}
        self.meter = Meter(assembly.device)
        self.stopping = False
        self.tensorboard = tensorboard_writer(folder.path) if self.run.tensorboard else None

    # ---- position -------------------------------------------------------------------------------------------------

    def epoch_of(self, step: int) -> int:
        """The epoch (from 1, over the whole run) to which a step belongs."""
        return step // self.steps_per_epoch + 1

    def stretch_of(self, epoch: int) -> Stretch:
        """The phase to which an epoch belongs; behind the end, the last."""
        return next((s for s in self.stretches if s.first <= epoch < s.first + s.epochs), self.stretches[-1])

    # ---- start ----------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the end; returns the content of ``model.json``. Raises :class:`Preempted` when told to stop."""
        torch.manual_seed(self.run.seed)
        saved = self.folder.newest()
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {}
        complaints: list[str] = []
        if saved is not None:
            tensors, state, complaints = saved
            self._check_same(state)
            self.step, self.best, self.last, self.seconds = (
                state["step"],
                state["best"],
                state["last"],
                state["seconds"],
            )
        else:
            self.folder.metrics.cut(0)
            self.folder.timings.cut(0)
            self.folder.write_json("environment.json", environment(self.assembly.device))
            self.folder.write_json("taps.json", self.assembly.taps)
        name = self.run.method["name"]
        with (
            Display(self.console, title=name, total=self.last_step, done=self.step, quiet=self.quiet) as self.display,
            self._signals(),
        ):
            for complaint in complaints:
                self.display.note(f"[yellow]passed over a damaged checkpoint:[/] {complaint}")
            if saved is not None:
                self.display.note(f"resuming {self.folder.path} at step {self.step} of {self.last_step}")
            self._check_teacher()
            self._train_from(tensors, state)
        if self.tensorboard is not None:
            self.tensorboard.close()
        return self._finish()

    def _check_same(self, state: dict[str, Any]) -> None:
        """Refuse to resume on other data; say what else may keep the result from being bitwise the same."""
        data = self.assembly.data
        if state["data"] != data.train.hash:
            raise RunError(
                f"{self.folder.path}: the training data changed since the run started (hash {state['data'][:12]} then, "
                f"{data.train.hash[:12]} now); give the same data back, or start a new run"
            )
        now = environment(self.assembly.device)
        for key in ("threads", "torch", "device"):
            if state["environment"][key] != now[key]:
                self.console.print(
                    f"[yellow]{key} was {state['environment'][key]}, is {now[key]}: the result may not be bitwise "
                    "the same[/]"
                )

    def _check_teacher(self) -> None:
        """Measure the teacher (once for these weights and data), show it, and stop if it is weaker than recorded."""
        teacher, card = self.assembly.teacher, self.assembly.teacher_card
        if teacher is None or card is None:
            return
        key = f"{models.weights_hash(teacher.teacher.network)}/{self.assembly.data.test.hash}/{card.mean}/{card.std}"
        path = self.folder.path / "teacher.json"
        known = _read_json(path)
        if known is None or known["key"] != key:
            found = evaluate(teacher, self.assembly.data.test)
            known = {"key": key, "architecture": card.architecture, "recorded_top1": card.top1, **found}
            self.folder.write_json("teacher.json", known)
        self.display.note(
            f"teacher {card.architecture}: top-1 {known['top1']:.2f} %, top-5 {known['top5']:.2f} % on "
            f"{len(self.assembly.data.test):,} test images"
        )
        allowed = self.run.teacher is not None and self.run.teacher.allow_weak
        chance = 100 / card.num_classes
        if card.top1 is not None and known["top1"] < card.top1 - WEAK_MARGIN and not allowed:
            raise RunError(
                f"the teacher reaches {known['top1']:.2f} % here, but {card.top1:.2f} % was recorded with its weights: "
                "check data and normalisation, or give teacher.allow_weak=true"
            )
        if known["top1"] < chance + HOPELESS * (100 - chance) and not allowed:
            raise RunError(
                f"the teacher's top-1 is {known['top1']:.2f} %, hardly above chance ({chance:.2f} %): wrong weights, "
                "normalisation or class order? Give teacher.allow_weak=true to go on all the same"
            )

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def _train_from(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        data, distiller = self.assembly.data, self.assembly.distiller
        if tensors:
            self._load_modules(tensors)
            self.folder.metrics.cut(state["offsets"]["metrics"])
            self.folder.timings.cut(state["offsets"]["timings"])
        step: Step | None = None
        clock = time.perf_counter()
        self.interval = (clock, self.step)
        while self.step < self.last_step:
            epoch = self.epoch_of(self.step)
            stretch = self.stretch_of(epoch)
            if step is None or step.phase is not stretch.phase:
                step = self._enter(stretch, step)
                if tensors and state["phase"] == stretch.phase.name:
                    self._load_optimizer(step.optimizer, tensors)
                if tensors:
                    self.meter.sums = {n: tensors[f"meter.{n}"].to(self.assembly.device) for n in state["meter"]}
                    torch.set_rng_state(tensors["rng.cpu"])
                    if "rng.cuda" in tensors:
                        torch.cuda.set_rng_state(tensors["rng.cuda"])
                tensors = {}
            step.progress.epoch.fill_(epoch - stretch.first + 1)
            step.epoch.fill_(epoch)
            distiller.train()
            batches = epoch_batches(
                len(data.train), self.run.batch_size, seed=self.run.data_seed, epoch=epoch, device=self.assembly.device
            )
            for position, index in enumerate(batches):
                if position < self.step % self.steps_per_epoch:
                    continue
                self._set_rate(step, stretch, epoch)
                step(index)
                self.step += 1
                self.display.step()
                at_end = self.step % self.steps_per_epoch == 0 or self.step == self.last_step
                if at_end or (self.step % self.steps_per_epoch) % self.run.log_every == 0:
                    self._log(epoch, float(step.optimizer.param_groups[0]["lr"]))
                    if at_end:
                        self._evaluate(epoch)
                    self._tell(at_end)
                due = self.run.checkpoint.every
                if self.stopping or self.step == self.last_step or (at_end if due is None else self.step % due == 0):
                    self.seconds["all"] += time.perf_counter() - clock
                    clock = time.perf_counter()
                    self._save(step)
                if self.stopping:
                    raise Preempted(f"stopped at step {self.step}; `vrm resume {self.folder.path}` goes on")
                if self.step == self.last_step:
                    break

    def _enter(self, stretch: Stretch, before: Step | None) -> Step:
        """Make ready for a phase: which parameters move, by which optimiser."""
        assembly, phase = self.assembly, stretch.phase
        groups = {"student": assembly.distiller.student, "method": assembly.method}
        for name, module in groups.items():
            for parameter in module.parameters():
                parameter.requires_grad_(name in phase.trained)
        if len(self.stretches) > 1:
            self.display.note(f"phase {phase.name}: {stretch.epochs} epochs")
        if before is not None and not phase.fresh_optimizer:
            optimizer = before.optimizer
        else:
            trained = [p for p in assembly.distiller.parameters() if p.requires_grad]
            optimizer = build_optimizer(self.run.optimizer, trained, assembly.method)
        device = assembly.device
        autocast = torch.autocast(device.type, torch.bfloat16) if self.run.precision == "bfloat16" else nullcontext()
        return Step(
            distiller=assembly.distiller,
            teacher=assembly.teacher,
            store=assembly.data.train,
            policy=assembly.policy,
            optimizer=optimizer,
            phase=phase,
            progress=Progress(
                epoch=torch.zeros((), dtype=torch.int64, device=device),
                step=torch.full((), self.step, dtype=torch.int64, device=device),
                num_epochs=stretch.epochs,
                num_steps=self.num_steps,
                phase=phase.name,
                seed=self.run.seed,
            ),
            epoch=torch.zeros((), dtype=torch.int64, device=device),
            data_seed=self.run.data_seed,
            guard=Guard(assembly.distiller, optimizer),
            meter=self.meter,
            autocast=autocast,
        )

    def _set_rate(self, step: Step, stretch: Stretch, epoch: int) -> None:
        rate = learning_rate(
            self.run.schedule,
            self.run.optimizer.lr,
            stretch.phase,
            epoch=epoch - stretch.first + 1,
            step=self.step - (stretch.first - 1) * self.steps_per_epoch,
            epochs=stretch.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )
        for group in step.optimizer.param_groups:
            group["lr"].fill_(rate)

    def _log(self, epoch: int, rate: float) -> None:
        """Read the meter (the one place where training waits for the device), log, and stop on non-finite steps."""
        found = self.meter.read()
        nonfinite, samples = found.pop("nonfinite"), found.pop("samples")
        if samples:
            for name, value in (*found.items(), ("lr", rate)):
                self._metric(epoch, "train", name, value)
        if nonfinite:
            self._metric(epoch, "train", "nonfinite_steps", nonfinite)
            if self.run.nonfinite == "stop":
                raise NonFinite(
                    f"{nonfinite:.0f} step(s) before step {self.step} gave NaN or infinity and were taken back; lower "
                    "optimizer.lr, use precision=float32, or give nonfinite=skip to go on without such steps"
                )
            self.display.note(f"[yellow]{nonfinite:.0f} non-finite step(s) before step {self.step} were skipped[/]")
        now, (then, step) = time.perf_counter(), self.interval
        speed = (self.step - step) * self.run.batch_size / max(now - then, 1e-9)
        self.interval = (now, self.step)
        self.seconds["training"] += now - then
        self.folder.timings.write(
            {"step": self.step, "epoch": epoch, "images_per_second": round(speed, 2), "seconds": now - then}
        )
        self.text = (
            f"epoch {epoch}/{self.num_epochs}  loss {found.get('loss', float('nan')):.3f}  {speed:,.0f} images/s"
        )

    def _tell(self, line: bool) -> None:
        """Show where training stands; a line of its own at the end of an epoch."""
        tested = f"  test top-1 {self.last['top1']:.2f} (best {self.best['top1']:.2f})" if self.last else ""
        self.display.info(self.text + tested, line=line)

    def _metric(self, epoch: int, split: str, name: str, value: float) -> None:
        self.folder.metrics.write({"step": self.step, "epoch": epoch, "split": split, "name": name, "value": value})
        if self.tensorboard is not None:
            self.tensorboard.add_scalar(f"{split}/{name}", value, self.step)

    def _evaluate(self, epoch: int) -> None:
        """Test accuracy after an epoch; the best weights are kept beside the last."""
        started = time.perf_counter()
        found = evaluate(self.assembly.distiller.student, self.assembly.data.test)
        for name, value in found.items():
            self._metric(epoch, "test", name, value)
        self.last = found | {"epoch": epoch}
        if not self.best or found["top1"] > self.best["top1"]:
            self.best = self.last
            models.save_weights(self.assembly.student.network, self.folder.path / "best.safetensors")
        spent = time.perf_counter() - started
        self.seconds["evaluation"] += spent
        self.interval = (self.interval[0] + spent, self.interval[1])

    # ---- saving and loading ------------------------------------------------------------------------------------------

    def _save(self, step: Step) -> None:
        """Write a checkpoint and drop the oldest ones."""
        tensors = {f"student.{n}": t for n, t in self.assembly.student.network.state_dict().items()}
        tensors |= {f"method.{n}": t for n, t in self.assembly.method.state_dict().items()}
        for i, parameter in enumerate(p for group in step.optimizer.param_groups for p in group["params"]):
            for name, value in step.optimizer.state[parameter].items():
                tensors[f"optimizer.{i}.{name}"] = value
        tensors |= {f"meter.{n}": t for n, t in self.meter.sums.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.assembly.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        state = {
            "step": self.step,
            "phase": step.phase.name,
            "meter": list(self.meter.sums),
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
            "offsets": {"metrics": self.folder.metrics.offset(), "timings": self.folder.timings.offset()},
            "data": self.assembly.data.train.hash,
            "environment": environment(self.assembly.device),
        }
        write_checkpoint(self.folder.checkpoint_path(self.step), tensors, state)
        for old in self.folder.saved()[self.run.checkpoint.keep :]:
            shutil.rmtree(old)

    def _load_modules(self, tensors: dict[str, Tensor]) -> None:
        for prefix, module in (("student.", self.assembly.student.network), ("method.", self.assembly.method)):
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
        for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            for name, value in optimizer.state[parameter].items():
                value.copy_(tensors[f"optimizer.{i}.{name}"])

    def _finish(self) -> dict[str, Any]:
        """Write the student and its card; the same again if it was written before."""
        network = self.assembly.student.network
        models.save_weights(network, self.folder.path / "model.safetensors")
        extra = self.num_epochs - self.run.epochs
        card = asdict(replace(self.assembly.student.card, top1=self.last.get("top1")))
        content = card | {
            "weights_sha256": models.weights_hash(network),
            "last": self.last,
            "best": self.best,
            "parameters": sum(p.numel() for p in network.parameters()),
            "steps": self.step,
            "all_steps": self.num_steps,
            "images_per_second": round(self.step * self.run.batch_size / max(self.seconds["training"], 1e-9), 1),
            "full_run_seconds": round(self._full_run_seconds()),
            "epochs": self.step / self.steps_per_epoch,
            "extra_epochs": extra,
            "student_passes": (1 + self.assembly.distiller.num_virtual) * self.step * self.run.batch_size,
            "student_views": 1 + self.assembly.distiller.num_virtual,
            "seconds": round(self.seconds["all"], 3),
            "device": device_name(self.assembly.device),
        }
        self.folder.write_json("model.json", content)
        return content

    def _full_run_seconds(self) -> float:
        """What all steps and one evaluation an epoch take at the speed measured so far."""
        per_step = self.seconds["training"] / max(self.step, 1)
        per_evaluation = self.seconds["evaluation"] / max(-(-self.step // self.steps_per_epoch), 1)
        return per_step * self.num_steps + per_evaluation * self.num_epochs

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 and Ctrl-C stop the run at the next step; a second one at once."""

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


def tensorboard_writer(path: Path) -> Any:
    """A TensorBoard writer for a run. ``ConfigError`` if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ConfigError("tensorboard=true needs the package tensorboard: pip install 'vrm[track]'") from None
    return SummaryWriter(str(path / "tensorboard"))


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
