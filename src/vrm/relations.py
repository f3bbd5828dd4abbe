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
# Of sqrt(D) |rest of p| |p|, added up for p and q, the share below which |p - q|^2 is rounding noise of split products.
_NOISE = 2.0**-49
# Of |q|^2, the share below which float64 products are too coarse for float32 results: |p - q| < 2^-10 |q|.
_SHORT = 2.0**-20
# Of the mean of 1 - cos, the least that float64 products of edges of that length resolve well enough.
_ALIKE = 2.0**-10
# Up to this many coordinates (edges times D) differences are cheaper than products; on a GPU kernels count, not work.
_SMALL_GRAPH = 1 << 16
_SMALL_GRAPH_GPU = 1 << 20
# Of a tile of matrix products.
_LEAST_ROWS = 128
# Of more values than this the k-th smallest is first looked for near that of every 61st.
_MANY_VALUES = 1 << 15
_SAMPLE_STRIDE = 61


def predictions(logits_BC: Tensor, *, temperature: float) -> Tensor:
    """Softened predictions (B, C) in float64 from logits of any precision: ``softmax(logits / temperature)``.

    float64, because relations are differences of predictions: after a float32 softmax its rounding would be by far the
    largest error of the loss.
    """
    return torch.softmax(logits_BC.to(torch.float64, copy=True).mul_(1 / temperature), dim=1)


def class_distributions(predictions_BC: Tensor) -> Tensor:
    """Class vertices (C, B), each normalised to sum 1 over the batch: what joint entropies of classes are taken of."""
    return (predictions_BC / predictions_BC.sum(0).clamp_min(_TINY)).T


