"""The vertices of a graph: predictions and class distributions, rows of all processes, and tiles of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vrm.divergences import check_temperature

TINY = 1e-300
"""The smallest divisor and argument of a logarithm: with it 0 / 0 and 0 log 0 are 0."""


def check_choice(name: str, value: str, allowed: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is one of the ``Literal`` type ``allowed``."""
    if value not in get_args(allowed):
        raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}")


def check_matrix(name: str, x: Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is a floating-point matrix."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point matrix, one row each; got {tuple(x.shape)} of {x.dtype}")


def count_edges(real_ND: Tensor, virtual_MD: Tensor, *, without_diagonal: bool = False) -> int:
    """Return the number of edges of a graph. Raise ``ValueError`` if these vertices form none."""
    for vertices in (real_ND, virtual_MD):
        check_matrix("vertices", vertices)
    (num_columns, length), (num_rows, virtual_length) = real_ND.shape, virtual_MD.shape
    num_edges = num_rows * num_columns - (num_rows if without_diagonal else 0)
    wrong = ""
    if length != virtual_length:
        wrong = "real and virtual vertices need the same number of coordinates"
    elif without_diagonal and num_rows != num_columns:
        wrong = "a graph without its diagonal joins vertices to themselves, so it needs as many real as virtual ones"
    elif num_edges * length < 1:
        wrong = "the graph has no edges, or edges without coordinates"
    if wrong:
        raise ValueError(f"{wrong}; got vertices of {tuple(real_ND.shape)} and {tuple(virtual_MD.shape)}")
    return num_edges


def predictions(logits_BC: Tensor, *, temperature: float) -> Tensor:
    """Return softened predictions ``softmax(logits / temperature)``, (B, C), in float64 for logits of any precision.

    Relations are differences of predictions, so the rounding of a float32 softmax would be by far the largest error of
    the loss. Differentiable once, like :func:`match_relations`. Raise ``ValueError`` if the temperature is not positive
    and finite, or if the logits are not a floating-point matrix.
    """
    check_matrix("logits", logits_BC)
    check_temperature(temperature)
    probabilities_BC: Tensor = _Softmax.apply(logits_BC, temperature)
    return probabilities_BC


class _Softmax(torch.autograd.Function):
    """Softmax in place on the float64 copy. At this size allocating memory takes as long as the exponentials."""

    @staticmethod
    def forward(ctx: Any, logits_BC: Tensor, temperature: float) -> Tensor:
        x_BC = logits_BC.to(torch.float64, copy=True, memory_format=torch.contiguous_format).mul_(1 / temperature)
        torch.softmax(x_BC, dim=1, out=x_BC)
        ctx.save_for_backward(x_BC)
        ctx.temperature, ctx.dtype = temperature, logits_BC.dtype
        return x_BC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BC: Tensor) -> tuple[Tensor, None]:
        (p_BC,) = ctx.saved_tensors
        grad_BC = grad_BC * p_BC
        grad_BC.addcmul_(p_BC, grad_BC.sum(1, keepdim=True), value=-1).mul_(1 / ctx.temperature)
        return grad_BC.to(ctx.dtype), None


def class_distributions(predictions_BC: Tensor) -> Tensor:
    """Return the class vertices (C, B), each normalised to sum 1 over the batch, without gradient.

    Joint entropies of classes are computed from these.
    """
    classes_CB = predictions_BC.detach().T
    return classes_CB / classes_CB.sum(1, keepdim=True).clamp_min_(TINY)


def lengths(x_ND: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, (N,)."""
    # On a CPU `vector_norm` uses no vector instructions for a transposed matrix, though it needs one pass only.
    transposed = x_ND.device.type == "cpu" and not x_ND.is_contiguous()
    length_N: Tensor = x_ND.square().sum(1).sqrt_() if transposed else torch.linalg.vector_norm(x_ND, dim=1)
    return length_N


MIN_PRODUCT_ROWS = 128
"""The least number of rows of a tile of matrix products; those of fewer rows are slow."""


def tile_size(device: torch.device) -> int:
    """Return the number of elements of a tile.

    On a CPU it fills 2 MiB of float64, what the cache holds; on a GPU it is larger, for fewer kernel launches.
    """
    return 1 << (18 if device.type == "cpu" else 22)


def row_tiles(num_rows: int, elements_per_row: int, device: torch.device, *, min_rows: int = 1) -> Iterator[slice]:
    """Yield slices that divide the rows of a graph into tiles of at least ``min_rows`` rows, however long they are."""
    size = max(min_rows, tile_size(device) // elements_per_row)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.size = group, len(x_BD)
        parts = [torch.empty_like(x_BD) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x_BD.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.size
        return grad[start : start + ctx.size], None


def gather_vertices(x_BD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows (B, D) of all processes in the order of their ranks, or ``x_BD`` itself if ``group`` is None.

    Every process must bring the same B. The gradient of a row is summed over the processes and returned to the process
    that owns the row.
    """
    gathered: Tensor = x_BD if group is None else _GatherRows.apply(x_BD, group)
    return gathered


def own_rows(num_rows: int, group: dist.ProcessGroup | None) -> slice:
    """Return the rows of a graph that this process computes: all, or its part (empty if processes outnumber rows)."""
    if group is None:
        return slice(0, num_rows)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return slice(num_rows * rank // size, num_rows * (rank + 1) // size)
