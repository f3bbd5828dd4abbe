"""Inner products of edges from products of vertices: fast ones, and exact ones for tiles with short edges.

Edges are differences of vertices, ``a_n - b_m`` of the teacher and ``c_n - d_m`` of the student.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vrm.relations.vertices import lengths

# Relative rounding error of |p - q|^2 from the low-order products (see SplitVertices); multiply by sqrt(D).
NOISE = 2.0**-49
# Below this share of its terms, 1 - cos is nothing but their rounding.
ROUNDING = 2.0**-48


@dataclass(frozen=True)
class OneProductDots:
    """``t . s`` of edges t and s from one product: ``2 t . s = |w t + s / w|^2 - w^2 |t|^2 - |s|^2 / w^2``.

    The weight w, whose square is a power of two, gives both terms about the same length; otherwise the rounding error
    of the longer one would be that of the result. This requires that the ratio of the student's lengths to the
    teacher's is about the same for all vertices.
    """

    square: float
    x_ND: Tensor
    y_MD: Tensor
    xx_N: Tensor
    yy_M: Tensor

    @classmethod
    def of(cls, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor, ratio: float) -> OneProductDots:
        """Prepare the factors; ``ratio`` is that of the squared lengths, the student's over the teacher's."""
        square = 2.0 ** round(math.log2(ratio) / 2)
        weight = math.sqrt(square)
        x_ND, y_MD = ((t * weight).add_(s, alpha=1 / weight) for t, s in ((a_ND, c_ND), (b_MD, d_MD)))
        return cls(square, x_ND, y_MD, *(lengths(x).square_() for x in (x_ND, y_MD)))

    def product(self, rows: slice, tt_RN: Tensor, ss_RN: Tensor, *, out: Tensor) -> None:
        """Write ``t . s`` of some rows to ``out``, given ``|t|^2`` and ``|s|^2``."""
        torch.add(self.xx_N, self.yy_M[rows, None], out=out).addmm_(self.y_MD[rows], self.x_ND.T, alpha=-1.0, beta=0.5)
        out.sub_(tt_RN, alpha=self.square / 2).sub_(ss_RN, alpha=0.5 / self.square)


@dataclass(frozen=True)
class TwoProductDots:
    """``t . s`` of edges t and s from two products, for vertices of any lengths: ``a.c - a.d - b.c + b.d``."""

    a_ND: Tensor
    b_MD: Tensor
    c_ND: Tensor
    d_MD: Tensor
    ac_N: Tensor
    bd_M: Tensor

    @classmethod
    def of(cls, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor) -> TwoProductDots:
        """Prepare the terms that belong to one vertex of both networks."""
        return cls(a_ND, b_MD, c_ND, d_MD, (a_ND * c_ND).sum(1), (b_MD * d_MD).sum(1))

    def product(self, rows: slice, tt_RN: Tensor, ss_RN: Tensor, *, out: Tensor) -> None:
        """Write ``t . s`` of some rows to ``out``."""
        torch.add(self.ac_N, self.bd_M[rows, None], out=out)
        out.addmm_(self.b_MD[rows], self.c_ND.T, alpha=-1.0).addmm_(self.d_MD[rows], self.a_ND.T, alpha=-1.0)


def leading_bits(x: Tensor, size: Tensor, num_bits: int) -> Tensor:
    """Round to multiples of about ``size / 2^num_bits``, by adding a large number (Veltkamp; Dekker 1971)."""
    large = size * (1.5 * 2.0 ** (52 - num_bits))
    return (x + large).sub_(large)


@dataclass(frozen=True)
class SplitVertices:
    """Vertices (N, D) in three parts: multiples of about 2^-24 and of 2^-48 of the vertex's length, and the remainder.

    Products of parts have one of three sizes. Those of the two larger sizes, and the sums of them that make up an edge,
    are exact in float64, so short edges lose nothing as they cancel. The remaining products are smaller by 2^-48, and
    so is their rounding error.
    """

    x_ND: Tensor
    x0_ND: Tensor
    x1_ND: Tensor
    x01_ND: Tensor
    x2_ND: Tensor

    @classmethod
    def of(cls, x_ND: Tensor) -> SplitVertices:
        """Split vertices given in float64."""
        length_N1 = lengths(x_ND)[:, None]
        x0_ND, x01_ND = leading_bits(x_ND, length_N1, 24), leading_bits(x_ND, length_N1, 48)
        return cls(x_ND, x0_ND, x01_ND - x0_ND, x01_ND, x_ND - x01_ND)

    def __getitem__(self, rows: slice) -> SplitVertices:
        return SplitVertices(self.x_ND[rows], self.x0_ND[rows], self.x1_ND[rows], self.x01_ND[rows], self.x2_ND[rows])

    def products(self, other: SplitVertices) -> tuple[tuple[tuple[Tensor, Tensor], ...], ...]:
        """Return pairs of factors whose products add up to the inner product, grouped by size, largest first."""
        return (
            ((self.x0_ND, other.x0_ND),),
            ((self.x0_ND, other.x1_ND), (self.x1_ND, other.x0_ND)),
            ((self.x1_ND, other.x1_ND), (self.x01_ND, other.x2_ND), (self.x2_ND, other.x_ND)),
        )

    def dot(self, other: SplitVertices) -> list[Tensor]:
        """Return the inner products of corresponding vertices, three parts (N,), largest first."""
        return [
            torch.stack([(x_ND * y_ND).sum(1) for x_ND, y_ND in factors]).sum(0) for factors in self.products(other)
        ]

    def noise(self) -> Tensor:
        """Return what each vertex contributes to the absolute error of a squared edge length, (N,)."""
        x_N, x1_N, x2_N = (lengths(x_ND) for x_ND in (self.x_ND, self.x1_ND, self.x2_ND))
        noise_N: Tensor = x1_N.square().addcmul_(x_N, x2_N).mul_(NOISE * math.sqrt(self.x_ND.shape[1]))
        return noise_N


class EdgeProducts:
    """Exact inner products of edges, ``own_real[n] + own_virtual[m] + weight * sum of real[n] . virtual[m]``.

    The terms that belong to one vertex are added by matrix products as well. Each size is accumulated by itself.
    """

    def __init__(
        self,
        pairs: tuple[tuple[SplitVertices, SplitVertices], ...],
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
        # The smaller sizes apart: a library that adds term by term would round each to the size of the whole.
        for size, sum_RN in enumerate((first_RN, rest_RN, rest_RN)):
            own_virtual_M2, own_real_2N = self.own[size]
            sum_RN.addmm_(own_virtual_M2[rows], own_real_2N)
            for products in of_pairs:
                for virtual_RD, real_ND in products[size]:
                    sum_RN.addmm_(virtual_RD, real_ND.T, alpha=self.weight)
        total_RN: Tensor = first_RN.add_(rest_RN)
        return total_RN


class ShortEdges:
    """Value and gradient of tiles that contain short edges, from exact products, at three times the cost."""

    def __init__(self, a_ND: Tensor, b_MD: Tensor, c_ND: Tensor, d_MD: Tensor, eps_squared: float) -> None:
        self.eps_squared = eps_squared
        a, b, c, d = self.split = tuple(SplitVertices.of(x) for x in (a_ND, b_MD, c_ND, d_MD))
        aa, bb, cc, dd = a.dot(a), b.dot(b), c.dot(c), d.dot(d)
        # |a_n - b_m|^2, |c_n - d_m|^2, (a_n - b_m) . (c_n - d_m)
        self.teacher = EdgeProducts(((a, b),), aa, bb, -2.0)
        self.student = EdgeProducts(((c, d),), cc, dd, -2.0)
        self.both = EdgeProducts(((c, b), (a, d)), a.dot(c), b.dot(d), -1.0)
        self.noise_aN, self.noise_bM1 = a.noise(), b.noise()[:, None]
        self.noise_cN, self.noise_dM1 = c.noise(), d.noise()[:, None]

    def tile(self, rows: slice, keep_RN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of some rows, its gradient for c (N, D), and its gradient for these rows of d (R, D)."""
        tt_RN, ss_RN, ts_RN = self.teacher[rows], self.student[rows], self.both[rows]
        # An edge of length zero must come out as exactly zero, since 1 / eps^2 would multiply its noise.
        noise_t_RN, noise_s_RN = self.noise_aN + self.noise_bM1[rows], self.noise_cN + self.noise_dM1[rows]
        no_teacher_RN, no_student_RN = tt_RN <= noise_t_RN, ss_RN <= noise_s_RN
        ss_RN.masked_fill_(no_student_RN, 0.0)
        inverse_t_RN = tt_RN.clamp_min(self.eps_squared).rsqrt_().masked_fill_(no_teacher_RN, 0.0)
        inverse_s_RN = ss_RN.clamp_min(self.eps_squared).rsqrt_()
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
        # What remains of relations that are alike is the rounding error of 1 and of short edges. It is set to zero, so
        # that it does not hide the losses of edges shorter than eps.
        alike_RN = value_RN < noise_RN.add_(squares_RN, alpha=ROUNDING)
        value_RN.masked_fill_(alike_RN, 0.0)

        # The gradient is by_t (a - b) + by_s (c - d). An edge shorter than eps has no term from its normalisation: with
        # cos = 1 its by_s is the derivative of 1/2 |u_S|^2.
        by_t_RN = inverse_ts_RN.neg_()
        cosine_RN.masked_fill_(alike_RN.logical_or_(ss_RN < self.eps_squared), 1.0)
        by_s_RN = square_s_RN.mul_(cosine_RN)
        a, b, c, d = self.split
        by_teacher = _sum_weighted_differences(by_t_RN, a, b[rows])
        by_student = _sum_weighted_differences(by_s_RN, c, d[rows])
        return value_RN.sum(), by_teacher[0].add_(by_student[0]), by_teacher[1].add_(by_student[1])


def _sum_weighted_differences(weight_RN: Tensor, real: SplitVertices, virtual: SplitVertices) -> tuple[Tensor, Tensor]:
    """Return the sums over R of ``weight (real - virtual)``, (N, D), and over N of ``weight (virtual - real)``, (R, D).

    Short edges have large weights and small differences, so the leading bits of both are multiplied apart, as in
    :class:`SplitVertices`: 20 of the weights, which makes sums of some hundred of the largest exact.
    """
    first_RN = leading_bits(weight_RN, weight_RN.abs().amax(), 20)
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
