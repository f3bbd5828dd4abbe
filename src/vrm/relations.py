"""The mathematics of virtual relation matching: difference relations, their matching, and the pruning of edges.

A *relation* of two vertices is the unit difference vector between them. A graph of relations joins every vertex of the
real view to every vertex of the virtual view; VRM (Zhang, Xie, Cai, Ma, "VRM: Knowledge Distillation via Virtual Relation
Matching", ICCV 2025) asks the student's graph to equal the teacher's. Vertices are predictions of samples, rows of
(B, C): *inter-sample* relations; or predictions of classes, its columns of length B: *inter-class* relations; or pooled
features, or anything else: the functions here take vertices as the rows of a matrix.

Algorithm 1 of the paper stores every difference vector. Here none is stored. With teacher vertices a (real), b (virtual)
and student vertices c (real), d (virtual)

    (a_n - b_m) . (c_n - d_m) = a_n . c_n - a_n . d_m - b_m . c_n + b_m . d_m

and likewise for the squared lengths, so matrix products give all that the loss and its gradient need, some rows of the
graph at a time. Such sums cancel where an edge is short. They are therefore formed in float64, twice the precision of
the float32 that vertices come from, and the relatively shortest edges of each row are recomputed from their differences.
Where twice the precision is not to be had (float64 vertices) every edge is computed from its difference, tile by tile.

The gradient is formed beside the value, tile by tile, so the backward pass recomputes nothing and no matrix of the size
of the graph outlives its tile. It is a first derivative: differentiating it again raises an error.

Shapes: N real vertices, M virtual vertices, D length of a vertex, B samples, C classes, R rows of a tile,
K repaired edges of a row. Graphs are indexed [virtual, real]: (M, N).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

JointEntropy = Literal["mixture", "cross", "independent", "collision"]
Matching = Literal["squared", "huber"]

MAX_STORED_EDGES = 1 << 26
"""Above this many edges (8192 x 8192) pruning stores no matrix of the size of the graph: see :func:`prune_edges`."""

# In each row this many relatively shortest edges are recomputed: the same image or class, and duplicates.
_REPAIRED = 4
# A float64 product knows nothing of |d|^2 below this share of |p|^2 + |q|^2: such an edge counts as having no length.
_NOISE = 2.0**-46
# Keeps 0 log 0 and 0 / 0 at zero.
_TINY = 1e-300
# Of each of the two passes that find a threshold without storing the graph.
_NUM_BINS = 1 << 16


def predictions(logits_BC: Tensor, *, temperature: float) -> Tensor:
    """Softened predictions (B, C) in float64 from logits of any precision: ``softmax(logits / temperature)``.

    float64, because relations are differences of predictions: after a float32 softmax its rounding would be by far the
    largest error of the loss.
    """
    return torch.softmax(logits_BC.double() / temperature, dim=1)


def class_distributions(predictions_BC: Tensor) -> Tensor:
    """Class vertices (C, B), each normalised to sum 1 over the batch: what joint entropies of classes are taken of."""
    return (predictions_BC / predictions_BC.sum(0).clamp_min(_TINY)).T


def _tiles(num_rows: int, elements_per_row: int, device: torch.device, *, least: int = 1) -> Iterator[slice]:
    """Slices of rows; a tile has at most 2^18 elements on a CPU (2 MiB: its cache), 2^22 on a GPU (few launches)."""
    budget = 1 << (18 if device.type == "cpu" else 22)
    size = max(least, budget // max(elements_per_row, 1))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _check_choice(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}")


# Unreliable-edge pruning ------------------------------------------------------------------------------------------


def joint_entropy(real_ND: Tensor, virtual_MD: Tensor, *, kind: JointEntropy = "mixture") -> Tensor:
    """Joint entropy of every pair of a real and a virtual vertex: (M, N), in nats, float64, without gradient.

    Vertices (N, D) and (M, D) are distributions: non-negative rows of sum 1 (for classes see
    :func:`class_distributions`). VRM prunes edges of high joint entropy; the paper's formula is not in the published text,
    which says that it grows with the discrepancy of the two and tends to their own uncertainty when they agree:

    - ``mixture``: ``H((p + q) / 2)``, which does both. N M D logarithms, taken in tiles of constant size.
    - ``cross``: ``-sum q log p``, p the real vertex. One matrix product.
    - ``independent``: ``H(p) + H(q)``, which ignores the discrepancy.
    - ``collision``: ``-log sum ((p + q) / 2)^2``, the order-2 Renyi entropy of the mixture. One matrix product.
    """
    _check_choice("joint_entropy", kind, JointEntropy)
    with torch.no_grad():
        return _joint_entropy(real_ND.detach().double(), virtual_MD.detach().double(), kind)


def _joint_entropy(p_ND: Tensor, q_MD: Tensor, kind: JointEntropy) -> Tensor:
    if kind == "mixture":
        # H((p + q) / 2) = log 2 - 1/2 sum (p + q) log(p + q): one addition and one logarithm an element.
        entropy_MN = p_ND.new_empty(len(q_MD), len(p_ND))
        for rows in _tiles(len(q_MD), p_ND.numel(), p_ND.device):
            sum_RND = p_ND + q_MD[rows, None]
            entropy_MN[rows] = sum_RND.clamp_min(_TINY).log_().mul_(sum_RND).sum(-1)
        half_mass_MN = (p_ND.sum(1) + q_MD.sum(1)[:, None]) / 2
        return half_mass_MN.mul_(math.log(2)).sub_(entropy_MN, alpha=0.5)
    if kind == "cross":
        return -(q_MD @ p_ND.clamp_min(_TINY).log().T)
    if kind == "independent":
        return torch.special.entr(p_ND).sum(1) + torch.special.entr(q_MD).sum(1)[:, None]
    square_MN = torch.addmm(p_ND.square().sum(1)[None], q_MD, p_ND.T, alpha=2.0).add_(q_MD.square().sum(1)[:, None])
    return square_MN.mul_(0.25).clamp_min_(_TINY).log_().neg_()


def _rank(num_edges: int, keep: float) -> int:
    """How many of E values lie at or below their ``keep``-quantile with linear interpolation."""
    return math.floor(keep * (num_edges - 1)) + 1


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.sort().values[k - 1]  # kthvalue has no deterministic mode on CUDA
    return values.kthvalue(k).values


@dataclass(frozen=True)
class EntropyThreshold:
    """The kept edges of a graph too large to store: those of joint entropy at most ``threshold``, found row by row."""

    real_ND: Tensor
    virtual_MD: Tensor
    kind: JointEntropy
    threshold: Tensor

    def __getitem__(self, rows: slice) -> Tensor:
        """The keep mask (R, N) of some rows."""
        return _joint_entropy(self.real_ND, self.virtual_MD[rows], self.kind) <= self.threshold


def _num_edges(num_rows: int, num_columns: int, self_edges: int | None) -> int:
    """Edges of M rows and N columns, without those (m, m + self_edges) that join a vertex to itself."""
    if self_edges is None:
        return num_rows * num_columns
    return num_rows * num_columns - max(0, min(num_rows, num_columns - self_edges))


def prune_edges(
    real_ND: Tensor,
    virtual_MD: Tensor,
    *,
    keep: float,
    kind: JointEntropy = "mixture",
    self_edges: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor | EntropyThreshold | None:
    """Unreliable-edge pruning: the edges whose joint entropy is at most the ``keep``-quantile of this graph.

    Vertices (N, D), (M, D) are the *student's* distributions (see :func:`joint_entropy`). The quantile interpolates
    linearly, so that floor(keep (E - 1)) + 1 of E edges stay, and ties with the last. Returns ``None`` (all edges) for
    ``keep=1``, a mask (M, N), or beyond :data:`MAX_STORED_EDGES` an :class:`EntropyThreshold` whose threshold is right to
    log(D) / 2^32 nats: it comes from two passes of a histogram of 2^16 bins. ``mixture`` is refused there.

    ``self_edges``: the offset of a diagonal of edges that do not exist (the redundant graph joins no vertex to itself).
    ``group``: the rows of the graph are spread over these processes; the quantile is of the whole graph.

    ``ValueError`` for ``keep`` outside (0, 1], an unknown ``kind``, and ``mixture`` on a graph that is too large.
    """
    _check_choice("joint_entropy", kind, JointEntropy)
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of edges that stay: above 0, at most 1 (no pruning); got {keep}")
    if keep == 1:
        return None
    with torch.no_grad():
        p_ND, q_MD = real_ND.detach().double(), virtual_MD.detach().double()
        num_rows, num_columns = len(q_MD), len(p_ND)
        num_edges = _num_edges(num_rows, num_columns, self_edges)
        if group is not None:
            sizes = torch.tensor([num_edges, num_rows], device="cpu")
        if num_rows * num_columns > MAX_STORED_EDGES:
            raise NotImplementedError
        entropy_MN = _joint_entropy(p_ND, q_MD, kind)
        if self_edges is not None:
            entropy_MN.diagonal(self_edges).fill_(math.inf)
        threshold = _kth_smallest(entropy_MN.flatten(), _rank(num_edges, keep))
        return entropy_MN <= threshold
