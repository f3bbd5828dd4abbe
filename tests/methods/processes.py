"""Every method on two processes that share a batch, against one process that has it whole."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .worlds import BATCH, Inputs, build, draw, gradients, loss_of, pair_of, progress, step


class Gather(torch.autograd.Function):
    """The rows of all processes; backward brings back the sum over processes of one's own rows' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gathered(inputs: Inputs) -> Inputs:
    """All processes' rows, differentiable in one's own."""
    return Inputs(
        {name: Gather.apply(x) for name, x in inputs.student.items()},
        {name: Gather.apply(x) for name, x in inputs.teacher.items()},
        type(inputs.batch)(Gather.apply(inputs.batch.index), Gather.apply(inputs.batch.target)),
    )


def mean(x: Tensor) -> Tensor:
    """Over processes."""
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def largest_error(case: Any, settings: Any) -> float:
    """The largest relative error of a value, a gradient or a buffer, batch norm in evaluation mode."""
    pair, world = pair_of(case), dist.get_world_size()
    share = BATCH // world
    gathers = settings.get("gather", False)  # the method does it itself
    alone = build(case, {**settings, "gather": False} if gathers else settings, pair)
    step(alone, draw(alone, pair, seed=100), alone.phases[0], progress(alone.phases[0], step=0))
    alone.eval()
    shared = copy.deepcopy(alone)
    if gathers:
        shared.gather = True
    inputs = draw(alone, pair)
    worst = 0.0

    def compare(actual: Tensor, expected: Tensor) -> None:
        nonlocal worst
        scale = expected.double().abs().max().item() if expected.numel() else 0.0
        error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        worst = max(worst, error / max(scale, 1e-9))

    for phase in alone.phases:
        mine = inputs.rows(torch.arange(BATCH).chunk(world)[dist.get_rank()])
        seen = gathered(mine) if alone.needs.couples_samples and not gathers else mine
        loss = loss_of(shared, seen, phase)
        whole = loss_of(alone, inputs, phase)
        compare(mean(loss), whole.detach())
        expected = gradients(alone, inputs, whole)
        for name, grad in gradients(shared, mine, loss).items():
            if name.startswith("student"):
                compare(grad / world, expected[name][dist.get_rank() * share :][:share])
            else:
                compare(mean(grad), expected[name])
        for method, of in ((alone, inputs), (shared, gathered(mine))):
            student, teacher = of.views()
            method.after_step(student, teacher, of.batch, progress(phase))
        for actual, wanted in zip(shared.buffers(), alone.buffers(), strict=True):
            compare(actual, wanted)
    return worst


def run(rank: int, folder: str) -> None:
    """One of two processes; the first writes every case's error."""
    from .cases import CASES
    from .test_contract import _name

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    errors = {_name(case, settings): largest_error(case, settings) for case in CASES for settings in case.variants}
    both = torch.tensor(list(errors.values()), dtype=torch.float64)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    if rank == 0:
        Path(folder, "errors.json").write_text(json.dumps(dict(zip(errors, both.tolist(), strict=True))))
    dist.destroy_process_group()


def errors_of_all() -> dict[str, float]:
    """Start both, and wait for the errors by name of the run."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (folder,), nprocs=2)
        return dict(json.loads(Path(folder, "errors.json").read_text()))
