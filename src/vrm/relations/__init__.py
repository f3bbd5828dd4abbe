"""The mathematics of virtual relation matching: difference relations, their matching, and the pruning of edges.

A *relation* of two vertices is the unit difference vector between them. A graph of relations joins every vertex of the
real view to every vertex of the virtual view; VRM (Zhang, Xie, Cai, Ma, "VRM: Knowledge Distillation via Virtual
Relation Matching", ICCV 2025) asks the student's graph to equal the teacher's. Vertices are predictions of samples,
rows of (B, C): *inter-sample* relations; or predictions of classes, its columns of length B: *inter-class* relations;
or pooled features, or anything else: the functions here take vertices as the rows of a matrix.

Algorithm 1 of the paper stores every difference vector. Here none is stored. With teacher vertices a (real), b
(virtual) and student vertices c (real), d (virtual)

    (a_n - b_m) . (c_n - d_m) = a_n . c_n - a_n . d_m - b_m . c_n + b_m . d_m

and likewise for the squared lengths, so matrix products give all that the loss and its gradient need, some rows of the
graph at a time. Such sums cancel where an edge is short, and the edge between two views of one image may be. A float64
product has bits to spare for edges down to 2^-10 of the length of their vertices. Where a tile has shorter ones, each
product is formed as two, an exact one of the leading bits and one of the rest (:class:`_EdgeProducts`), which together
carry some 76 bits: far more than the float32 that vertices come from. Vertices given in float64 leave no such room;
there, and in small graphs, every edge is computed from its difference, a tile at a time.

The gradient is formed beside the value, tile by tile, so the backward pass recomputes nothing and no matrix of the size
of the graph outlives its tile. It is a first derivative: differentiating it once more raises an error.

Shapes: N real vertices, M virtual vertices, D length of a vertex, B samples, C classes, R rows of a tile. Graphs are
indexed [virtual, real]: (M, N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

JointEntropy = Literal["mixture", "cross", "independent", "collision"]
Matching = Literal["squared", "huber"]

MAX_STORED_EDGES = 1 << 26
"""Above this many edges (8192 x 8192) pruning stores no matrix of the size of the graph: see :func:`prune_edges`."""

# Keeps 0 log 0 and 0 / 0 at zero.
_TINY = 1e-300
# Of the third size of products (see _Split) times sqrt(D), the share below which |p - q|^2 is their rounding noise.
_NOISE = 2.0**-49
# Of 1 - cos, what is nothing but the rounding of its terms.
_ROUNDING = 2.0**-48
# Relations of one coordinate are signs, those of two classes' predictions are parallel: their gradient vanishes, which
# products would have to resolve from rounding.
_FEW_COORDINATES = 2
# Of |q|^2, the share below which float64 products are too coarse for float32 results: |p - q| < 2^-10 |q|.
_SHORT = 2.0**-20
# Up to this many short edges a row are computed one by one, from their differences.
_FEW_SHORT = 8
# Of the mean of 1 - cos, the least that float64 products of edges of that length resolve well enough.
_ALIKE = 2.0**-10
# By how much the ratio of squared lengths, student's to teacher's, may differ among vertices that are added up.
_SPREAD = 2.0**32
# Its square is divided by.
_LEAST_EPS = 1e-150
# Up to this many coordinates (edges times D) differences are cheaper than products; on a GPU kernels count, not work.
_SMALL_GRAPH = 1 << 16
_SMALL_GRAPH_GPU = 1 << 20
# Of a tile of matrix products.
_LEAST_ROWS = 128
# Of more values than this NumPy finds the k-th smallest, on a CPU.
_FEW_VALUES = 1 << 13
# Of more values than this it is first looked for near that of every 127th, or found by sorting on a GPU.
_MANY_VALUES = 1 << 15
_SAMPLE_STRIDE = 127


def predictions(logits_BC: Tensor, *, temperature: float) -> Tensor:
    """Softened predictions (B, C) in float64 from logits of any precision: ``softmax(logits / temperature)``.

    float64, because relations are differences of predictions: after a float32 softmax its rounding would be by far the
    largest error of the loss. Differentiable once, as :func:`match_relations` is. ``ValueError`` for a temperature that
    is not above 0 and finite, and for logits that are not a matrix of floating point.
    """
    _check_matrix("logits", logits_BC)
    check_temperature(temperature)
    probabilities_BC: Tensor = _Softmax.apply(logits_BC, temperature)
    return probabilities_BC


class _Softmax(torch.autograd.Function):
    """In place on the float64 copy, and a gradient of one temporary: at this size new memory costs as much as exp."""

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
    """Class vertices (C, B), each normalised to sum 1 over the batch: what joint entropies of classes are taken of.

    Without gradient, as these are.
    """
    classes_CB = predictions_BC.detach().T
    return classes_CB / classes_CB.sum(1, keepdim=True).clamp_min_(_TINY)


def _lengths(x_ND: Tensor) -> Tensor:
    """Of vertices, (N,)."""
    # `vector_norm` takes one pass, but on a CPU none with vectors over columns.
    columns = x_ND.device.type == "cpu" and not x_ND.is_contiguous()
    length_N: Tensor = x_ND.square().sum(1).sqrt_() if columns else torch.linalg.vector_norm(x_ND, dim=1)
    return length_N


def _tile_size(device: torch.device) -> int:
    """Elements of a tile: on a CPU what its cache holds (2 MiB), on a GPU many (few launches)."""
    return 1 << (18 if device.type == "cpu" else 22)


def _tiles(num_rows: int, elements_per_row: int, device: torch.device, *, least: int = 1) -> Iterator[slice]:
    """Slices of rows, of a tile's size.

    ``least``: how many rows a tile has however long they are; matrix products of few rows are slow.
    """
    size = max(least, _tile_size(device) // elements_per_row)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _check_matrix(name: str, x: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{name} are the rows of a matrix of floating point; got {tuple(x.shape)} of {x.dtype}")


def _num_edges(real_ND: Tensor, virtual_MD: Tensor, *, without_diagonal: bool = False) -> int:
    """``ValueError`` unless these are vertices of a graph that has edges."""
    for vertices in (real_ND, virtual_MD):
        _check_matrix("vertices", vertices)
    (num_columns, length), (num_rows, virtual_length) = real_ND.shape, virtual_MD.shape
    num_edges = num_rows * num_columns - (num_rows if without_diagonal else 0)
    wrong = ""
    if length != virtual_length:
        wrong = "real and virtual vertices need the same number of coordinates"
    elif without_diagonal and num_rows != num_columns:
        wrong = "a graph without its diagonal joins vertices to themselves, so it needs as many real as virtual ones"
    elif num_edges * length < 1:
        wrong = "the graph has no edges, or edges of no coordinates"
    if wrong:
        raise ValueError(f"{wrong}; got vertices of {tuple(real_ND.shape)} and {tuple(virtual_MD.shape)}")
    return num_edges


def _check_choice(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}")


# Across processes -------------------------------------------------------------------------------------------------


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
    """Rows (B, D) of all processes in the order of their ranks; every process must bring the same B.

    A gradient is summed over the processes and goes back to the rows' owner. ``group=None``: the rows themselves.
    """
    gathered: Tensor = x_BD if group is None else _GatherRows.apply(x_BD, group)
    return gathered


def own_rows(num_rows: int, group: dist.ProcessGroup | None) -> slice:
    """The rows of a graph that this process computes: all, or its even share (none, if there are more processes)."""
    if group is None:
        return slice(0, num_rows)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return slice(num_rows * rank // size, num_rows * (rank + 1) // size)


# Unreliable-edge pruning ------------------------------------------------------------------------------------------


def joint_entropy(real_ND: Tensor, virtual_MD: Tensor, *, kind: JointEntropy = "mixture") -> Tensor:
    """Joint entropy of every pair of a real and a virtual vertex: (M, N), in nats, float64, without gradient.

    Vertices (N, D) and (M, D) are distributions: non-negative rows of sum 1 (for classes see
    :func:`class_distributions`). VRM prunes edges of high joint entropy. Its text says that this grows with the
    discrepancy of the two, and tends to their own uncertainty when they agree; the formula is our choice:

    - ``mixture``: ``H((p + q) / 2)``, which does both. N M D logarithms, taken in tiles of constant size.
    - ``cross``: ``-sum q log p``, p the real vertex. One matrix product.
    - ``independent``: ``H(p) + H(q)``, which ignores the discrepancy.
    - ``collision``: ``-log sum ((p + q) / 2)^2``, the order-2 Renyi entropy of the mixture. One matrix product.

    ``ValueError`` for an unknown ``kind``, and vertices that make no graph.
    """
    _check_choice("joint_entropy", kind, JointEntropy)
    _num_edges(real_ND, virtual_MD)
    with torch.no_grad():
        rank = _EntropyRank(real_ND.detach().double(), virtual_MD.detach().double(), kind, torch.float64)
        return rank.entropy(rank[:])


class _EntropyRank:
    """Numbers in the order of joint entropies, some rows of the graph at a time, in ``dtype``.

    They are entropies less that of uniform distributions, because at the start of training every prediction is close to
    one, and the differences of their entropies to nothing. Of ``collision`` they are ``1 - D sum m^2``
    with the mixture m, which takes no logarithm. ``own``: the rows of the graph that are asked for.
    """

    def __init__(
        self, p_ND: Tensor, q_MD: Tensor, kind: JointEntropy, dtype: torch.dtype, own: slice = slice(None)
    ) -> None:
        self.kind, self.dtype, self.length = kind, dtype, p_ND.shape[1]
        self.cancelling = p_ND.new_zeros(())
        if kind == "mixture":
            self.p_ND, self.q_MD = (x.mul(self.length / 2).sub_(0.5).to(dtype).contiguous() for x in (p_ND, q_MD))
        elif kind == "collision" and dtype == torch.float64:
            # 1 - D sum m^2 = 1/2 - D/4 |p|^2 + 1/2 - D/4 |q|^2 - D/2 p.q
            self.p_ND, self.q_MD = p_ND, q_MD
            self.own_N, self.own_M = (_lengths(x).square_().mul_(-self.length / 4).add_(0.5) for x in (p_ND, q_MD))
        elif kind == "collision":
            # D sum m^2 = D sum (m - 1/D)^2 + 2 sum m - 1, of which the first is small where predictions are even
            self.p_ND, self.q_MD = (x.sub(1 / self.length).to(dtype) for x in (p_ND, q_MD))
            self.own_N, self.own_M = (
                x.sum(1).neg_().add_(1).sub_(_lengths(centred).square_(), alpha=self.length / 4).to(dtype)
                for x, centred in ((p_ND, self.p_ND), (q_MD, self.q_MD))
            )
            # |p + q|^2 <= |p|^2 + |q|^2 by at most -2 p.q, which is at most 1/2, and at most their mean
            self.cancelling = (self.own_N.amin() + self.own_M.amin()).neg_().clamp_(0.0, 0.5)
        elif kind == "cross":
            self.p_ND, self.q_MD = p_ND.clamp_min(_TINY).log_().add_(math.log(self.length)), q_MD
            self.cancelling = 2 * self.p_ND.amax()
        else:
            self.p_ND, self.q_MD = p_ND, q_MD
            self.own_N, self.own_M = (
                (-torch.xlogy(x, x).sum(1)).sub_(math.log(self.length)).to(dtype) for x in (p_ND, q_MD)
            )
        self.q_MD = self.q_MD[own]
        if kind in ("collision", "independent"):
            self.own_M = self.own_M[own]

    def tiles(self) -> Iterator[slice]:
        """Slices of rows, of a tile's size."""
        return _tiles(len(self.q_MD), len(self.p_ND), self.p_ND.device, least=_LEAST_ROWS)

    def __getitem__(self, rows: slice) -> Tensor:
        q_RD = self.q_MD[rows]
        rank_RN = self.p_ND.new_empty(len(q_RD), len(self.p_ND), dtype=self.dtype)
        if self.kind == "mixture":
            return self._mixture(q_RD, rank_RN)
        if self.kind == "cross":
            return rank_RN.copy_((q_RD @ self.p_ND.T).neg_())
        if self.kind == "independent":
            return torch.add(self.own_N, self.own_M[rows, None], out=rank_RN)
        # The product by itself, as some libraries add term by term; in place, so autocast leaves it alone.
        rank_RN.addmm_(q_RD, self.p_ND.T, alpha=-self.length / 2, beta=0.0)
        return rank_RN.add_(self.own_N).add_(self.own_M[rows, None])

    def _mixture(self, q_RD: Tensor, entropy_RN: Tensor) -> Tensor:
        """``-1/D sum (1 + x) log(1 + x)`` with ``1 + x = D (p + q) / 2``, in tiles."""
        least = -1 + torch.finfo(self.dtype).eps / 2
        for rows in _tiles(len(q_RD), self.p_ND.numel(), self.p_ND.device):
            x_RND = (self.p_ND + q_RD[rows, None]).clamp_min_(least)
            log_RND = x_RND.log1p()
            torch.sum(log_RND.addcmul_(log_RND, x_RND), -1, out=entropy_RN[rows])
        return entropy_RN.div_(-self.length)

    def rounding(self, number: Tensor) -> Tensor:
        """By how much the numbers of edges may differ that equal this one: those of duplicates, which products round.

        It is the same for every process and tile: ``cancelling`` bounds, over the whole graph, by how much the summands
        of a product exceed their sum. Rounding errors of a sum grow as the root of the number of its terms. The
        distributions themselves have those of float64, and so have products of them.
        """
        errors = 4 + math.sqrt(self.length)
        eps, own_eps = (errors * torch.finfo(x).eps for x in (self.p_ND.dtype, torch.float64))
        return (number.abs() + self.cancelling).mul_(eps).add_(own_eps).to(number.dtype)

    def entropy(self, rank: Tensor) -> Tensor:
        """Of the numbers, in nats."""
        uniform = math.log(self.length) * (2 if self.kind == "independent" else 1)
        return uniform + (-torch.log1p(-rank) if self.kind == "collision" else rank)


