"""What of a training goes into a checkpoint, and back: all tensors by name, and the plain values beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ValidationError
from torch import Tensor, nn

from vrm.engine.guard import Incident, LossScale
from vrm.engine.meter import Meter
from vrm.runs.checkpoint import DamagedCheckpoint


def _whole(found: dict[str, float]) -> dict[str, float]:
    if found and not {"epoch", "loss"} <= found.keys():
        raise ValueError("an evaluation holds epoch and loss")
    return found


Score = Annotated[dict[str, float], AfterValidator(_whole)]
"""What an evaluation found; empty before the first."""


class State(BaseModel):
    """The plain values of a checkpoint, beside those that the run folder adds."""

    step: int
    phase: str
    meter: list[str]
    rate_scale: float
    best: Score
    last: Score
    seconds: dict[str, float]
    hashes: dict[str, str | None]
    environment: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read: tensors, state, and what was wrong with newer ones."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    complaints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """``DamagedCheckpoint`` if the state is that of no training, whatever its sums say."""
        try:
            State.model_validate(self.state)
        except ValidationError as error:
            first = error.errors()[0]
            raise DamagedCheckpoint(
                f"the checkpoint of step {self.state.get('step')} is none of a training: "
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from None

    @contextmanager
    def fitted(self) -> Iterator[None]:
        """``DamagedCheckpoint`` where tensors that are taken from it are missing, or of another shape."""
        try:
            yield
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DamagedCheckpoint(
                f"the checkpoint of step {self.state['step']} does not fit this run's networks, as if another version "
                f"of a library made them: {str(error).splitlines()[0]}"
            ) from error

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix.``, without it."""
        start = f"{prefix}."
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


@dataclass(frozen=True)
class Snapshot:
    """The parts of a training that hold tensors, by the prefix under which a checkpoint keeps them."""

    modules: Mapping[str, nn.Module]
    incident: Incident
    loss_scale: LossScale | None
    best: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self, optimizer: torch.optim.Optimizer, measured: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everything, with the phase's optimiser and what all processes measured, as it is now."""
        found = {f"{prefix}.{n}": t for prefix, module in self.modules.items() for n, t in module.state_dict().items()}
        for i, parameter in enumerate(_parameters(optimizer)):
            found |= {f"optimizer.{i}.{name}": value for name, value in optimizer.state[parameter].items()}
        found |= {f"meter.{name}": value for name, value in measured.items()}
        found |= {f"incident.terms.{name}": value for name, value in self.incident.terms.items()}
        found |= {"incident.step": self.incident.step, "incident.index": self.incident.index}
        if self.loss_scale is not None:
            found |= {"loss_scale.value": self.loss_scale.value, "loss_scale.streak": self.loss_scale.streak}
        return found | {f"best.{name}": value for name, value in self.best.items()}

    def restore(self, saved: Saved) -> None:
        """Put everything back but what belongs to a phase, which may not have begun."""
        for prefix, module in self.modules.items():
            module.load_state_dict(saved.part(prefix))
        self.incident.step.copy_(saved.tensors["incident.step"])
        self.incident.index.copy_(saved.tensors["incident.index"])
        self.incident.terms.clear()
        for name, value in saved.part("incident.terms").items():
            self.incident.terms[name] = value.to(self.incident.step.device)
        if self.loss_scale is not None:
            self.loss_scale.value.copy_(saved.tensors["loss_scale.value"])
            self.loss_scale.streak.copy_(saved.tensors["loss_scale.streak"])
        self.best.clear()
        self.best.update(saved.part("best"))


def restore_phase(optimizer: torch.optim.Optimizer, meter: Meter, saved: Saved, *, main: bool = True) -> None:
    """Put momenta back, and (in the main process) what all measured since the last reading."""
    for name in saved.state["meter"]:
        meter.add([name], saved.tensors[f"meter.{name}"].to(meter.device)[None] * main)
    for i, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state[parameter].items():
            value.copy_(saved.tensors[f"optimizer.{i}.{name}"])


def random_state(device: torch.device) -> dict[str, Tensor]:
    """What torch draws from itself (dropout), in this process."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on drawing where :func:`random_state` was taken."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
