"""Unreliable-edge pruning: the joint entropy of every edge, and which edges stay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from vrm.relations.kth_smallest import kth_smallest, kth_smallest_of_tiles
from vrm.relations.vertices import (
    MIN_PRODUCT_ROWS,
    TINY,
    check_choice,
    count_edges,
    lengths,
    own_rows,
    row_tiles,
)

JointEntropy = Literal["mixture", "cross", "independent", "collision"]

MAX_STORED_EDGES = 1 << 26
"""Above this many edges (8192 x 8192) pruning stores no matrix of the size of the graph: see :func:`prune_edges`."""


def check_pruning(keep: float, kind: str) -> None:
    """Raise ``ValueError`` unless these are valid options of :func:`prune_edges`."""
    check_choice("joint_entropy", kind, JointEntropy)
    if not 0 < keep <= 1:
        raise ValueError(f"keep, the share of edges that stay, must be above 0 and at most 1 (no pruning); got {keep}")


def joint_entropy(real_ND: Tensor, virtual_MD: Tensor, *, kind: JointEntropy = "mixture") -> Tensor:
    """Return the joint entropy of every pair of a real and a virtual vertex, (M, N), in nats, float64, no gradient.

    Vertices (N, D) and (M, D) are distributions: non-negative rows of sum 1 (for classes see
    :func:`class_distributions`). VRM prunes edges of high joint entropy. The paper says that it grows with the
    discrepancy of the two predictions, and tends to their own uncertainty when they agree; the formula is our choice:

    - ``mixture``: ``H((p + q) / 2)``, which has both properties. N M D logarithms, computed in tiles of constant size.
    - ``cross``: ``-sum q log p``, p being the real vertex. One matrix product.
    - ``independent``: ``H(p) + H(q)``, which ignores the discrepancy.
    - ``collision``: ``-log sum ((p + q) / 2)^2``, the order-2 Renyi entropy of the mixture. One matrix product.

    Raise ``ValueError`` for an unknown ``kind``, or if the vertices form no graph.
    """
    check_choice("joint_entropy", kind, JointEntropy)
    count_edges(real_ND, virtual_MD)
    with torch.no_grad():
        scores = EntropyScores(real_ND.detach().double(), virtual_MD.detach().double(), kind, torch.float64)
        return scores.entropy(scores[:])


class EntropyScores:
    """Scores (M, N) that order edges as their joint entropies do, computed for some rows of the graph at a time.

    A score is the entropy minus that of uniform distributions. At the start of training every prediction is close to
    uniform, and the entropies themselves would differ by less than their rounding. For ``collision`` the score is
    ``1 - D sum m^2`` with the mixture m, which needs no logarithm. ``dtype`` is that of the scores; ``own`` selects
    rows of the graph.
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
            self.own_N, self.own_M = (lengths(x).square_().mul_(-self.length / 4).add_(0.5) for x in (p_ND, q_MD))
        elif kind == "collision":
            # D sum m^2 = D sum (m - 1/D)^2 + 2 sum m - 1, whose first term is small where predictions are even
            self.p_ND, self.q_MD = (x.sub(1 / self.length).to(dtype) for x in (p_ND, q_MD))
            self.own_N, self.own_M = (
                x.sum(1).neg_().add_(1).sub_(lengths(centred).square_(), alpha=self.length / 4).to(dtype)
                for x, centred in ((p_ND, self.p_ND), (q_MD, self.q_MD))
            )
            # |p + q|^2 is below |p|^2 + |q|^2 by at most -2 p.q, which is at most 1/2 and at most their mean
            self.cancelling = (self.own_N.amin() + self.own_M.amin()).neg_().clamp_(0.0, 0.5)
        elif kind == "cross":
            self.p_ND, self.q_MD = p_ND.clamp_min(TINY).log_().add_(math.log(self.length)), q_MD
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
        """Yield slices of rows, one a tile."""
        return row_tiles(len(self.q_MD), len(self.p_ND), self.p_ND.device, min_rows=MIN_PRODUCT_ROWS)

    def __getitem__(self, rows: slice) -> Tensor:
        q_RD = self.q_MD[rows]
        score_RN = self.p_ND.new_empty(len(q_RD), len(self.p_ND), dtype=self.dtype)
        if self.kind == "mixture":
            return self._mixture(q_RD, score_RN)
        if self.kind == "cross":
            return score_RN.copy_((q_RD @ self.p_ND.T).neg_())
        if self.kind == "independent":
            return torch.add(self.own_N, self.own_M[rows, None], out=score_RN)
        # The product first, by itself: some libraries add term by term. In place, so that autocast leaves it alone.
        score_RN.addmm_(q_RD, self.p_ND.T, alpha=-self.length / 2, beta=0.0)
        return score_RN.add_(self.own_N).add_(self.own_M[rows, None])

    def _mixture(self, q_RD: Tensor, score_RN: Tensor) -> Tensor:
        """Fill in ``-1/D sum (1 + x) log(1 + x)`` with ``1 + x = D (p + q) / 2``, in tiles."""
        least = -1 + torch.finfo(self.dtype).eps / 2
        for rows in row_tiles(len(q_RD), self.p_ND.numel(), self.p_ND.device):
            x_RND = (self.p_ND + q_RD[rows, None]).clamp_min_(least)
            log_RND = x_RND.log1p()
            torch.sum(log_RND.addcmul_(log_RND, x_RND), -1, out=score_RN[rows])
        return score_RN.div_(-self.length)

    def rounding(self, score: Tensor) -> Tensor:
        """Return a bound on how much rounding separates the scores of duplicate edges near ``score``.

        The bound is the same for every process and tile: ``cancelling`` bounds, over the whole graph, how much the
        terms of a product exceed their sum. Rounding errors of a sum grow as the root of the number of its terms. The
        distributions themselves are rounded in float64, and so are their products.
        """
        errors = 4 + math.sqrt(self.length)
        eps, own_eps = (errors * torch.finfo(x).eps for x in (self.p_ND.dtype, torch.float64))
        return (score.abs() + self.cancelling).mul_(eps).add_(own_eps).to(score.dtype)

    def entropy(self, score: Tensor) -> Tensor:
        """Return the entropies, in nats, that belong to scores."""
        uniform = math.log(self.length) * (2 if self.kind == "independent" else 1)
        return uniform + (-torch.log1p(-score) if self.kind == "collision" else score)