def _rank(num_edges: int, keep: float) -> int:
    """How many of E values lie at or below their ``keep``-quantile with linear interpolation."""
    return math.floor(keep * (num_edges - 1)) + 1


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    if values.is_cuda and (len(values) > _MANY_VALUES or torch.are_deterministic_algorithms_enabled()):
        # On CUDA kthvalue is one block of threads, whatever the number of values, and has no deterministic mode.
        return values.sort().values[k - 1]
    if values.device.type != "cpu" or len(values) <= _FEW_VALUES or torch.compiler.is_compiling():
        return values.kthvalue(k).values
    near = _near(values, k) if len(values) > _MANY_VALUES else None
    return _partitioned(values.clone(), k) if near is None else near


# On a CPU NumPy selects and compares with vectors, which PyTorch does not: ten and three times as fast.


def _partitioned(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of values, which are reordered."""
    values.numpy().partition(k - 1)
    return values[k - 1]


def _below(values: Tensor, bound: float) -> Tensor:
    return torch.from_numpy(values.numpy() < bound)


def _near(values: Tensor, k: int) -> Tensor | None:
    """The k-th smallest of many values, looked for near that of a sample; ``None`` if it is not there."""
    sample = values[::_SAMPLE_STRIDE].clone()
    expected = max(1, round(k / len(values) * len(sample)))
    pivot = float(_partitioned(sample, expected))
    below_pivot = _below(values, pivot)
    num_below = int(below_pivot.count_nonzero())
    # So far from the pivot it is, counted in the sample: almost surely no more than four deviations from that.
    way = (k - num_below - 0.5) / _SAMPLE_STRIDE
    bound = expected + round(way + math.copysign(4 * math.sqrt(abs(way)) + 4, way))
    beyond = -math.inf if bound < 1 else math.inf
    other = float(_partitioned(sample, bound)) if 1 <= bound <= len(sample) else beyond

    # Flags are looked through eight at a time, as integers: eights with a value between the two, and the last values.
    whole = len(values) // 8 * 8
    flags_W, flags_of_other_W = (x[:whole].view(torch.int64) for x in (below_pivot, _below(values, other)))
    eights = (flags_W ^ flags_of_other_W).nonzero()[:, 0]
    candidates = torch.cat([values[:whole].view(-1, 8).index_select(0, eights).flatten(), values[whole:]])
    rank = k - num_below + int((candidates < pivot).count_nonzero())
    if not 1 <= rank <= len(candidates):
        return None
    found = _partitioned(candidates, rank)
    return found if min(pivot, other) <= found < max(pivot, other) else None


def _kth_smallest_of_tiles(
    tiles: Callable[[], Iterable[Tensor]], k: int, like: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """The k-th smallest, exactly, of values that are never in one place: of tiles, and of all processes.

    Radix select: each pass over ``tiles()`` counts 16 bits, from the upper ones on. Two passes for float32, four for
    float64. ``like``: has their dtype and device.
    """
    integer, num_bits = (torch.int32 if like.dtype == torch.float32 else torch.int64), 8 * like.itemsize
    key = torch.zeros((), dtype=torch.int64, device=like.device)  # the upper bits of the k-th smallest
    rank = torch.full_like(key, k)
    for shift in range(num_bits - 16, -1, -16):
        counts = key.new_zeros(1 << 16)
        for values in (part for tile in tiles() for part in torch.split(tile.flatten(), _tile_size(like.device))):
            keys = _ordered(values.view(integer)) >> shift
            if shift == num_bits - 16:
                digits, counted = keys.long() + (1 << 15), torch.ones_like(keys)  # signed
            else:
                digits, counted = keys.long() & 0xFFFF, keys >> 16 == key
            counts.scatter_add_(0, digits, counted.long())
        if group is not None:
            dist.all_reduce(counts, group=group)
        up_to = counts.cumsum(0)
        below = up_to < rank
        rank -= torch.where(below, up_to, 0).amax()
        key = below.sum() - (1 << 15) if shift == num_bits - 16 else (key << 16) + below.sum()
    return _ordered(key.to(integer)).view(like.dtype)


def _ordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers of the same order (negative floats descend), and back."""
    return bits ^ (bits >> (bits.itemsize * 8 - 1) & torch.iinfo(bits.dtype).max)


@dataclass(frozen=True)
class EntropyThreshold:
    """The kept edges of a graph too large to store: those of joint entropy at most ``threshold``, found row by row.

    ``rank``: numbers in the order of joint entropies. ``diagonal``: the offset of the diagonal without edges, if any.
    """

    rank: _EntropyRank
    diagonal: int | None
    threshold: Tensor

    def __getitem__(self, rows: slice) -> Tensor:
        """The keep mask (R, N) of some rows."""
        return _without_diagonal(self.rank[rows], self.diagonal, rows) <= self.threshold


def _without_diagonal(rank_RN: Tensor, diagonal: int | None, rows: slice) -> Tensor:
    if diagonal is not None:
        rank_RN.diagonal(diagonal + rows.start).fill_(math.inf)
    return rank_RN


def prune_edges(
    real_ND: Tensor,
    virtual_MD: Tensor,
    *,
    keep: float,
    kind: JointEntropy = "mixture",
    without_diagonal: bool = False,
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor | EntropyThreshold | None:
    """Unreliable-edge pruning: which edges have a joint entropy of at most the ``keep``-quantile of this graph.

    Vertices (N, D), (M, D) are the *student's* distributions (see :func:`joint_entropy`). The quantile interpolates
    linearly: floor(keep (E - 1)) + 1 of E edges stay, and those that tie with the last, up to rounding. Returns
    ``None`` (all edges) for ``keep=1``; a mask (M, N), bool; or, beyond :data:`MAX_STORED_EDGES`, an
    :class:`EntropyThreshold`, found in passes over the graph that count 16 bits of the entropies each.

    ``without_diagonal``: real and virtual vertices are the same, and none has an edge to itself (redundant graph).
    ``dtype``: that of entropies, by default the vertices' own. float32 is several times as fast, and does not tell
    edges apart whose entropies differ by less than some 1e-5 nats: they are tied. A student that is as sure as that of
    everything keeps more than the share, up to all; float64 tells these apart, too. ``collision`` takes float64 all the
    same where the graph has no more edges than the vertices have coordinates: there it is faster.
    ``group``: the vertices are those of all processes; each finds the mask of its own rows (see
    :func:`match_relations`), and the quantile is of the whole graph.

    ``ValueError`` for ``keep`` outside (0, 1], an unknown ``kind``, vertices that make no graph, and ``mixture`` on a
    graph too large to store.
    """
    check_pruning(keep, kind)
    num_edges = _num_edges(real_ND, virtual_MD, without_diagonal=without_diagonal)
    if keep == 1:
        return None
    num_rows, num_columns, length = len(virtual_MD), len(real_ND), real_ND.shape[1]
    rows = own_rows(num_rows, group)
    stored = num_rows * num_columns <= MAX_STORED_EDGES
    if kind == "mixture" and not stored:
        raise ValueError(
            f"joint_entropy='mixture' takes a logarithm for each edge and coordinate, {num_rows} x {num_columns} x "
            f"{length} a step, on a graph of more than {MAX_STORED_EDGES} edges; use joint_entropy='collision', "
            "which is a matrix product, or keep=1"
        )
    dtype = torch.float64 if (real_ND.dtype if dtype is None else dtype) == torch.float64 else torch.float32
    if kind == "collision" and num_rows * num_columns <= real_ND.numel():
        dtype = torch.float64  # converting vertices would take longer than their products in float64 do
    diagonal = rows.start if without_diagonal else None
    k = _rank(num_edges, keep)
    with torch.no_grad():
        rank = _EntropyRank(real_ND.double(), virtual_MD.double(), kind, dtype, rows)
        if not stored:

            def recomputed() -> Iterator[Tensor]:
                return (_without_diagonal(rank[tile], diagonal, tile) for tile in rank.tiles())

            rank_RN = rank.p_ND.new_empty(0, dtype=dtype)
            threshold = _kth_smallest_of_tiles(recomputed, k, rank_RN, group)
        else:
            rank_RN = _without_diagonal(rank[:], diagonal, slice(0, None))
            if group is None:
                threshold = _kth_smallest(rank_RN.flatten(), k)
            else:
                threshold = _kth_smallest_of_tiles(lambda: [rank_RN], k, rank_RN, group)
        threshold = threshold + rank.rounding(threshold)
        return rank_RN.le_(threshold).bool() if stored else EntropyThreshold(rank, diagonal, threshold)


# Matching ---------------------------------------------------------------------------------------------------------


def _leading_bits(x: Tensor, size: Tensor, num_bits: int) -> Tensor:
    """Rounds to multiples of about ``size / 2^num_bits``: adding a large number does (Veltkamp, Dekker 1971)."""
    large = size * (1.5 * 2.0 ** (52 - num_bits))
    return (x + large).sub_(large)


@dataclass(frozen=True)
class _Split:
    """Vertices (N, D) in three parts: multiples of about 2^-24 and 2^-48 of the vertex's length, and the rest.

    Products of parts are of one of three sizes. Those of the first two sizes, and the sums of them that make up an
    edge, are exact in float64, so short edges lose nothing as they cancel. The last are smaller by 2^-48, and so is
    their rounding.
    """

    x_ND: Tensor
    x0_ND: Tensor
    x1_ND: Tensor
    x01_ND: Tensor
    x2_ND: Tensor

    @classmethod
    def of(cls, x_ND: Tensor) -> _Split:
        """Splits."""
        length_N1 = _lengths(x_ND)[:, None]
        x0_ND, x01_ND = _leading_bits(x_ND, length_N1, 24), _leading_bits(x_ND, length_N1, 48)
        return cls(x_ND, x0_ND, x01_ND - x0_ND, x01_ND, x_ND - x01_ND)

    def __getitem__(self, rows: slice) -> _Split:
        return _Split(self.x_ND[rows], self.x0_ND[rows], self.x1_ND[rows], self.x01_ND[rows], self.x2_ND[rows])

    def products(self, other: _Split) -> tuple[tuple[tuple[Tensor, Tensor], ...], ...]:
        """Factors, whose products add up to that with another vertex, by the products' size."""
        return (
            ((self.x0_ND, other.x0_ND),),
            ((self.x0_ND, other.x1_ND), (self.x1_ND, other.x0_ND)),
            ((self.x1_ND, other.x1_ND), (self.x01_ND, other.x2_ND), (self.x2_ND, other.x_ND)),
        )

    def dot(self, other: _Split) -> list[Tensor]:
        """Products of corresponding vertices, (N,), by their size."""
        return [
            torch.stack([(x_ND * y_ND).sum(1) for x_ND, y_ND in factors]).sum(0) for factors in self.products(other)
        ]

    def noise(self) -> Tensor:
        """What a vertex adds to the error of a squared length, (N,)."""
        x_N, x1_N, x2_N = (_lengths(x_ND) for x_ND in (self.x_ND, self.x1_ND, self.x2_ND))
        share = _NOISE * math.sqrt(self.x_ND.shape[1])
        noise_N: Tensor = x1_N.square().addcmul_(x_N, x2_N).mul_(share)
        return noise_N


class _EdgeProducts:
    """``own_real[n] + own_virtual[m] + weight * sum of real[n] . virtual[m]`` for every edge: a product of differences.

    Everything is accumulated by matrix products, own parts as well, by their sizes.
    """

    def __init__(
        self,
        pairs: tuple[tuple[_Split, _Split], ...],
        own_real: list[Tensor],
        own_virtual: list[Tensor],
        weight: float,
    ) -> None:
        self.pairs, self.weight = pairs, weight
        one_N, one_M = torch.ones_like(own_real[0]), torch.ones_like(own_virtual[0])
        self.own = [
            (torch.stack([one_M, y_M], 1), torch.stack([x_N, one_N]))
            for x_N, y_M in zip(own_real, own_virtual, strict=True)
        ]

    def __getitem__(self, rows: slice) -> Tensor:
        first_RN, rest_RN = self.own[0][1].new_zeros(2, len(self.own[0][0][rows]), self.own[0][1].shape[1])
        of_pairs = [virtual[rows].products(real) for real, virtual in self.pairs]
        # The rest by itself: where a library adds term by term, each would be rounded to the size of the whole.
        for size, sum_RN in enumerate((first_RN, rest_RN, rest_RN)):
            own_virtual_M2, own_real_2N = self.own[size]
            sum_RN.addmm_(own_virtual_M2[rows], own_real_2N)
            for products in of_pairs:
                for virtual_RD, real_ND in products[size]:
                    sum_RN.addmm_(virtual_RD, real_ND.T, alpha=self.weight)
        total_RN: Tensor = first_RN.add_(rest_RN)
        return total_RN


class _FromProducts:
    """Half the squared distance of relations and its gradient, from products of vertices. Float64 throughout.

    The gradient of an edge for ``d_S`` is ``by_t d_T + by_s d_S``: sums of these over rows and columns of the graph are
    matrix products, too.
    """

    def __init__(self, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor, eps: float) -> None:
        self.a_ND, self.b_MD, self.c_ND, self.d_MD = a_ND, b_MD, c_ND, d_MD
        self.least_square = eps * eps
        self.short: _ShortEdges | None = None
        self.work: Tensor | None = None
        self.dots: _Sums | _Pairs | None = None
        self.aa_N, self.bb_M, self.cc_N, self.dd_M = (_lengths(x).square_() for x in (a_ND, b_MD, c_ND, d_MD))
        # sums over m, and over n, of by_t and by_s
        self.by_t_N, self.by_s_N = torch.zeros_like(self.aa_N), torch.zeros_like(self.aa_N)
        self.by_t_M, self.by_s_M = torch.zeros_like(self.bb_M), torch.zeros_like(self.bb_M)
        self.grad_c_ND, self.grad_d_MD = torch.zeros_like(c_ND), torch.empty_like(d_MD)

    def tiles(self) -> Iterator[slice]:
        """Slices of rows, of a tile's size."""
        return _tiles(len(self.b_MD), len(self.a_ND), self.a_ND.device, least=_LEAST_ROWS)

    def add(self, rows: slice, keep_RN: Tensor | None, num_kept: Tensor | int) -> Tensor:
        """The sum of some rows, whose gradient is added to that of the rows before."""
        # On a GPU a look at the lengths would stall it, and a compiled graph has no branch.
        may_look = self.a_ND.device.type == "cpu" and not torch.compiler.is_compiling()
        value = self._add_ordinary(rows, keep_RN, num_kept) if may_look else None
        if value is not None:
            return value
        if self.short is None:
            self.short = _ShortEdges(self.a_ND, self.b_MD, self.c_ND, self.d_MD, self.least_square)
        value, grad_c_ND, self.grad_d_MD[rows] = self.short.tile(rows, keep_RN)
        self.grad_c_ND += grad_c_ND
        return value

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the sum of all rows, for c (N, D) and d (M, D)."""
        self.grad_c_ND.addcmul_(self.by_t_N[:, None], self.a_ND).addcmul_(self.by_s_N[:, None], self.c_ND)
        self.grad_d_MD.addcmul_(self.by_t_M[:, None], self.b_MD).addcmul_(self.by_s_M[:, None], self.d_MD)
        return self.grad_c_ND, self.grad_d_MD

    def _add_ordinary(self, rows: slice, keep_RN: Tensor | None, num_kept: Tensor | int) -> Tensor | None:
        """By ``1 - cos``, and short edges one by one.

        ``None``, and nothing is added, where products need splitting: of many short edges, and of edges that are alike.
        """
        b_RD, d_RD = self.b_MD[rows], self.d_MD[rows]
        # Memory of all tiles, of which the first is the largest: blocks of their own would scatter.
        if self.work is None:
            self.work = self.a_ND.new_empty(4, len(b_RD), len(self.a_ND))
        tt_RN, ss_RN, ts_RN, minus_kept_RN = self.work[:, : len(b_RD)]
        torch.add(self.aa_N, self.bb_M[rows, None], out=tt_RN).addmm_(b_RD, self.a_ND.T, alpha=-2.0)
        torch.add(self.cc_N, self.dd_M[rows, None], out=ss_RN).addmm_(d_RD, self.c_ND.T, alpha=-2.0)
        if self.dots is None:
            self.dots = self._dots()
        self.dots.product(rows, tt_RN, ss_RN, out=ts_RN)
        short = self._short(rows, tt_RN, ss_RN, keep_RN)
        if short is None:
            return None
        num_ordinary = num_kept - len(short[0])

        by_t_RN = tt_RN.mul_(ss_RN).rsqrt_()
        # Bytes are cast several times as fast as bools.
        by_t_RN.mul_(-1 if keep_RN is None else minus_kept_RN.copy_(keep_RN.view(torch.int8).neg()))
        minus_cosine_RN = ts_RN.mul_(by_t_RN)
        value: Tensor = minus_cosine_RN.sum() + num_ordinary
        if value < _ALIKE * num_ordinary:
            return None
        by_s_RN = minus_cosine_RN.div_(ss_RN.neg_())
        # sum over m of by_t (a_n - b_m) + by_s (c_n - d_m), and minus the sum over n
        self.by_t_N += by_t_RN.sum(0)
        self.by_s_N += by_s_RN.sum(0)
        torch.sum(by_t_RN, 1, out=self.by_t_M[rows])
        torch.sum(by_s_RN, 1, out=self.by_s_M[rows])
        self.grad_c_ND.addmm_(by_t_RN.T, b_RD, alpha=-1.0).addmm_(by_s_RN.T, d_RD, alpha=-1.0)
        grad_d_RD = self.grad_d_MD[rows]
        grad_d_RD.addmm_(by_t_RN, self.a_ND, alpha=-1.0, beta=0.0).addmm_(by_s_RN, self.c_ND, alpha=-1.0)
        if len(short[0]) > 0:
            row_K, column_K = short
            teacher_KD, student_KD = self.a_ND[column_K] - b_RD[row_K], self.c_ND[column_K] - d_RD[row_K]
            value_K, grad_KD = _match_differences(teacher_KD, student_KD, math.sqrt(self.least_square), math.inf)
            value += value_K.sum()
            self.grad_c_ND.index_add_(0, column_K, grad_KD, alpha=-1)
            grad_d_RD.index_add_(0, row_K, grad_KD)
        return value

    def _dots(self) -> _Sums | _Pairs:
        ratio = torch.cat([self.cc_N, self.dd_M]).div_(torch.cat([self.aa_N, self.bb_M]))
        least, most = (float(x) for x in ratio.aminmax())
        vertices = self.a_ND, self.b_MD, self.c_ND, self.d_MD
        if 0 < least <= most <= _SPREAD * least < math.inf:
            return _Sums.of(*vertices, math.sqrt(least) * math.sqrt(most))
        return _Pairs.of(*vertices)

    def _short(self, rows: slice, tt_RN: Tensor, ss_RN: Tensor, keep_RN: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Rows and columns of kept short edges, whose squared lengths become infinite; ``None`` if they are many."""
        # Where an edge is short its vertices are of one length, so that of one of them will do.
        least_tR, least_sR = (x_M[rows] * _SHORT + self.least_square for x_M in (self.bb_M, self.dd_M))
        if not ((tt_RN.amin(1) < least_tR) | (ss_RN.amin(1) < least_sR)).any():
            none = torch.empty(0, dtype=torch.int64)
            return none, none
        short_RN = (tt_RN < least_tR[:, None]).logical_or_(ss_RN < least_sR[:, None])
        if short_RN.count_nonzero() > _FEW_SHORT * len(short_RN):
            return None
        for square_RN in (tt_RN, ss_RN):
            square_RN.masked_fill_(short_RN, math.inf)
        found = (short_RN if keep_RN is None else short_RN.logical_and_(keep_RN)).nonzero()
        return found[:, 0], found[:, 1]


@dataclass(frozen=True)
class _Sums:
    """``t . s`` from one matrix product: ``2 t . s = |w t + s / w|^2 - w^2 |t|^2 - |s|^2 / w^2`` for differences t, s.

    The weight, with ``w^2`` a power of two, makes both about as long: else the longer's rounding would be the result's.
    That takes vertices of which the student's are as long as the teacher's, times about the same for all.
    """

    square: float
    x_ND: Tensor
    y_MD: Tensor
    xx_N: Tensor
    yy_M: Tensor

    @classmethod
    def of(cls, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor, ratio: float) -> _Sums:
        """``ratio``: of squared lengths, the student's by the teacher's."""
        square = 2.0 ** round(math.log2(ratio) / 2)
        weight = math.sqrt(square)
        x_ND, y_MD = ((t * weight).add_(s, alpha=1 / weight) for t, s in ((a_ND, c_ND), (b_MD, d_MD)))
        return cls(square, x_ND, y_MD, *(_lengths(x).square_() for x in (x_ND, y_MD)))

    def product(self, rows: slice, tt_RN: Tensor, ss_RN: Tensor, *, out: Tensor) -> None:
        """``t . s`` of some rows, given their squares."""
        torch.add(self.xx_N, self.yy_M[rows, None], out=out).addmm_(self.y_MD[rows], self.x_ND.T, alpha=-1.0, beta=0.5)
        out.sub_(tt_RN, alpha=self.square / 2).sub_(ss_RN, alpha=0.5 / self.square)


@dataclass(frozen=True)
class _Pairs:
    """``t . s`` from two matrix products, for vertices of any lengths: ``a . c - a . d - b . c + b . d``."""

    a_ND: Tensor
    b_MD: Tensor
    c_ND: Tensor
    d_MD: Tensor
    ac_N: Tensor
    bd_M: Tensor

    @classmethod
    def of(cls, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor) -> _Pairs:
        """Takes vertices."""
        return cls(a_ND, b_MD, c_ND, d_MD, (a_ND * c_ND).sum(1), (b_MD * d_MD).sum(1))

    def product(self, rows: slice, tt_RN: Tensor, ss_RN: Tensor, *, out: Tensor) -> None:
        """``t . s`` of some rows."""
        torch.add(self.ac_N, self.bd_M[rows, None], out=out)
        out.addmm_(self.b_MD[rows], self.c_ND.T, alpha=-1.0).addmm_(self.d_MD[rows], self.a_ND.T, alpha=-1.0)


class _ShortEdges:
    """Tiles of :class:`_FromProducts` that have short edges, at three times the cost."""

    def __init__(self, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor, least_square: float) -> None:
        self.least_square = least_square
        a, b, c, d = self.split = tuple(_Split.of(x) for x in (a_ND, b_MD, c_ND, d_MD))
        aa, bb, cc, dd = a.dot(a), b.dot(b), c.dot(c), d.dot(d)
        # |a_n - b_m|^2, |c_n - d_m|^2, (a_n - b_m) . (c_n - d_m)
        self.teacher = _EdgeProducts(((a, b),), aa, bb, -2.0)
        self.student = _EdgeProducts(((c, d),), cc, dd, -2.0)
        self.both = _EdgeProducts(((c, b), (a, d)), a.dot(c), b.dot(d), -1.0)
        self.noise_aN, self.noise_bM1 = a.noise(), b.noise()[:, None]
        self.noise_cN, self.noise_dM1 = c.noise(), d.noise()[:, None]

    def tile(self, rows: slice, keep_RN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of some rows, its gradient for c (N, D), and for these rows of d (R, D)."""
        tt_RN, ss_RN, ts_RN = self.teacher[rows], self.student[rows], self.both[rows]
        # An edge of length zero must be exactly that: 1 / eps^2 would blow its noise up.
        noise_t_RN, noise_s_RN = self.noise_aN + self.noise_bM1[rows], self.noise_cN + self.noise_dM1[rows]
        no_teacher_RN, no_student_RN = tt_RN <= noise_t_RN, ss_RN <= noise_s_RN
        ss_RN.masked_fill_(no_student_RN, 0.0)
        inverse_t_RN = tt_RN.clamp_min(self.least_square).rsqrt_().masked_fill_(no_teacher_RN, 0.0)
        inverse_s_RN = ss_RN.clamp_min(self.least_square).rsqrt_()
        if keep_RN is not None:  # relations of length zero have neither loss nor gradient
            dropped_RN = keep_RN.logical_not()
            inverse_t_RN.masked_fill_(dropped_RN, 0.0)
            inverse_s_RN.masked_fill_(dropped_RN, 0.0)

        # 1/2 |u_T|^2 + 1/2 |u_S|^2 - u_T . u_S
        inverse_ts_RN = inverse_t_RN * inverse_s_RN
        cosine_RN = ts_RN.mul_(inverse_ts_RN)
        square_t_RN, square_s_RN = inverse_t_RN.square_(), inverse_s_RN.square_().masked_fill_(no_student_RN, 0.0)
        noise_RN = noise_t_RN.mul_(square_t_RN).addcmul_(noise_s_RN, square_s_RN).mul_(0.5)
        squares_RN = square_t_RN.mul_(tt_RN).addcmul_(ss_RN, square_s_RN).mul_(0.5)
        value_RN = squares_RN - cosine_RN
        # What remains of relations that are alike is the rounding of 1 and of short edges: it must not hide the losses
        # of edges below eps.
        alike_RN = value_RN < noise_RN.add_(squares_RN, alpha=_ROUNDING)
        value_RN.masked_fill_(alike_RN, 0.0)

        # u_S of a normalised edge has constant length.
        by_t_RN = inverse_ts_RN.neg_()
        cosine_RN.masked_fill_(alike_RN.logical_or_(ss_RN < self.least_square), 1.0)
        by_s_RN = square_s_RN.mul_(cosine_RN)
        a, b, c, d = self.split
        by_teacher = _weighted_differences(by_t_RN, a, b[rows])
        by_student = _weighted_differences(by_s_RN, c, d[rows])
        return value_RN.sum(), by_teacher[0].add_(by_student[0]), by_teacher[1].add_(by_student[1])


def _weighted_differences(weight_RN: Tensor, real: _Split, virtual: _Split) -> tuple[Tensor, Tensor]:
    """Sums over R of ``weight (real - virtual)``, (N, D), and over N of ``weight (virtual - real)``, (R, D).

    Weights of short edges are large, and what remains of their differences is small: again the leading bits of both
    first, of the weights 20, so that sums of some hundred of the largest have no rounding error.
    """
    first_RN = _leading_bits(weight_RN, weight_RN.abs().amax(), 20)
    rest_RN = weight_RN - first_RN
    sums = []
    for own, other, weights in (
        (real, virtual, (first_RN.T, rest_RN.T, weight_RN.T)),
        (virtual, real, (first_RN, rest_RN, weight_RN)),
    ):
        sum_ND = torch.zeros_like(own.x_ND)
        own_rest_ND, other_rest_ND = own.x_ND - own.x0_ND, other.x_ND - other.x0_ND
        of_weights = ((own.x0_ND, other.x0_ND), (own.x0_ND, other.x0_ND), (own_rest_ND, other_rest_ND))
        for weight, (own_ND, other_ND) in zip(weights, of_weights, strict=True):
            sum_ND.addcmul_(weight.sum(1, keepdim=True), own_ND).addmm_(weight, other_ND, alpha=-1.0)
        sums.append(sum_ND)
    return sums[0], sums[1]


def _match_differences(
    teacher_RND: Tensor, student_RND: Tensor, eps: float, delta: float, keep_RN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The distance (...) of differences' relations, and its gradient for the student's virtual vertices (..., D).

    Huber loss of threshold ``delta``, half the square if infinite. Overwrites the differences.
    """
    teacher_RND /= torch.linalg.vector_norm(teacher_RND, dim=-1, keepdim=True).clamp_min_(eps)
    length_RN1 = torch.linalg.vector_norm(student_RND, dim=-1, keepdim=True)
    stretch_RN1 = length_RN1.clamp_min(eps)
    student_RND /= stretch_RN1

    slope_RND = residual_RND = teacher_RND.sub_(student_RND)
    if delta < math.inf:
        slope_RND = residual_RND.clamp(-delta, delta)
        value_RN = residual_RND.sub_(slope_RND, alpha=0.5).mul_(slope_RND).sum(-1)
    else:
        value_RN = torch.linalg.vector_norm(residual_RND, dim=-1).square_().mul_(0.5)
    # A normalised difference passes only what is orthogonal to it.
    along_RN1 = (slope_RND * student_RND).sum(-1, keepdim=True).masked_fill_(length_RN1 < eps, 0.0)
    passed_RN1 = stretch_RN1.reciprocal_()
    if keep_RN is not None:
        value_RN.mul_(keep_RN)
        passed_RN1.mul_(keep_RN[..., None])
    return value_RN, slope_RND.addcmul_(student_RND, along_RN1, value=-1.0).mul_(passed_RN1)


class _FromDifferences:
    """The same as :class:`_FromProducts`, and Huber losses, from the differences themselves, (R, N, D)."""

    def __init__(self, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor, eps: float, delta: float) -> None:
        self.a_ND, self.b_MD, self.c_ND, self.d_MD = a_ND, b_MD, c_ND, d_MD
        self.eps, self.delta = eps, delta
        self.grad_c_ND: Tensor | None = None
        self.grads_d: list[Tensor] = []

    def tiles(self) -> Iterator[slice]:
        """Slices of rows, of a tile's size."""
        return _tiles(len(self.b_MD), self.a_ND.numel(), self.a_ND.device)

    def add(self, rows: slice, keep_RN: Tensor | None, num_kept: Tensor | int) -> Tensor:
        """The sum of some rows, whose gradient is added to that of the rows before."""
        teacher_RND, student_RND = self.a_ND - self.b_MD[rows, None], self.c_ND - self.d_MD[rows, None]
        value_RN, grad_RND = _match_differences(teacher_RND, student_RND, self.eps, self.delta, keep_RN)
        sum_ND = grad_RND.sum(0).neg_()
        self.grad_c_ND = sum_ND if self.grad_c_ND is None else self.grad_c_ND.add_(sum_ND)
        self.grads_d.append(grad_RND.sum(1))
        return value_RN.sum()

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the sum of all rows, for c (N, D) and d (M, D)."""
        if self.grad_c_ND is None:  # a process without rows of its own
            return torch.zeros_like(self.c_ND), self.d_MD
        return self.grad_c_ND, self.grads_d[0] if len(self.grads_d) == 1 else torch.cat(self.grads_d)


class _WithGradient(torch.autograd.Function):
    """A mean ``total / number``, where the gradients of the total for two tensors are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        number: Tensor,
        grad_c: Tensor,
        grad_d: Tensor,
        c: Tensor,
        d: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(number, grad_c, grad_d)
        ctx.dtypes = c.dtype, d.dtype
        return (total / number).to(dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the gradient of matched relations is formed without a graph and cannot be differentiated again; "
                "call backward without create_graph=True"
            )
        number, *gradients = ctx.saved_tensors
        factor = upstream / number
        grad_c, grad_d = ((factor * gradient).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, None, None, None, grad_c, grad_d, None


def match_relations(
    teacher_real_ND: Tensor,
    teacher_virtual_MD: Tensor,
    student_real_ND: Tensor,
    student_virtual_MD: Tensor,
    *,
    keep: Tensor | EntropyThreshold | None = None,
    matching: Matching = "squared",
    delta: float = 1.0,
    eps: float = 1e-8,
    without_diagonal: bool = False,
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean over kept edges of the distance between the teacher's and the student's relations: a scalar.

    Edge (m, n) is ``d = real[n] - virtual[m]``, its relation ``u = d / max(|d|, eps)``. ``squared`` is Algorithm 1 of
    VRM with a factor one half, ``1/2 |u_T - u_S|^2``: between 0 and 2, and 1 for unrelated directions. ``huber``, of
    which the paper's text speaks, is the Huber loss of the coordinates of ``u_S - u_T``, summed; it equals ``squared``
    unless a coordinate exceeds ``delta``.

    Args:
        teacher_real_ND: the teacher's vertices in the real view (N, D); no gradient reaches them.
        teacher_virtual_MD: the teacher's vertices in the virtual view (M, D).
        student_real_ND: the student's vertices in the real view (N, D).
        student_virtual_MD: the student's vertices in the virtual view (M, D).
        keep: the kept edges, from :func:`prune_edges`, or any bool mask (M, N); ``None`` for all. The mean of none is
            0.
        matching: ``squared`` or ``huber``.
        delta: threshold of the Huber loss, above 0.
        eps: differences shorter than this are not stretched to length 1. At least 1e-150. The products resolve lengths
            down to some 1e-11 of the vertices'.
        without_diagonal: real and virtual vertices are the same, and edges to oneself do not count, whatever ``keep``
            says of them.
        dtype: precision of the result, by default that of the student's vertices (of half types float32). float64,
            small graphs (at most 2^16 coordinates of edges) and ``huber`` compute every edge from its difference, in
            O(M N D) time and tiles of constant memory; else products of vertices are used.
        group: vertices are those of all processes (:func:`gather_vertices`); each computes its :func:`own_rows`, and
            ``keep`` has those rows. The mean over processes of the values, and of the gradients as
            ``DistributedDataParallel`` forms it, is that of the whole graph.

    ``ValueError`` for an unknown ``matching``, ``delta`` not above 0, ``eps`` too small, vertices that are no matrices
    of floating point, vertices or a mask whose shapes do not fit, a mask that is not bool, and a graph without edges.
    """
    check_matching(matching, delta, eps)
    if teacher_real_ND.shape != student_real_ND.shape or teacher_virtual_MD.shape != student_virtual_MD.shape:
        raise ValueError(
            "relations of teacher and student are compared coordinate by coordinate, so their vertices need the same "
            f"shape; got {tuple(teacher_real_ND.shape)} and {tuple(student_real_ND.shape)} in the real view, "
            f"{tuple(teacher_virtual_MD.shape)} and {tuple(student_virtual_MD.shape)} in the virtual view"
        )
    num_edges = _num_edges(student_real_ND, student_virtual_MD, without_diagonal=without_diagonal)
    num_rows, num_columns = len(student_virtual_MD), len(student_real_ND)
    if dtype is None:
        dtype = student_real_ND.dtype if student_real_ND.dtype == torch.float64 else torch.float32
    own = own_rows(num_rows, group)
    shape = own.stop - own.start, num_columns
    fits = isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.shape == shape
    if not (fits or keep is None or isinstance(keep, EntropyThreshold)):
        given = f"{tuple(keep.shape)} of {keep.dtype}" if isinstance(keep, Tensor) else f"a {type(keep).__name__}"
        raise ValueError(f"keep is a bool mask of the graph's rows, {shape}: virtual, real; got {given}")
    with torch.no_grad():
        a_ND, c_ND = teacher_real_ND.double(), student_real_ND.double()
        b_MD, d_MD = teacher_virtual_MD[own].double(), student_virtual_MD[own].double()
        edges: _FromProducts | _FromDifferences
        length = c_ND.shape[1]
        small = num_edges * length <= (_SMALL_GRAPH_GPU if c_ND.is_cuda else _SMALL_GRAPH) or length <= _FEW_COORDINATES
        if matching == "huber" or dtype == torch.float64 or small:
            edges = _FromDifferences(a_ND, b_MD, c_ND, d_MD, eps, delta if matching == "huber" else math.inf)
        else:
            edges = _FromProducts(a_ND, b_MD, c_ND, d_MD, eps)

        sums, counts = [], []
        for rows in edges.tiles():
            keep_RN = None if keep is None else keep[rows]
            if without_diagonal:
                others_RN = c_ND.new_ones(rows.stop - rows.start, num_columns, dtype=torch.bool)
                others_RN.diagonal(own.start + rows.start).fill_(False)
                keep_RN = others_RN if keep_RN is None else others_RN.logical_and_(keep_RN)
            counts.append((rows.stop - rows.start) * num_columns if keep_RN is None else keep_RN.count_nonzero())
            sums.append(edges.add(rows, keep_RN, counts[-1]))
        grad_c_ND, grad_d_MD = edges.gradients()
        total = reduce(torch.add, sums) if sums else c_ND.new_zeros(())  # none: a process without rows of its own
        if keep is None:
            num_kept = c_ND.new_full((), num_edges)
        else:
            num_kept = (reduce(torch.add, counts) if counts else c_ND.new_zeros(())).double()
            if group is not None:
                dist.all_reduce(num_kept, group=group)
            num_kept.clamp_min_(1)
        if group is not None:
            num_kept /= dist.get_world_size(group)
            grad_d_MD = F.pad(grad_d_MD, (0, 0, own.start, num_rows - own.stop))
    loss: Tensor = _WithGradient.apply(
        total, num_kept, grad_c_ND, grad_d_MD, student_real_ND, student_virtual_MD, dtype
    )
    return loss


def check_temperature(temperature: float) -> None:
    """``ValueError`` unless :func:`predictions` can be softened by it."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0, and finite; got {temperature}")


def check_matching(matching: str, delta: float, eps: float) -> None:
    """``ValueError`` unless these are options of :func:`match_relations`."""
    _check_choice("matching", matching, Matching)
    if not delta > 0:
        raise ValueError(f"delta, where the Huber loss turns from square to linear, must be above 0; got {delta}")
    if not _LEAST_EPS <= eps < math.inf:
        raise ValueError(
            f"eps, the length below which an edge is not normalised, must be finite and at least {_LEAST_EPS}: edges "
            f"are divided by it; got {eps}"
        )


def check_pruning(keep: float, kind: str) -> None:
    """``ValueError`` unless these are options of :func:`prune_edges`."""
    _check_choice("joint_entropy", kind, JointEntropy)
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of edges that stay: above 0, and at most 1 (no pruning); got {keep}")
