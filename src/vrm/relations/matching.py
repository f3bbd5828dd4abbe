"""Matching: the mean distance between the teacher's and the student's relations, computed with its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vrm.relations.products import OneProductDots, ShortEdges, TwoProductDots
from vrm.relations.pruning import EntropyThreshold
from vrm.relations.vertices import MIN_PRODUCT_ROWS, check_choice, count_edges, lengths, own_rows, row_tiles

Matching = Literal["squared", "huber"]

# The smallest eps whose squared reciprocal float64 can hold.
MIN_EPS = 1e-150
# Up to this many coordinates (edges times D) differences are cheaper than products. A GPU is limited by the number of
# kernels, not by arithmetic, so differences pay longer there.
SMALL_GRAPH = 1 << 16
SMALL_GRAPH_GPU = 1 << 20
# Relations of one coordinate are signs, and those of two classes' predictions are parallel. Their gradient vanishes,
# and products would have to resolve it from rounding errors.
FEW_COORDINATES = 2
# An edge is short if |p - q| < 2^-10 |q|: of its square, float64 products leave too few bits for float32 results.
SHORT = 2.0**-20
# Up to this many short edges a row are computed one by one, from their differences.
FEW_SHORT = 8
# Float64 products of edges that are not short resolve a mean of 1 - cos down to this well enough.
ALIKE = 2.0**-10
# The largest factor by which the ratio of squared lengths, student's over teacher's, may vary among vertices for
# OneProductDots to be accurate.
SPREAD = 2.0**32


def check_matching(matching: str, delta: float, eps: float) -> None:
    """Raise ``ValueError`` unless these are valid options of :func:`match_relations`."""
    check_choice("matching", matching, Matching)
    if not delta > 0:
        raise ValueError(f"delta, where the Huber loss turns from square to linear, must be above 0; got {delta}")
    if not MIN_EPS <= eps < math.inf:
        raise ValueError(
            f"eps, the length below which an edge is not normalised, must be finite and at least {MIN_EPS}, because "
            f"edges are divided by it; got {eps}"
        )


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
    """Return the mean distance between the teacher's and the student's relations over the kept edges, a scalar.

    Edge (m, n) is ``d = real[n] - virtual[m]``, and its relation is ``u = d / max(|d|, eps)``. ``squared`` is Algorithm
    1 of VRM with a factor one half, ``1/2 |u_T - u_S|^2``: between 0 and 2, and 1 for unrelated directions. ``huber``,
    which the paper's text names, is the Huber loss of the coordinates of ``u_S - u_T``, summed; it equals ``squared``
    unless a coordinate exceeds ``delta``.

    Args:
        teacher_real_ND: the teacher's vertices in the real view (N, D); no gradient reaches them.
        teacher_virtual_MD: the teacher's vertices in the virtual view (M, D).
        student_real_ND: the student's vertices in the real view (N, D).
        student_virtual_MD: the student's vertices in the virtual view (M, D).
        keep: the kept edges, from :func:`prune_edges`, or any bool mask (M, N); None for all. The mean over no edges
            is 0.
        matching: ``squared`` or ``huber``.
        delta: threshold of the Huber loss, above 0.
        eps: differences shorter than this are not normalised to length 1. At least 1e-150. The products resolve lengths
            down to about 1e-11 of those of the vertices.
        without_diagonal: real and virtual vertices are the same, and edges to oneself do not count, whatever ``keep``
            says about them.
        dtype: precision of the result, by default that of the student's vertices (float32 for half types). With
            float64, in small graphs (at most 2^16 coordinates of edges) and with ``huber`` every edge is computed from
            its difference, in O(M N D) time and tiles of constant memory; otherwise from products of vertices.
        group: the vertices are those of all processes (:func:`gather_vertices`). Each process computes its
            :func:`own_rows`, and ``keep`` has those rows. The mean over processes of the values, and of the gradients
            as ``DistributedDataParallel`` takes it, is that of the whole graph.

    Raise ``ValueError`` for an unknown ``matching``, ``delta`` not above 0, ``eps`` too small, vertices that are not
    floating-point matrices, shapes of vertices or mask that do not fit, a mask that is not bool, and a graph without
    edges.
    """
    check_matching(matching, delta, eps)
    if teacher_real_ND.shape != student_real_ND.shape or teacher_virtual_MD.shape != student_virtual_MD.shape:
        raise ValueError(
            "relations of teacher and student are compared coordinate by coordinate, so their vertices need the same "
            f"shape; got {tuple(teacher_real_ND.shape)} and {tuple(student_real_ND.shape)} in the real view, "
            f"{tuple(teacher_virtual_MD.shape)} and {tuple(student_virtual_MD.shape)} in the virtual view"
        )
    num_edges = count_edges(student_real_ND, student_virtual_MD, without_diagonal=without_diagonal)
    num_rows, num_columns = len(student_virtual_MD), len(student_real_ND)
    if dtype is None:
        dtype = student_real_ND.dtype if student_real_ND.dtype == torch.float64 else torch.float32
    own = own_rows(num_rows, group)
    shape = own.stop - own.start, num_columns
    fits = isinstance(keep, Tensor) and keep.dtype == torch.bool and keep.shape == shape
    if not (fits or keep is None or isinstance(keep, EntropyThreshold)):
        given = f"{tuple(keep.shape)} of {keep.dtype}" if isinstance(keep, Tensor) else f"a {type(keep).__name__}"
        raise ValueError(f"keep must be a bool mask of the graph's rows, {shape}: virtual, real; got {given}")
    with torch.no_grad():
        a_ND, c_ND = teacher_real_ND.double(), student_real_ND.double()
        b_MD, d_MD = teacher_virtual_MD[own].double(), student_virtual_MD[own].double()
        edges: FromProducts | FromDifferences
        length = c_ND.shape[1]
        small = num_edges * length <= (SMALL_GRAPH_GPU if c_ND.is_cuda else SMALL_GRAPH) or length <= FEW_COORDINATES
        if matching == "huber" or dtype == torch.float64 or small:
            edges = FromDifferences(a_ND, b_MD, c_ND, d_MD, eps, delta if matching == "huber" else math.inf)
        else:
            edges = FromProducts(a_ND, b_MD, c_ND, d_MD, eps)

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
        total = reduce(torch.add, sums) if sums else c_ND.new_zeros(())  # a process may have no rows of its own
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
    loss: Tensor = _MeanWithGradient.apply(
        total, num_kept, grad_c_ND, grad_d_MD, student_real_ND, student_virtual_MD, dtype
    )
    return loss


class _MeanWithGradient(torch.autograd.Function):
    """The mean ``total / number``, given the gradients of the total for two tensors."""

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
                "the gradient of matched relations is computed without a graph and cannot be differentiated again; "
                "call backward without create_graph=True"
            )
        number, *gradients = ctx.saved_tensors
        factor = upstream / number
        grad_c, grad_d = ((factor * gradient).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, None, None, None, grad_c, grad_d, None


class FromDifferences:
    """Distances of relations and their gradient from the differences themselves, (R, N, D), in float64.

    Huber loss of threshold ``delta``, or half the square if ``delta`` is infinite.
    """

    def __init__(self, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor, eps: float, delta: float) -> None:
        self.a_ND, self.b_MD, self.c_ND, self.d_MD = a_ND, b_MD, c_ND, d_MD
        self.eps, self.delta = eps, delta
        self.grad_c_ND: Tensor | None = None
        self.grads_d: list[Tensor] = []

    def tiles(self) -> Iterator[slice]:
        """Yield slices of rows, one a tile."""
        return row_tiles(len(self.b_MD), self.a_ND.numel(), self.a_ND.device)

    def add(self, rows: slice, keep_RN: Tensor | None, num_kept: Tensor | int) -> Tensor:
        """Return the sum of some rows, and add their gradient to that of the rows before."""
        teacher_RND, student_RND = self.a_ND - self.b_MD[rows, None], self.c_ND - self.d_MD[rows, None]
        value_RN, grad_RND = _match_differences(teacher_RND, student_RND, self.eps, self.delta, keep_RN)
        sum_ND = grad_RND.sum(0).neg_()
        self.grad_c_ND = sum_ND if self.grad_c_ND is None else self.grad_c_ND.add_(sum_ND)
        self.grads_d.append(grad_RND.sum(1))
        return value_RN.sum()

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the sum of all rows, for c (N, D) and d (M, D)."""
        if self.grad_c_ND is None:  # this process has no rows of its own
            return torch.zeros_like(self.c_ND), self.d_MD
        return self.grad_c_ND, self.grads_d[0] if len(self.grads_d) == 1 else torch.cat(self.grads_d)


