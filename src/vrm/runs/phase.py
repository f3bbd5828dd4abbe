"""What a phase trains, and the very step that trains it."""

from __future__ import annotations

import torch

from vrm.contract import Progress
from vrm.engine.distiller import autocast
from vrm.engine.distribution import ALONE, World
from vrm.engine.guard import Guard
from vrm.engine.meter import Meter
from vrm.engine.optimizers import build_optimizer
from vrm.engine.step import Step
from vrm.engine.streams import SideStreams
from vrm.engine.teacher_cache import TeacherCache
from vrm.runs.assembly import Assembly
from vrm.runs.plan import Plan, Stretch
from vrm.runs.state import TrainingState


def freeze_for(assembly: Assembly, stretch: Stretch) -> None:
    """Let exactly those parameters move that the phase trains; what their owner froze stays frozen."""
    for name, parameters in assembly.learnable.items():
        for parameter in parameters:
            parameter.requires_grad_(name in stretch.phase.trained)


def build_step(
    assembly: Assembly,
    plan: Plan,
    stretch: Stretch,
    state: TrainingState,
    *,
    world: World = ALONE,
    cache: TeacherCache | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Step:
    """Build the step that trains one phase, after :func:`freeze_for`.

    Args:
        assembly: The run.
        plan: Its course.
        stretch: The phase, as the plan has it.
        state: Where the run stands. The step works on its loss scale, incident and average.
        world: The processes of the run.
        cache: The teacher's kept outputs.
        optimizer: Goes on with this one; by default the phase begins with a new one.
    """
    run, device = assembly.run, assembly.device
    if optimizer is None:
        trained = [p for p in assembly.distiller.parameters() if p.requires_grad]
        optimizer = build_optimizer(run.optimizer, trained, assembly.method)
    return Step(
        distiller=assembly.distiller,
        model=world.wrap(assembly.distiller),
        teacher=assembly.teacher,
        task=assembly.task,
        cache=cache,
        store=assembly.data.train,
        policy=assembly.policy,
        make_views=assembly.make_views,
        optimizer=optimizer,
        phase=stretch.phase,
        progress=Progress(
            epoch=torch.ones((), dtype=torch.int64, device=device),
            step=torch.full((), state.step, dtype=torch.int64, device=device),
            num_epochs=stretch.epochs,
            num_steps=plan.num_steps,
            phase=stretch.phase.name,
            seed=run.seed,
        ),
        epoch=torch.full((), stretch.first, dtype=torch.int64, device=device),
        data_seed=run.data_seed,
        accumulate=run.accumulate,
        guard=Guard(assembly.distiller, optimizer),
        meter=Meter(device),
        incident=state.incident,
        loss_scale=state.loss_scale,
        average=state.average,
        autocast=autocast(run.precision, device),
        world=world,
        side_streams=SideStreams(device),
    )


def why_eager(assembly: Assembly, world: World = ALONE) -> str | None:
    """Return why the step is not recorded as a CUDA graph, or None if it is."""
    if assembly.device.type != "cuda":
        return f"there are no CUDA graphs on {assembly.device.type}"
    if assembly.run.capture == "off":
        return "capture=off"
    if world.size > 1:
        return "the run is distributed"
    if not assembly.method.needs.capturable:
        return f"method {assembly.run.method['name']} declares that it cannot be recorded"
    if assembly.run.deterministic and torch.__version__ < "2.9":
        return "with deterministic=true PyTorch 2.8 takes sums that wait for the device"
    return None
