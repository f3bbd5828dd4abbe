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
from dataclasses import dataclass, replace
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
        return values.sort().values[k - 1]  # on CUDA kthvalue has no deterministic mode
    return values.kthvalue(k).values


@dataclass(frozen=True)
class EntropyThreshold:
    """The kept edges of a graph too large to store: those of joint entropy at most ``threshold``, found row by row.

    ``real_ND``, ``virtual_MD``: the distributions; ``diagonal``: the offset of the diagonal without edges, if any.
    """

    real_ND: Tensor
    virtual_MD: Tensor
    kind: JointEntropy
    diagonal: int | None
    threshold: Tensor

    def entropy(self, rows: slice) -> Tensor:
        """Joint entropies (R, N) of some rows; infinite where there is no edge."""
        entropy_RN = _joint_entropy(self.real_ND, self.virtual_MD[rows], self.kind)
        if self.diagonal is not None:
            entropy_RN.diagonal(self.diagonal + rows.start).fill_(math.inf)
        return entropy_RN

    def __getitem__(self, rows: slice) -> Tensor:
        """The keep mask (R, N) of some rows."""
        return self.entropy(rows) <= self.threshold


def _refine(edges: EntropyThreshold, k: int, width: float, group: dist.ProcessGroup | None) -> EntropyThreshold:
    """One pass: histogram from ``threshold`` on, bins of ``width``; moves ``threshold`` to the k-th smallest's bin."""
    device = edges.real_ND.device
    # One bin more at either end takes what lies outside.
    counts = torch.zeros(_NUM_BINS + 2, dtype=torch.int64, device=device)
    for rows in _tiles(len(edges.virtual_MD), len(edges.real_ND), device, least=64):
        bins = edges.entropy(rows).nan_to_num_(nan=math.inf).sub_(edges.threshold).div_(width).floor_().add_(1)
        bins = bins.clamp_(0, _NUM_BINS + 1).long().flatten()
        counts.scatter_add_(0, bins, torch.ones_like(bins))
    if group is not None:
        dist.all_reduce(counts, group=group)
    number = (counts.cumsum(0) < k).sum()
    return replace(edges, threshold=edges.threshold + (number - 1) * width)