def _tiles(num_rows: int, elements_per_row: int, device: torch.device, *, least: int = 1) -> Iterator[slice]:
    """Slices of rows, of a tile's size: 2^18 elements on a CPU (2 MiB: its cache), 2^22 on a GPU (few launches).

    ``least``: how many rows a tile has however long they are; matrix products of few rows are slow.
    """
    size = max(least, (1 << (18 if device.type == "cpu" else 22)) // elements_per_row)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


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
    """
    _check_choice("joint_entropy", kind, JointEntropy)
    with torch.no_grad():
        rank = _EntropyRank(real_ND.detach().double(), virtual_MD.detach().double(), kind, torch.float64)
        return rank.entropy(rank.all_rows())


class _EntropyRank:
    """Numbers in the order of joint entropies, some rows of the graph at a time, in ``dtype``.

    They are entropies less that of the uniform distribution, log D, because at the start of training every prediction
    is close to that, and the differences of their entropies to nothing. Of ``collision`` they are ``1 - D sum m^2``
    with the mixture m, which takes no logarithm.
    """

    def __init__(self, p_ND: Tensor, q_MD: Tensor, kind: JointEntropy, dtype: torch.dtype) -> None:
        self.kind, self.dtype, self.length = kind, dtype, p_ND.shape[1]
        if kind == "mixture":
            self.p_ND, self.q_MD = (x.mul(self.length / 2).sub_(0.5).to(dtype) for x in (p_ND, q_MD))
        elif kind == "collision":
            # D sum m^2 = D sum (m - 1/D)^2 + 2 sum m - 1, of which the first is small where predictions are even
            scale = math.sqrt(self.length) / 2
            self.p_ND, self.q_MD = (x.sub(1 / self.length).mul_(scale).to(dtype) for x in (p_ND, q_MD))
            self.own_N, self.own_M = (
                (1 - x.sum(1)).to(dtype).sub_(centred.square().sum(1))
                for x, centred in ((p_ND, self.p_ND), (q_MD, self.q_MD))
            )
        elif kind == "cross":
            self.p_ND, self.q_MD = p_ND.clamp_min(_TINY).log_().add_(math.log(self.length)), q_MD
        else:
            self.p_ND, self.q_MD = p_ND, q_MD
            self.own_N, self.own_M = (-torch.xlogy(x, x).sum(1) for x in (p_ND, q_MD))
            self.own_N -= math.log(self.length)

    def tiles(self) -> Iterator[slice]:
        """Slices of rows, of a tile's size."""
        return _tiles(len(self.q_MD), len(self.p_ND), self.p_ND.device, least=_LEAST_ROWS)

    def __getitem__(self, rows: slice) -> Tensor:
        return self._fill(rows, self.p_ND.new_empty(len(self.q_MD[rows]), len(self.p_ND), dtype=self.dtype))

    def all_rows(self) -> Tensor:
        """The whole graph, (M, N)."""
        rank_MN = self.p_ND.new_empty(len(self.q_MD), len(self.p_ND), dtype=self.dtype)
        for rows in self.tiles():
            self._fill(rows, rank_MN[rows])
        return rank_MN

    def _fill(self, rows: slice, rank_RN: Tensor) -> Tensor:
        q_RD = self.q_MD[rows]
        if self.kind == "mixture":
            return self._mixture(q_RD, rank_RN)
        if self.kind == "cross":
            return rank_RN.copy_((q_RD @ self.p_ND.T).neg_())
        rank_RN.copy_(self.own_N).add_(self.own_M[rows, None])
        if self.kind == "independent":
            return rank_RN
        with torch.autocast(q_RD.device.type, enabled=False):
            return rank_RN.addmm_(q_RD, self.p_ND.T, alpha=-2.0)

    def _mixture(self, q_RD: Tensor, entropy_RN: Tensor) -> Tensor:
        """``-1/D sum (1 + x) log(1 + x)`` with ``1 + x = D (p + q) / 2``, in tiles."""
        least = -1 + torch.finfo(self.dtype).eps / 2
        for rows in _tiles(len(q_RD), self.p_ND.numel(), self.p_ND.device):
            x_RND = (self.p_ND + q_RD[rows, None]).clamp_min_(least)
            log_RND = x_RND.log1p()
            entropy_RN[rows] = log_RND.addcmul_(log_RND, x_RND).sum(-1)
        return entropy_RN.div_(-self.length)

    def entropy(self, rank: Tensor) -> Tensor:
        """Of the numbers, in nats."""
        return math.log(self.length) + (-torch.log1p(-rank) if self.kind == "collision" else rank)


def _rank(num_edges: int, keep: float) -> int:
    """How many of E values lie at or below their ``keep``-quantile with linear interpolation."""
    return math.floor(keep * (num_edges - 1)) + 1


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.sort().values[k - 1]  # on CUDA kthvalue has no deterministic mode
    if values.device.type == "cpu" and len(values) > _MANY_VALUES and not torch.compiler.is_compiling():
        # Two of a sample's have it between them almost surely, and few other values.
        sample = values[::_SAMPLE_STRIDE]
        expected, spread = k * len(sample) // len(values), 2 * math.isqrt(len(sample))
        low = float(sample.kthvalue(max(1, expected - spread)).values)
        high = float(sample.kthvalue(min(len(sample), expected + spread)).values)
        between = values[values.clamp(low, high) == values]
        rank = k - int((values < low).count_nonzero())
        if 1 <= rank <= len(between):
            return between.kthvalue(rank).values
    return values.kthvalue(k).values


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
        for values in tiles():
            keys = _ordered(values.flatten().view(integer)) >> shift
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
    linearly: floor(keep (E - 1)) + 1 of E edges stay, and those that tie with the last. Returns ``None`` (all edges)
    for ``keep=1``; a mask (M, N), bool; or, beyond :data:`MAX_STORED_EDGES`, an :class:`EntropyThreshold`.
    Its threshold is found in passes over the graph, which count 16 bits of the entropies each.

    ``without_diagonal``: real and virtual vertices are the same, and none has an edge to itself (redundant graph).
    ``dtype``: that of entropies, by default the vertices' own. float32 is several times as fast, and moves edges across
    the threshold that are within a rounding error of it.
    ``group``: the vertices are those of all processes; each finds the mask of its own rows (see
    :func:`match_relations`), and the quantile is of the whole graph.

    ``ValueError`` for ``keep`` outside (0, 1], an unknown ``kind``, and ``mixture`` on a graph too large to store.
    """
    check_pruning(keep, kind)
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
    diagonal = rows.start if without_diagonal else None
    k = _rank(num_rows * num_columns - (num_rows if without_diagonal else 0), keep)
    with torch.no_grad():
        rank = _EntropyRank(real_ND.detach().double(), virtual_MD[rows].detach().double(), kind, dtype)
        if not stored:

            def recomputed() -> Iterator[Tensor]:
                return (_without_diagonal(rank[tile], diagonal, tile) for tile in rank.tiles())

            return EntropyThreshold(rank, diagonal, _kth_smallest_of_tiles(recomputed, k, rank.p_ND[0, 0], group))
        rank_RN = _without_diagonal(rank.all_rows(), diagonal, slice(0, None))
        if group is None:
            return rank_RN <= _kth_smallest(rank_RN.flatten(), k)
        return rank_RN <= _kth_smallest_of_tiles(lambda: [rank_RN], k, rank_RN, group)


# Matching ---------------------------------------------------------------------------------------------------------


class _Split:
    """Vertices (N, D) as leading bits and the rest: ``head`` is a multiple of about 2^-24 of the vertex's length.

    Products of two heads, and the sums of such products that make up an edge, are exact in float64.
    """

    def __init__(self, x_ND: Tensor) -> None:
        # Adding a large number rounds to multiples of its last place (Veltkamp, Dekker 1971).
        large_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True).mul_(1.5 * 2.0**28)
        self.x_ND, self.head_ND = x_ND, (x_ND + large_N1).sub_(large_N1)
        self.rest_ND = x_ND - self.head_ND

    def dot(self, other: _Split) -> tuple[Tensor, Tensor]:
        """Products of corresponding vertices, (N,): of the heads, and the rest."""
        rest_ND = (self.rest_ND * other.head_ND).addcmul_(self.x_ND, other.rest_ND)
        return (self.head_ND * other.head_ND).sum(1), rest_ND.sum(1)

    def noise(self) -> Tensor:
        """What a vertex adds to the error of a squared length, (N,): some 1e-20 of its own."""
        rest_N, x_N = (torch.linalg.vector_norm(x_ND, dim=1) for x_ND in (self.rest_ND, self.x_ND))
        return rest_N.mul_(x_N).mul_(_NOISE * math.sqrt(self.x_ND.shape[1]))


class _EdgeProducts:
    """``own_real[n] + own_virtual[m] + weight * sum of real[n] . virtual[m]`` for every edge: a product of differences.

    First the products of the heads, which have no rounding error, so that short edges lose nothing as they cancel; then
    the rest, smaller by 2^-24, and so is its rounding. Everything is accumulated by matrix products, own parts as well.
    """

    def __init__(
        self,
        pairs: tuple[tuple[_Split, _Split], ...],
        own_real: tuple[Tensor, Tensor],
        own_virtual: tuple[Tensor, Tensor],
        weight: float,
    ) -> None:
        self.pairs, self.weight = pairs, weight
        one_N, one_M = torch.ones_like(own_real[0]), torch.ones_like(own_virtual[0])
        self.own_real = [torch.stack([x_N, one_N]) for x_N in own_real]
        self.own_virtual = [torch.stack([one_M, x_M], 1) for x_M in own_virtual]

    def __getitem__(self, rows: slice) -> Tensor:
        sum_RN = self.own_virtual[0][rows] @ self.own_real[0]
        for real, virtual in self.pairs:
            sum_RN.addmm_(virtual.head_ND[rows], real.head_ND.T, alpha=self.weight)
        sum_RN.addmm_(self.own_virtual[1][rows], self.own_real[1])
        for real, virtual in self.pairs:
            sum_RN.addmm_(virtual.rest_ND[rows], real.head_ND.T, alpha=self.weight)
            sum_RN.addmm_(virtual.x_ND[rows], real.rest_ND.T, alpha=self.weight)
        return sum_RN


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
        self.aa_N, self.bb_M, self.cc_N, self.dd_M = (
            torch.linalg.vector_norm(x, dim=1).square_() for x in (a_ND, b_MD, c_ND, d_MD)
        )
        self.ac_N, self.bd_M = (a_ND * c_ND).sum(1), (b_MD * d_MD).sum(1)
        # sums over m, and over n, of by_t and by_s
        self.by_t_N, self.by_s_N = torch.zeros_like(self.aa_N), torch.zeros_like(self.aa_N)
        self.by_t_M, self.by_s_M = torch.empty_like(self.bb_M), torch.empty_like(self.bb_M)
        self.grad_c_ND, self.grad_d_MD = torch.zeros_like(c_ND), torch.empty_like(d_MD)

    def tiles(self) -> Iterator[slice]:
        """Slices of rows, of a tile's size."""
        return _tiles(len(self.b_MD), len(self.a_ND), self.a_ND.device, least=_LEAST_ROWS)

    def add(self, rows: slice, keep_RN: Tensor | None, num_kept: Tensor | int) -> Tensor:
        """The sum of some rows, whose gradient is added to that of the rows before."""
        # On a GPU a look at the lengths would stall it, and a compiled graph has no branch.
        may_look = self.a_ND.device.type == "cpu" and not torch.compiler.is_compiling()
        found = self._ordinary(rows, keep_RN, num_kept) if may_look else None
        value, by_t_RN, by_s_RN = self._exact(rows, keep_RN) if found is None else found
        # sum over m of by_t (a_n - b_m) + by_s (c_n - d_m), and minus the sum over n
        self.by_t_N += by_t_RN.sum(0)
        self.by_s_N += by_s_RN.sum(0)
        self.by_t_M[rows] = by_t_RN.sum(1)
        self.by_s_M[rows] = by_s_RN.sum(1)
        self.grad_c_ND.addmm_(by_t_RN.T, self.b_MD[rows], alpha=-1.0)
        self.grad_c_ND.addmm_(by_s_RN.T, self.d_MD[rows], alpha=-1.0)
        self.grad_d_MD[rows].addmm_(by_t_RN, self.a_ND, alpha=-1.0, beta=0.0).addmm_(by_s_RN, self.c_ND, alpha=-1.0)
        return value

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of the sum of all rows, for c (N, D) and d (M, D)."""
        self.grad_c_ND.addcmul_(self.by_t_N[:, None], self.a_ND).addcmul_(self.by_s_N[:, None], self.c_ND)
        self.grad_d_MD.addcmul_(self.by_t_M[:, None], self.b_MD).addcmul_(self.by_s_M[:, None], self.d_MD)
        return self.grad_c_ND, self.grad_d_MD

    def _ordinary(
        self, rows: slice, keep_RN: Tensor | None, num_kept: Tensor | int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """``1 - cos`` and its gradient; ``None`` where products need splitting: of short edges, and those alike."""
        b_RD, d_RD = self.b_MD[rows], self.d_MD[rows]
        if self.work is None:  # memory of all tiles: the first is the largest
            self.work = self.a_ND.new_empty(3, len(b_RD), len(self.a_ND))
        tt_RN, ss_RN, ts_RN = self.work[:, : len(b_RD)]
        if self._has_short(b_RD, self.a_ND, self.bb_M[rows], self.aa_N, tt_RN):
            return None
        if self._has_short(d_RD, self.c_ND, self.dd_M[rows], self.cc_N, ss_RN):
            return None
        torch.add(self.ac_N, self.bd_M[rows, None], out=ts_RN)
        ts_RN.addmm_(b_RD, self.c_ND.T, alpha=-1.0).addmm_(d_RD, self.a_ND.T, alpha=-1.0)
        by_t_RN = tt_RN.mul_(ss_RN).rsqrt_().neg_()
        if keep_RN is not None:
            by_t_RN.mul_(keep_RN)
        minus_cosine_RN = ts_RN.mul_(by_t_RN)
        value = minus_cosine_RN.sum() + num_kept
        if value < _ALIKE * num_kept:
            return None
        return value, by_t_RN, minus_cosine_RN.div_(ss_RN.neg_())

    def _has_short(self, b_RD: Tensor, a_ND: Tensor, bb_R: Tensor, aa_N: Tensor, square_RN: Tensor) -> bool:
        """Computes the squared lengths of edges, and whether any is short."""
        torch.add(aa_N, bb_R[:, None], out=square_RN).addmm_(b_RD, a_ND.T, alpha=-2.0)
        # Where an edge is short its vertices are of one length, so that of one of them will do.
        return bool((square_RN.amin(1) < _SHORT * bb_R + self.least_square).any())

    def _exact(self, rows: slice, keep_RN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same of edges however short."""
        if self.short is None:
            self.short = _ShortEdges(self.a_ND, self.b_MD, self.c_ND, self.d_MD, self.least_square)
        return self.short.tile(rows, keep_RN)


class _ShortEdges:
    """What :class:`_FromProducts` needs of tiles with short edges, at three times the cost."""

    def __init__(self, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor, least_square: float) -> None:
        self.least_square = least_square
        a, b, c, d = _Split(a_ND), _Split(b_MD), _Split(c_ND), _Split(d_MD)
        aa, bb, cc, dd = a.dot(a), b.dot(b), c.dot(c), d.dot(d)
        # |a_n - b_m|^2, |c_n - d_m|^2, (a_n - b_m) . (c_n - d_m)
        self.teacher = _EdgeProducts(((a, b),), aa, bb, -2.0)
        self.student = _EdgeProducts(((c, d),), cc, dd, -2.0)
        self.both = _EdgeProducts(((c, b), (a, d)), a.dot(c), b.dot(d), -1.0)
        self.noise_aN, self.noise_bM1 = a.noise(), b.noise()[:, None]
        self.noise_cN, self.noise_dM1 = c.noise(), d.noise()[:, None]

    def tile(self, rows: slice, keep_RN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of some rows, ``by_t`` and ``by_s``, (R, N)."""
        tt_RN, ss_RN, ts_RN = self.teacher[rows], self.student[rows], self.both[rows]
        # An edge of length zero must be exactly that: 1 / eps^2 would blow its noise up.
        no_teacher_RN = tt_RN <= self.noise_aN + self.noise_bM1[rows]
        no_student_RN = ss_RN <= self.noise_cN + self.noise_dM1[rows]
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
        square_t_RN, square_s_RN = inverse_t_RN.square_(), inverse_s_RN.square_()
        value_RN = square_t_RN.mul_(tt_RN).addcmul_(ss_RN, square_s_RN).mul_(0.5).sub_(cosine_RN)

        # u_S of a normalised edge has constant length.
        by_t_RN = inverse_ts_RN.neg_()
        by_s_RN = square_s_RN.mul_(cosine_RN.masked_fill_(ss_RN < self.least_square, 1.0)).masked_fill_(
            no_student_RN, 0.0
        )
        return value_RN.sum(), by_t_RN, by_s_RN


class _FromDifferences:
    """The same from the differences themselves, (R, N, D); Huber loss of threshold ``delta``, squared if infinite."""

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
        relation_t_RND = self.a_ND - self.b_MD[rows, None]
        relation_t_RND /= torch.linalg.vector_norm(relation_t_RND, dim=-1, keepdim=True).clamp_min_(self.eps)
        relation_s_RND = self.c_ND - self.d_MD[rows, None]
        length_RN1 = torch.linalg.vector_norm(relation_s_RND, dim=-1, keepdim=True)
        stretch_RN1 = length_RN1.clamp_min(self.eps)
        relation_s_RND /= stretch_RN1

        slope_RND = residual_RND = relation_t_RND.neg_().add_(relation_s_RND)
        if self.delta < math.inf:
            slope_RND = residual_RND.clamp(-self.delta, self.delta)
            half_RND = residual_RND.sub_(slope_RND, alpha=0.5)
        else:
            half_RND = residual_RND * 0.5
        value_RN = half_RND.mul_(slope_RND).sum(-1)
        # A normalised difference passes only what is orthogonal to it.
        along_RN1 = (slope_RND * relation_s_RND).sum(-1, keepdim=True).masked_fill_(length_RN1 < self.eps, 0.0)
        if keep_RN is not None:
            value_RN.mul_(keep_RN)
            slope_RND.mul_(keep_RN[..., None])
            along_RN1.mul_(keep_RN[..., None])
        grad_RND = slope_RND.sub_(relation_s_RND.mul_(along_RN1)).div_(stretch_RN1)
        sum_ND = grad_RND.sum(0)
        self.grad_c_ND = sum_ND if self.grad_c_ND is None else self.grad_c_ND.add_(sum_ND)
        self.grads_d.append(grad_RND.sum(1).neg_())
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
        keep: the kept edges, from :func:`prune_edges`, or any bool mask (M, N); ``None`` for all. The mean of none is 0.
        matching: ``squared`` or ``huber``.
        delta: threshold of the Huber loss, above 0.
        eps: differences shorter than this are not stretched to length 1. Above 0. The products resolve lengths down
            to some 1e-11 of the vertices'.
        without_diagonal: real and virtual vertices are the same, and edges to oneself (of length zero) do not count.
        dtype: precision of the result, by default that of the student's vertices (of half types float32). float64,
            small graphs (at most 2^16 coordinates of edges) and ``huber`` compute every edge from its difference, in
            O(M N D) time and tiles of constant memory; else products of vertices are used.
        group: vertices are those of all processes (:func:`gather_vertices`); each computes its :func:`own_rows`, and
            ``keep`` has those rows. The mean over processes of the values, and of the gradients as
            ``DistributedDataParallel`` forms it, is that of the whole graph.

    ``ValueError`` for an unknown ``matching``, ``delta`` or ``eps`` not above 0, vertices or a mask whose shapes do not
    fit, a mask that is not bool, and a graph without edges.
    """
    check_matching(matching, delta, eps)
    if teacher_real_ND.shape != student_real_ND.shape or teacher_virtual_MD.shape != student_virtual_MD.shape:
        raise ValueError(
            "relations of teacher and student are compared coordinate by coordinate, so their vertices need the same "
            f"shape; got {tuple(teacher_real_ND.shape)} and {tuple(student_real_ND.shape)} in the real view, "
            f"{tuple(teacher_virtual_MD.shape)} and {tuple(student_virtual_MD.shape)} in the virtual view"
        )
    num_rows, num_columns = len(student_virtual_MD), len(student_real_ND)
    num_edges = num_rows * num_columns - (num_rows if without_diagonal else 0)
    if num_edges < 1:
        raise ValueError(f"a graph of {num_columns} real and {num_rows} virtual vertices has no edges to match")
    if dtype is None:
        dtype = student_real_ND.dtype if student_real_ND.dtype == torch.float64 else torch.float32
    own = own_rows(num_rows, group)
    if isinstance(keep, Tensor) and (keep.dtype != torch.bool or keep.shape != (own.stop - own.start, num_columns)):
        raise ValueError(
            f"keep is a bool mask of the graph's rows, ({own.stop - own.start}, {num_columns}): virtual, real; got "
            f"{tuple(keep.shape)} of {keep.dtype}"
        )
    with torch.no_grad():
        a_ND, c_ND = teacher_real_ND.double(), student_real_ND.double()
        b_MD, d_MD = teacher_virtual_MD[own].double(), student_virtual_MD[own].double()
        edges: _FromProducts | _FromDifferences
        length = c_ND.shape[1]
        # Relations of length 1 are signs, whose gradient is zero: exactly, without products.
        small = num_edges * length <= (_SMALL_GRAPH_GPU if c_ND.is_cuda else _SMALL_GRAPH) or length == 1
        if matching == "huber" or dtype == torch.float64 or small:
            edges = _FromDifferences(a_ND, b_MD, c_ND, d_MD, eps, delta if matching == "huber" else math.inf)
        else:
            edges = _FromProducts(a_ND, b_MD, c_ND, d_MD, eps)

        total = c_ND.new_zeros(())
        num_kept = c_ND.new_full((), num_edges if keep is None else 0)
        for rows in edges.tiles():
            keep_RN = None if keep is None else keep[rows]
            num_kept_RN = (rows.stop - rows.start) * num_columns if keep_RN is None else keep_RN.count_nonzero()
            total += edges.add(rows, keep_RN, num_kept_RN)
            if keep is not None:
                num_kept += num_kept_RN
        grad_c_ND, grad_d_MD = edges.gradients()
        if keep is not None:
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


def check_matching(matching: str, delta: float, eps: float) -> None:
    """``ValueError`` unless these are options of :func:`match_relations`."""
    _check_choice("matching", matching, Matching)
    if not delta > 0:
        raise ValueError(f"delta, where the Huber loss turns from square to linear, must be above 0; got {delta}")
    if not eps > 0:
        raise ValueError(f"eps, the length below which an edge is not normalised, must be above 0; got {eps}")


def check_pruning(keep: float, kind: str) -> None:
    """``ValueError`` unless these are options of :func:`prune_edges`."""
    _check_choice("joint_entropy", kind, JointEntropy)
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of edges that stay: above 0, and at most 1 (no pruning); got {keep}")
