"""Records a training: its logs, TensorBoard, what a user sees, and reports of steps that met NaN."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vrm.config import ConfigError
from vrm.engine.distribution import World
from vrm.engine.step import Step
from vrm.files import write_json
from vrm.runs.assembly import Assembly
from vrm.runs.checkpoint import list_checkpoints
from vrm.runs.display import Display
from vrm.runs.errors import NonFinite
from vrm.runs.folder import NONFINITE, RunFolder
from vrm.runs.plan import Plan
from vrm.runs.state import TrainingState
from vrm.wording import counted, listed


class RollBack(Exception):
    """A non-finite step under ``nan=rollback``: training goes back to the newest checkpoint."""


class Recorder:
    """Writes what is measured. Only the main process, which has the folder, writes."""

    def __init__(
        self,
        assembly: Assembly,
        plan: Plan,
        state: TrainingState,
        folder: RunFolder | None,
        world: World,
        display: Display,
    ) -> None:
        """Record this training in ``folder``, which is None in all processes but the main one."""
        self.assembly, self.plan, self.state, self.folder = assembly, plan, state, folder
        self.world, self.display = world, display
        wanted = assembly.run.tensorboard and folder is not None
        self.tensorboard = open_tensorboard(folder.path) if wanted and folder is not None else None
        self.start_interval()

    def start_interval(self) -> None:
        """Begin to measure speed from here."""
        self.clock, self.first = time.perf_counter(), self.state.step

    def metric(self, epoch: int, split: str, name: str, value: float) -> None:
        """Log one value."""
        if self.folder is None:
            return
        step = self.state.step
        self.folder.metrics.write({"step": step, "epoch": epoch, "split": split, "name": name, "value": value})
        if self.tensorboard is not None:
            with self._tolerant():
                self.tensorboard.add_scalar(f"{split}/{name}", value, step)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Go on without TensorBoard if the disk does not take its files: all of it is in the logs too."""
        try:
            yield
        except OSError as error:
            self.tensorboard = None
            reason = error.strerror or str(error)
            self.display.warn(f"TensorBoard's files cannot be written ({reason}); training goes on without them")

    def read(self, step: Step, epoch: int) -> None:
        """Read the meter, which waits for the device, and log it.

        Raise ``NonFinite`` or :class:`RollBack` if steps met NaN or infinity, as the setting ``nan`` says.
        """
        found = step.meter.read(self.world)
        nonfinite, overflows, samples = (found.pop(name) for name in ("nonfinite", "overflows", "samples"))
        if samples:
            rate = float(step.optimizer.param_groups[0]["lr"])
            for name, value in (*found.items(), ("lr", rate)):
                self.metric(epoch, "train", name, value)
        if self.state.loss_scale is not None:
            self.metric(epoch, "train", "loss_scale", float(self.state.loss_scale.value))
            self.metric(epoch, "train", "overflows", overflows)
        if nonfinite:
            self.metric(epoch, "train", "nonfinite_steps", nonfinite)
            self._handle_nonfinite(nonfinite)
        now = time.perf_counter()
        speed = (self.state.step - self.first) * self.assembly.run.batch_size / max(now - self.clock, 1e-9)
        self.state.seconds["training"] += now - self.clock
        if self.folder is not None:
            line = {"images_per_second": round(speed, 2), "seconds": now - self.clock}
            self.folder.timings.write({"step": self.state.step, "epoch": epoch, **line})
        self.start_interval()
        loss = found.get("loss", math.nan)
        self.text = f"epoch {epoch}/{self.plan.num_epochs}  loss {loss:.3f}  {speed:,.0f} images/s"

    def show(self, *, line: bool) -> None:
        """Show where training stands; on a line of its own if ``line`` is set."""
        tested = ""
        if self.state.last:
            metric = self.assembly.task.primary
            last, best = (scores[metric.key] for scores in (self.state.last, self.state.best))
            tested = f"  test {metric.describe(last)} (best {metric.text(best)})"
        self.display.info(self.text + tested, line=line)

    def evaluation(self, epoch: int, scores: Mapping[str, float], seconds: float) -> None:
        """Log what an evaluation on the test images found, and how long it took."""
        for name, value in scores.items():
            self.metric(epoch, "test", name, value)
        if not math.isfinite(scores["loss"]):
            text = "the student's logits on test images are not finite (with NaN they count as wrong)"
            self.display.warn(f"epoch {epoch}: test loss {scores['loss']}, {text}")
        self.state.seconds["evaluation"] += seconds
        self.clock += seconds

    def _handle_nonfinite(self, count: float) -> None:
        incidents = self.world.gather(self.state.incident.read())
        step = max(found for found, _, _ in incidents)
        samples = [sample for found, indices, _ in incidents if found == step for sample in indices]
        terms = next(values for found, _, values in incidents if found == step)
        run, newest = self.assembly.run, None
        if self.folder is not None:
            newest = next(map(str, list_checkpoints(self.folder.checkpoints)), None)
            report = {
                "step": step,
                "steps": count,
                "samples": samples,
                "values": {name: value if math.isfinite(value) else str(value) for name, value in terms.items()},
                "checkpoint": newest,
            }
            write_json(self.folder.path / NONFINITE, report)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items() if name.startswith("loss"))
        shown += ": in gradients or statistics" * all(map(math.isfinite, terms.values()))
        text = (
            f"{counted(round(count), 'step')} before step {self.state.step} gave NaN or infinity and were taken back, "
            f"the first at step {step} ({shown}; samples {listed(samples, limit=8)}; all in {run.run / NONFINITE}; "
            f"newest checkpoint: {newest})"
        )
        if run.nan == "stop":
            raise NonFinite(
                f"{text}; start anew with a lower optimizer.lr or precision=float32, or go on without such steps "
                f"(`vrm resume {run.run} nan=skip`), or from the checkpoint with half the rate (nan=rollback)"
            )
        self.display.warn(text)
        if run.nan == "rollback":
            raise RollBack

    def close(self) -> None:
        """Close TensorBoard's files."""
        if self.tensorboard is not None:
            with self._tolerant():
                self.tensorboard.close()


def open_tensorboard(path: Path) -> Any:
    """Return a TensorBoard writer for a run. Raise ``ConfigError`` if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ConfigError("tensorboard=true needs the package tensorboard: pip install 'vrm[track]'") from None
    return SummaryWriter(str(path / "tensorboard"))