def _match_differences(
    teacher_RND: Tensor, student_RND: Tensor, eps: float, delta: float, keep_RN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the distances (...) of relations, and their gradient for the student's virtual vertices (..., D).

    The differences are overwritten. An infinite ``delta`` means half the square.
    """
    teacher_RND /= torch.linalg.vector_norm(teacher_RND, dim=-1, keepdim=True).clamp_min_(eps)
    length_RN1 = torch.linalg.vector_norm(student_RND, dim=-1, keepdim=True)
    divisor_RN1 = length_RN1.clamp_min(eps)
    student_RND /= divisor_RN1

    slope_RND = residual_RND = teacher_RND.sub_(student_RND)
    if delta < math.inf:
        slope_RND = residual_RND.clamp(-delta, delta)
        value_RN = residual_RND.sub_(slope_RND, alpha=0.5).mul_(slope_RND).sum(-1)
    else:
        value_RN = torch.linalg.vector_norm(residual_RND, dim=-1).square_().mul_(0.5)
    # The gradient through a normalised difference is orthogonal to it; below eps nothing is normalised.
    along_RN1 = (slope_RND * student_RND).sum(-1, keepdim=True).masked_fill_(length_RN1 < eps, 0.0)
    factor_RN1 = divisor_RN1.reciprocal_()
    if keep_RN is not None:
        value_RN.mul_(keep_RN)
        factor_RN1.mul_(keep_RN[..., None])
    return value_RN, slope_RND.addcmul_(student_RND, along_RN1, value=-1.0).mul_(factor_RN1)


class FromProducts:
    """Half the squared distances of relations and their gradient from products of vertices, in float64.

    The gradient of an edge for ``d_S`` is ``by_t d_T + by_s d_S``. The sums of these over rows and columns of the graph
    are matrix products, too.
    """

    def __init__(self, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor, eps: float) -> None:
        self.a_ND, self.b_MD, self.c_ND, self.d_MD = a_ND, b_MD, c_ND, d_MD
        self.eps_squared = eps * eps
        self.short: ShortEdges | None = None
        self.work: Tensor | None = None
        self.dots: OneProductDots | TwoProductDots | None = None
        self.aa_N, self.bb_M, self.cc_N, self.dd_M = (lengths(x).square_() for x in (a_ND, b_MD, c_ND, d_MD))
        # sums over m, and over n, of by_t and by_s
        self.by_t_N, self.by_s_N = torch.zeros_like(self.aa_N), torch.zeros_like(self.aa_N)
        self.by_t_M, self.by_s_M = torch.zeros_like(self.bb_M), torch.zeros_like(self.bb_M)
        self.grad_c_ND, self.grad_d_MD = torch.zeros_like(c_ND), torch.empty_like(d_MD)

    def tiles(self) -> Iterator[slice]:
        """Yield slices of rows, one a tile."""
        return row_tiles(len(self.b_MD), len(self.a_ND), self.a_ND.device, min_rows=MIN_PRODUCT_ROWS)

    def add(self, rows: slice, keep_RN: Tensor | None, num_kept: Tensor | int) -> Tensor:
        """Return the sum of some rows, and add their gradient to that of the rows before."""
        # Looking at the lengths would stall a GPU, and a compiled graph cannot branch.
        may_look = self.a_ND.device.type == "cpu" and not torch.compiler.is_compiling()
        value = self.add_ordinary(rows, keep_RN, num_kept) if may_look else None
        if value is not None:
            return value
        if self.short is None:
            self.short = ShortEdges(self.a_ND, self.b_MD, self.c_ND, self.d_MD, self.eps_squared)
        value, grad_c_ND, self.grad_d_MD[rows] = self.short.tile(rows, keep_RN)
        self.grad_c_ND += grad_c_ND
        return value

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of the sum of all rows, for c (N, D) and d (M, D)."""
        self.grad_c_ND.addcmul_(self.by_t_N[:, None], self.a_ND).addcmul_(self.by_s_N[:, None], self.c_ND)
        self.grad_d_MD.addcmul_(self.by_t_M[:, None], self.b_MD).addcmul_(self.by_s_M[:, None], self.d_MD)
        return self.grad_c_ND, self.grad_d_MD

    def add_ordinary(self, rows: slice, keep_RN: Tensor | None, num_kept: Tensor | int) -> Tensor | None:
        """Add rows as ``1 - cos``, with their few short edges one by one.

        Return None, having added nothing, if the rows need exact products: they have many short edges, or the relations
        of student and teacher are nearly equal.
        """
        b_RD, d_RD = self.b_MD[rows], self.d_MD[rows]
        # All tiles share the memory of the first, which is the largest; separate allocations would scatter.
        if self.work is None:
            self.work = self.a_ND.new_empty(4, len(b_RD), len(self.a_ND))
        tt_RN, ss_RN, ts_RN, minus_kept_RN = self.work[:, : len(b_RD)]
        torch.add(self.aa_N, self.bb_M[rows, None], out=tt_RN).addmm_(b_RD, self.a_ND.T, alpha=-2.0)
        torch.add(self.cc_N, self.dd_M[rows, None], out=ss_RN).addmm_(d_RD, self.c_ND.T, alpha=-2.0)
        if self.dots is None:
            self.dots = self._choose_dots()
        self.dots.product(rows, tt_RN, ss_RN, out=ts_RN)
        short = self._take_short_edges(rows, tt_RN, ss_RN, keep_RN)
        if short is None:
            return None
        num_ordinary = num_kept - len(short[0])

        by_t_RN = tt_RN.mul_(ss_RN).rsqrt_()
        # Casting bytes is several times as fast as casting bools.
        by_t_RN.mul_(-1 if keep_RN is None else minus_kept_RN.copy_(keep_RN.view(torch.int8).neg()))
        minus_cosine_RN = ts_RN.mul_(by_t_RN)
        value: Tensor = minus_cosine_RN.sum() + num_ordinary
        if value < ALIKE * num_ordinary:
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
            value_K, grad_KD = _match_differences(teacher_KD, student_KD, math.sqrt(self.eps_squared), math.inf)
            value += value_K.sum()
            self.grad_c_ND.index_add_(0, column_K, grad_KD, alpha=-1)
            grad_d_RD.index_add_(0, row_K, grad_KD)
        return value

    def _choose_dots(self) -> OneProductDots | TwoProductDots:
        ratio = torch.cat([self.cc_N, self.dd_M]).div_(torch.cat([self.aa_N, self.bb_M]))
        least, most = (float(x) for x in ratio.aminmax())
        vertices = self.a_ND, self.b_MD, self.c_ND, self.d_MD
        if 0 < least <= most <= SPREAD * least < math.inf:
            return OneProductDots.of(*vertices, math.sqrt(least) * math.sqrt(most))
        return TwoProductDots.of(*vertices)

    def _take_short_edges(
        self, rows: slice, tt_RN: Tensor, ss_RN: Tensor, keep_RN: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return rows and columns of the kept short edges, or None if there are too many to compute one by one.

        Their squared lengths are set to infinity, so that they add nothing to the products.
        """
        # The two vertices of a short edge have about the same length, so that of the virtual one will do.
        least_tR, least_sR = (x_M[rows] * SHORT + self.eps_squared for x_M in (self.bb_M, self.dd_M))
        if not ((tt_RN.amin(1) < least_tR) | (ss_RN.amin(1) < least_sR)).any():
            none = torch.empty(0, dtype=torch.int64)
            return none, none
        short_RN = (tt_RN < least_tR[:, None]).logical_or_(ss_RN < least_sR[:, None])
        if short_RN.count_nonzero() > FEW_SHORT * len(short_RN):
            return None
        for square_RN in (tt_RN, ss_RN):
            square_RN.masked_fill_(short_RN, math.inf)
        found = (short_RN if keep_RN is None else short_RN.logical_and_(keep_RN)).nonzero()
        return found[:, 0], found[:, 1]
