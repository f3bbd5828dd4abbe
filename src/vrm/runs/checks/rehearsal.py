"""One forward and backward pass of every phase before a run trains, by the very step that will train."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vrm.config import ConfigError
from vrm.data import BadData, epoch_batches
from vrm.engine.distribution import ALONE, World
from vrm.engine.guard import Incident, LossScale
from vrm.engine.process_state import undisturbed
from vrm.engine.step import Step
from vrm.models import NetworkError
from vrm.runs.assembly import Assembly
from vrm.runs.checks.table import Check
from vrm.runs.phase import build_step, freeze_for
from vrm.runs.plan import Plan
from vrm.runs.state import TrainingState
from vrm.wording import counted, first_line, listed


@dataclass(frozen=True)
class Rehearsal:
    """What a rehearsal showed. ``optimizer_bytes``: of the largest phase's momenta; ``peak_bytes``: on CUDA."""

    checks: tuple[Check, ...]
    optimizer_bytes: int = 0
    peak_bytes: int = 0


def rehearse(
    assembly: Assembly, plan: Plan, world: World = ALONE, *, on_batch: Callable[[], None] = lambda: None
) -> Rehearsal:
    """Run the first and the last batch of epoch 1 through every phase's step, without its update.

    Networks and random generators are afterwards as they were. Each process tries its own part of the batches, and
    calls ``on_batch`` after each.
    """
    checks: list[Check] = []
    reached: set[Tensor] = set()
    trained: set[Tensor] = set()
    optimizer_bytes = 0
    cuda = assembly.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(assembly.device)
    networks = [assembly.distiller] + ([assembly.teacher] if assembly.teacher is not None else [])
    with undisturbed(*networks):
        assembly.distiller.train()
        for stretch in plan.stretches:
            freeze_for(assembly, stretch)
            name = f"phase {stretch.phase.name}" if len(plan.stretches) > 1 else "forward and backward"
            try:
                step = build_step(assembly, plan, stretch, _state(assembly))
                step.epoch.fill_(1)
                trained.update(step.parameters)
                optimizer_bytes = max(optimizer_bytes, _state_bytes(step.optimizer))
                checks.append(_try_step(assembly, step, name, reached, world, on_batch))
            except torch.OutOfMemoryError as error:
                fix = "lower batch_size, or give accumulate=2 or more"
                checks.append(Check("one step", "fail", f"{name}: {first_line(error)}", fix))
            except (BadData, ConfigError) as error:
                checks.append(Check("one step", "fail", f"{name}: {error}"))
            except Exception as error:  # networks and methods of others may raise anything
                fix = "mend it there, or choose another network or method"
                checks.append(Check("one step", "fail", f"{name}: {_locate(error)}", fix))
    peak = torch.cuda.max_memory_allocated(assembly.device) if cuda else 0
    if cuda:
        torch.cuda.empty_cache()  # a recorded step has a memory pool of its own
    if not any(check.result == "fail" for check in checks):
        checks.append(_check_parameters(assembly, trained, reached))
    return Rehearsal(tuple(checks), optimizer_bytes, peak)


def _state(assembly: Assembly) -> TrainingState:
    """Return a state without an average, and for float16 with a loss scale of 1: training would lower the usual one."""
    scale = None
    if assembly.run.precision == "float16":
        scale = LossScale.at_start(assembly.device)
        scale.value.fill_(1)
    return TrainingState(Incident(assembly.run.batch_size, assembly.device), scale, average=None)


def _locate(error: Exception) -> str:
    """Return an error's message in one line, and where it was raised."""
    cause = error.__cause__ if isinstance(error, NetworkError) else None
    last = traceback.extract_tb((cause or error).__traceback__)[-1]
    text = str(error) if cause is not None else f"{type(error).__name__}: {first_line(error)}"
    return f"{text} ({Path(last.filename).name}, line {last.lineno})"


def _try_step(
    assembly: Assembly, step: Step, name: str, reached: set[Tensor], world: World, on_batch: Callable[[], None]
) -> Check:
    """Run the batches of a phase; add the parameters that got a gradient to ``reached``."""
    run, store = assembly.run, assembly.data.train
    names: dict[Tensor, str] = {parameter: key for key, parameter in assembly.distiller.named_parameters()}
    batches = epoch_batches(len(store), run.batch_size, seed=run.data_seed, epoch=1, device=assembly.device)
    chosen = [world.part(batch) for batch in (batches[0], *batches[-1:])[: len(batches)]]
    feed = store.batches(
        chosen, epoch=1, seed=run.data_seed, policy=assembly.policy, num_virtual=assembly.distiller.num_virtual
    )
    found: list[str] = []
    bad: list[str] = []
    for index, *images in feed:
        keys, value_N = step.forward_backward(index, *images)
        values = dict(zip(keys, value_N.tolist(), strict=True))
        found.append(f"{len(index)}: loss {values['loss']:.4g}")
        lost = [key for key, value in values.items() if not math.isfinite(value)]
        bad += [f"loss term {key.removeprefix('loss/')}" for key in lost if key.startswith("loss/")] or lost
        for parameter, gradient in _gradients(step):
            reached.add(parameter)
            if not bool(torch.isfinite(gradient).all()):
                bad.append(f"gradient of {names[parameter]}")
        if not bad and not bool(step.guard.judge(value_N[0], step.gradients)):
            bad.append("a buffer of the networks, or a gradient beyond the guard's limit")
        on_batch()
    text = f"{name} in {run.precision} on batches of {', '.join(found)}"
    if not bad:
        return Check("one step", "ok", f"{text}; loss and gradients finite")
    text += f"; not finite: {listed(dict.fromkeys(bad), limit=4)}"
    if run.nan == "stop":
        return Check("one step", "fail", text, "try precision=float32; check data and weights; or give nan=skip")
    return Check("one step", "note", f"{text}; nan={run.nan} goes on")


def _gradients(step: Step) -> list[tuple[Tensor, Tensor]]:
    """Return each trained parameter with each gradient that it has."""
    groups = step.apart.values() or [[parameter.grad for parameter in step.parameters]]
    return [(p, g) for group in groups for p, g in zip(step.parameters, group, strict=True) if g is not None]


def _check_parameters(assembly: Assembly, trained: set[Tensor], reached: set[Tensor]) -> Check:
    """Count what is trained, and name what no loss term of any phase reaches."""
    groups: Mapping[str, Sequence[nn.Parameter]] = assembly.learnable
    frozen = [p for p in assembly.student.network.parameters() if not p.requires_grad]
    counts = [f"{sum(p.numel() for p in group):,} of the {name}" for name, group in groups.items() if group]
    text = f"trained: {', '.join(counts)}"
    if frozen:
        text += f"; frozen: {sum(p.numel() for p in frozen):,} of the student"
    if fixed := assembly.distiller.num_fixed_norms:
        text += f"; the running statistics of {counted(fixed, 'norm')} in it stay as they are"
    if not any(parameter in reached for parameter in groups["student"]):
        return Check(
            "parameters", "fail", "no loss reaches the student: it would learn nothing", "choose another method"
        )
    lost = [name for name, p in assembly.distiller.named_parameters() if p in trained and p not in reached]
    if lost:
        text += f"; no loss reaches {listed(lost, limit=4)}, which will not move"
        return Check("parameters", "note", text)
    return Check("parameters", "ok", f"{text}; each gets a gradient")


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