def prune_edges(
    real_ND: Tensor,
    virtual_MD: Tensor,
    *,
    keep: float,
    kind: JointEntropy = "mixture",
    without_diagonal: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor | EntropyThreshold | None:
    """Unreliable-edge pruning: which edges have a joint entropy of at most the ``keep``-quantile of this graph.

    Vertices (N, D), (M, D) are the *student's* distributions (see :func:`joint_entropy`). The quantile interpolates
    linearly: floor(keep (E - 1)) + 1 of E edges stay, and those that tie with the last. Returns ``None`` (all edges) for
    ``keep=1``; a mask (M, N), bool; or, beyond :data:`MAX_STORED_EDGES`, an :class:`EntropyThreshold`. Its threshold is
    found by a histogram in two passes over the graph, and lies less than 2^-32 of the entropy's range too high.

    ``without_diagonal``: real and virtual vertices are the same, and none has an edge to itself (redundant graph).
    ``group``: the vertices are those of all processes; each finds the mask of its own rows (see
    :func:`match_relations`), and the quantile is of the whole graph.

    ``ValueError`` for ``keep`` outside (0, 1], an unknown ``kind``, and ``mixture`` on a graph too large to store.
    """
    _check_choice("joint_entropy", kind, JointEntropy)
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of edges that stay: above 0, and at most 1 (no pruning); got {keep}")
    if keep == 1:
        return None
    num_rows, num_columns, length = len(virtual_MD), len(real_ND), real_ND.shape[1]
    rows = own_rows(num_rows, group)
    edges = EntropyThreshold(
        real_ND.detach().double(),
        virtual_MD[rows].detach().double(),
        kind,
        rows.start if without_diagonal else None,
        threshold=real_ND.new_zeros((), dtype=torch.float64),
    )
    k = _rank(num_rows * num_columns - (num_rows if without_diagonal else 0), keep)
    with torch.no_grad():
        if num_rows * num_columns <= MAX_STORED_EDGES:
            entropy_RN = edges.entropy(slice(0, rows.stop - rows.start))
            return entropy_RN <= _kth_smallest(_all_rows(entropy_RN, num_rows, group).flatten(), k)
        if kind == "mixture":
            raise ValueError(
                f"joint_entropy='mixture' takes a logarithm for each edge and coordinate, {num_rows} x {num_columns} x "
                f"{length} a step, on a graph of more than {MAX_STORED_EDGES} edges; use joint_entropy='collision', "
                "which is a matrix product, or keep=1"
            )
        # No entropy exceeds this, except by rounding.
        bound = {"collision": math.log(length), "independent": 2 * math.log(length), "cross": -math.log(_TINY)}[kind]
        width = max(bound, 1.0) / _NUM_BINS
        edges = _refine(edges, k, width, group)
        width /= _NUM_BINS
        edges = _refine(edges, k, width, group)
        return replace(edges, threshold=edges.threshold + width)


# Matching ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Distance:
    """The distance of two unit differences: half its square, or its Huber loss with threshold ``delta``."""

    matching: Matching
    delta: float
    eps: float


def _products_tile(
    a_ND: Tensor, b_RD: Tensor, c_ND: Tensor, d_RD: Tensor, keep_RN: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows of the graph from products of vertices: sum of the loss, its gradients for c (N, D) and d (R, D)."""
    aa_N, cc_N, ac_N = a_ND.square().sum(1), c_ND.square().sum(1), (a_ND * c_ND).sum(1)
    bb_R1, dd_R1, bd_R1 = b_RD.square().sum(1, True), d_RD.square().sum(1, True), (b_RD * d_RD).sum(1, True)
    # Squared lengths of the teacher's and the student's differences, and the product of the two.
    tt_RN = torch.addmm(aa_N[None], b_RD, a_ND.T, alpha=-2.0).add_(bb_R1)
    ss_RN = torch.addmm(cc_N[None], d_RD, c_ND.T, alpha=-2.0).add_(dd_R1)
    ts_RN = torch.addmm(ac_N[None], torch.cat([b_RD, d_RD], 1), torch.cat([c_ND, a_ND], 1).T, alpha=-1.0).add_(bd_R1)

    # The relatively shortest edges of each row, from their differences; of the others, noise counts as no length.
    shortness_RN = tt_RN / (aa_N + bb_R1).clamp_min_(_TINY)
    noise_RN = shortness_RN <= _NOISE
    tt_RN.masked_fill_(noise_RN, 0.0)
    student_RN = ss_RN / (cc_N + dd_R1).clamp_min_(_TINY)
    student_noise_RN = student_RN <= _NOISE
    ss_RN.masked_fill_(student_noise_RN, 0.0)
    ts_RN.masked_fill_(noise_RN.logical_or_(student_noise_RN), 0.0)
    shortness_RN = torch.minimum(shortness_RN, student_RN)
    nearest_RK = shortness_RN.topk(min(_REPAIRED, len(a_ND)), dim=1, largest=False, sorted=False).indices
    dt_RKD, ds_RKD = a_ND[nearest_RK] - b_RD[:, None], c_ND[nearest_RK] - d_RD[:, None]
    tt_RN.scatter_(1, nearest_RK, dt_RKD.square().sum(-1))
    ss_RN.scatter_(1, nearest_RK, ds_RKD.square().sum(-1))
    ts_RN.scatter_(1, nearest_RK, (dt_RKD * ds_RKD).sum(-1))

    # 1/2 |u_T|^2 + 1/2 |u_S|^2 - u_T . u_S  with  u = d / max(|d|, eps)
    inverse_t_RN = tt_RN.clamp_min(eps * eps).rsqrt_()
    inverse_s_RN = ss_RN.clamp_min(eps * eps).rsqrt_()
    inverse_ts_RN = inverse_t_RN * inverse_s_RN
    cosine_RN = ts_RN.mul_(inverse_ts_RN)
    square_s_RN = inverse_s_RN.square_()
    value_RN = inverse_t_RN.square_().mul_(tt_RN).addcmul_(ss_RN, square_s_RN).mul_(0.5).sub_(cosine_RN)

    # d value = by_t . (c_n - d_m's teacher counterpart): weights of the teacher's and the student's difference in the gradient.
    by_t_RN = inverse_ts_RN.neg_().masked_fill_(tt_RN == 0, 0.0)
    by_s_RN = square_s_RN.mul_(cosine_RN.masked_fill_(ss_RN < eps * eps, 1.0)).masked_fill_(ss_RN == 0, 0.0)
    if keep_RN is not None:
        value_RN.mul_(keep_RN)
        by_t_RN.mul_(keep_RN)
        by_s_RN.mul_(keep_RN)

    repaired_RKD = by_t_RN.gather(1, nearest_RK)[..., None] * dt_RKD + by_s_RN.gather(1, nearest_RK)[..., None] * ds_RKD
    by_t_RN.scatter_(1, nearest_RK, 0.0)
    by_s_RN.scatter_(1, nearest_RK, 0.0)
    grad_c_ND = by_t_RN.sum(0)[:, None] * a_ND + by_s_RN.sum(0)[:, None] * c_ND
    grad_c_ND.addmm_(by_t_RN.T, b_RD, alpha=-1.0).addmm_(by_s_RN.T, d_RD, alpha=-1.0)
    grad_c_ND.index_add_(0, nearest_RK.flatten(), repaired_RKD.flatten(0, 1))
    grad_d_RD = by_t_RN.sum(1, True) * b_RD + by_s_RN.sum(1, True) * d_RD - repaired_RKD.sum(1)
    grad_d_RD.addmm_(by_t_RN, a_ND, alpha=-1.0).addmm_(by_s_RN, c_ND, alpha=-1.0)
    return value_RN.sum(), grad_c_ND, grad_d_RD


def _differences_tile(
    a_ND: Tensor, b_RD: Tensor, c_ND: Tensor, d_RD: Tensor, keep_RN: Tensor | None, eps: float, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the differences themselves, (R, N, D), with the Huber loss of threshold ``delta``."""
    dt_RND, ds_RND = a_ND - b_RD[:, None], c_ND - d_RD[:, None]
    length_s_RN1 = torch.linalg.vector_norm(ds_RND, dim=-1, keepdim=True)
    inverse_s_RN1 = length_s_RN1.clamp_min(eps).reciprocal_()
    ut_RND = dt_RND / torch.linalg.vector_norm(dt_RND, dim=-1, keepdim=True).clamp_min_(eps)
    us_RND = ds_RND * inverse_s_RN1
    residual_RND = us_RND - ut_RND
    slope_RND = residual_RND.clamp(-delta, delta)
    value_RN = (slope_RND * (residual_RND - slope_RND / 2)).sum(-1)
    # A difference of at least eps is normalised: only what is orthogonal to it passes.
    along_RN1 = (slope_RND * us_RND).sum(-1, keepdim=True).masked_fill_(length_s_RN1 < eps, 0.0)
    grad_RND = (slope_RND - along_RN1 * us_RND) * inverse_s_RN1
    if keep_RN is not None:
        value_RN.mul_(keep_RN)
        grad_RND.mul_(keep_RN[..., None])
    return value_RN.sum(), grad_RND.sum(0), -grad_RND.sum(1)


class _WithGradient(torch.autograd.Function):
    """A value whose gradients for two tensors are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grad_c: Tensor, grad_d: Tensor, c: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(grad_c, grad_d)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_c, grad_d = ctx.saved_tensors
        return None, None, None, upstream * grad_c, upstream * grad_d


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
    direct: bool | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean over kept edges of the distance between the teacher's and the student's relations: a scalar, float64.

    Edge (m, n) is ``d = real[n] - virtual[m]``, its relation ``u = d / max(|d|, eps)``. ``squared`` is Algorithm 1 of the
    paper with a factor one half, ``1/2 |u_T - u_S|^2`` (between 0 and 2; 1 for unrelated directions); ``huber`` the Huber
    loss of the coordinates of ``u_S - u_T`` with threshold ``delta``, summed, as the paper's text has it.

    Args:
        teacher_real_ND: the teacher's vertices in the real view (N, D); no gradient reaches them.
        teacher_virtual_MD: in the virtual view (M, D).
        student_real_ND: the student's vertices (N, D).
        student_virtual_MD: in the virtual view (M, D).
        keep: the kept edges, from :func:`prune_edges`; ``None`` for all.
        matching: ``squared`` or ``huber``.
        delta: of the Huber loss.
        eps: shorter differences are not stretched to length 1.
        without_diagonal: real and virtual vertices are the same, and edges to oneself (of length zero) do not count.
        direct: compute every edge from its difference, in O(N M D) time and constant memory. By default for float64
            vertices and for ``huber``, which has no closed form; else products of vertices are used.
        group: every vertex of all processes is given, see :func:`gather_vertices`, and each process computes its own
            rows (:func:`own_rows`). The mean of the processes' values, and of their gradients as formed by
            ``DistributedDataParallel``, is that of the whole graph.
    """
    _check_choice("matching", matching, Matching)
    if direct is None:
        direct = student_real_ND.dtype == torch.float64
    if teacher_real_ND.shape != student_real_ND.shape or teacher_virtual_MD.shape != student_virtual_MD.shape:
        raise ValueError(
            "teacher and student relations are compared coordinate by coordinate, so their vertices need the same shape; got "
            f"{tuple(teacher_real_ND.shape)} and {tuple(student_real_ND.shape)} in the real view, "
            f"{tuple(teacher_virtual_MD.shape)} and {tuple(student_virtual_MD.shape)} in the virtual view"
        )
    rows_of_all = own_rows(len(student_virtual_MD), group)
    with torch.no_grad():
        a_ND, c_ND = teacher_real_ND.detach().double(), student_real_ND.detach().double()
        b_MD = teacher_virtual_MD[rows_of_all].detach().double()
        d_MD = student_virtual_MD[rows_of_all].detach().double()
        total = c_ND.new_zeros(())
        grad_c_ND = torch.zeros_like(c_ND)
        grads_d: list[Tensor] = []
        direct = direct or matching == "huber"
        num_kept: Tensor | None = None
        for rows in _tiles(len(d_MD), c_ND.numel() if direct else len(c_ND), c_ND.device, least=1 if direct else 64):
            keep_RN = None if keep is None else keep[rows]
            if keep_RN is not None:
                kept = keep_RN.sum()
                num_kept = kept if num_kept is None else num_kept + kept
            if direct:
                value, grad_c, grad_d = _differences_tile(a_ND, b_MD[rows], c_ND, d_MD[rows], keep_RN, eps, delta if matching=="huber" else math.inf)
            else:
                value, grad_c, grad_d = _products_tile(a_ND, b_MD[rows], c_ND, d_MD[rows], keep_RN, eps)
            total = total + value
            grad_c_ND += grad_c
            grads_d.append(grad_d)
        grad_d_MD = torch.cat(grads_d)
        count = float(len(d_MD)*len(c_ND) - (len(d_MD) if without_diagonal else 0)) if num_kept is None else num_kept
        total, grad_c_ND, grad_d_MD = total/count, grad_c_ND/count, grad_d_MD/count
    return _WithGradient.apply(total, grad_c_ND, grad_d_MD, student_real_ND, student_virtual_MD)


def own_rows(num_rows, group): return slice(0,num_rows)
def _all_rows(x,n,g): return x