@dataclass(frozen=True)
class EntropyThreshold:
    """The edges kept in a graph too large to store: those whose score is at most ``threshold``, row by row.

    ``diagonal``: the column of the first row's edge to itself, if such edges do not count.
    """

    scores: EntropyScores
    diagonal: int | None
    threshold: Tensor

    def __getitem__(self, rows: slice) -> Tensor:
        """Return the keep mask (R, N) of some rows."""
        return _exclude_diagonal(self.scores[rows], self.diagonal, rows) <= self.threshold


def _exclude_diagonal(score_RN: Tensor, diagonal: int | None, rows: slice) -> Tensor:
    if diagonal is not None:
        score_RN.diagonal(diagonal + rows.start).fill_(math.inf)
    return score_RN


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
    """Return which edges stay: those whose joint entropy is at most the ``keep``-quantile of this graph.

    The quantile interpolates linearly: floor(keep (E - 1)) + 1 of E edges stay, and those that tie with the last of
    them up to rounding. The result is None (all edges) for ``keep=1``; otherwise a bool mask (M, N); or, for graphs of
    more than :data:`MAX_STORED_EDGES` edges, an :class:`EntropyThreshold`, found in several passes over the graph.

    Args:
        real_ND: the *student's* distributions in the real view (see :func:`joint_entropy`).
        virtual_MD: the student's distributions in the virtual view.
        keep: the share of edges that stay, in (0, 1].
        kind: the formula of the joint entropy.
        without_diagonal: real and virtual vertices are the same, and edges to oneself do not count (redundant graph).
        dtype: precision of the entropies, by default that of the vertices. float32 is several times as fast, and treats
            entropies that differ by less than about 1e-5 nats as tied. A student that is as sure as that of everything
            keeps more than the share, up to all edges; float64 tells them apart. ``collision`` uses float64 in any case
            if the graph has no more edges than the vertices have coordinates, because it is faster there.
        group: the vertices are those of all processes. Each process finds the mask of its own rows (see
            :func:`match_relations`); the quantile is that of the whole graph.

    Raise ``ValueError`` for ``keep`` outside (0, 1], an unknown ``kind``, vertices that form no graph, and ``mixture``
    on a graph too large to store.
    """
    check_pruning(keep, kind)
    num_edges = count_edges(real_ND, virtual_MD, without_diagonal=without_diagonal)
    if keep == 1:
        return None
    num_rows, num_columns, length = len(virtual_MD), len(real_ND), real_ND.shape[1]
    rows = own_rows(num_rows, group)
    stored = num_rows * num_columns <= MAX_STORED_EDGES
    if kind == "mixture" and not stored:
        raise ValueError(
            f"joint_entropy='mixture' takes a logarithm for each edge and coordinate, {num_rows} x {num_columns} x "
            f"{length} a step, too many for a graph of more than {MAX_STORED_EDGES} edges; use "
            "joint_entropy='collision', which is a matrix product, or keep=1"
        )
    dtype = torch.float64 if (real_ND.dtype if dtype is None else dtype) == torch.float64 else torch.float32
    if kind == "collision" and num_rows * num_columns <= real_ND.numel():
        dtype = torch.float64  # converting the vertices would take longer than their product in float64
    diagonal = rows.start if without_diagonal else None
    k = math.floor(keep * (num_edges - 1)) + 1  # so many values are at or below the keep-quantile
    with torch.no_grad():
        scores = EntropyScores(real_ND.double(), virtual_MD.double(), kind, dtype, rows)
        if not stored:

            def recomputed() -> Iterator[Tensor]:
                return (_exclude_diagonal(scores[tile], diagonal, tile) for tile in scores.tiles())

            score_RN = scores.p_ND.new_empty(0, dtype=dtype)
            threshold = kth_smallest_of_tiles(recomputed, k, score_RN, group)
        else:
            score_RN = _exclude_diagonal(scores[:], diagonal, slice(0, None))
            if group is None:
                threshold = kth_smallest(score_RN.flatten(), k)
            else:
                threshold = kth_smallest_of_tiles(lambda: [score_RN], k, score_RN, group)
        threshold = threshold + scores.rounding(threshold)
        return score_RN.le_(threshold).bool() if stored else EntropyThreshold(scores, diagonal, threshold)
