"""What changes while a run trains, beside networks, method and optimiser."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from vrm.engine.guard import Average, Incident, LossScale
from vrm.runs.assembly import Assembly


@dataclass
class TrainingState:
    """Counters, scores and averages. ``best`` and ``last`` are scores of the test images, with their epoch."""

    incident: Incident
    loss_scale: LossScale | None
    average: Average | None
    step: int = 0
    rate_scale: float = 1.0
    """Factor on the learning rate, below 1 after ``nan=rollback``."""
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    best_weights: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"all": 0.0, "training": 0.0, "evaluation": 0.0})

    @staticmethod
    def of(assembly: Assembly) -> TrainingState:
        """Return the state of a run before its first step."""
        run, network = assembly.run, assembly.student.network
        return TrainingState(
            incident=Incident(run.batch_size, assembly.device),
            loss_scale=LossScale.at_start(assembly.device) if run.precision == "float16" else None,
            average=Average(network, deepcopy(network), run.ema) if run.ema else None,
        )
