"""VRM as Algorithm 1 of its paper writes it, with every edge in memory, to measure the closed form against.

B batch, C classes, V length of a vertex, N vertices of a graph. Edges are indexed [virtual, real].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.config import ConfigError
from vrm.contract import Batch, Losses, Method, Needs, Outputs, Progress, Term, Views
from vrm.divergences import cross_entropy

if TYPE_CHECKING:
    from vrm.methods.vrm import VRM

WRITTEN_FOR = {"vertices": "logits", "joint_entropy": "mixture", "matching": "squared", "prune_redundant": True}
"""The options of VRM that Algorithm 1 fixes, and their values there."""


def relations(real_NV: Tensor, virtual_NV: Tensor, *, eps: float) -> Tensor:
    """Return the unit vectors from every virtual to every real vertex, (N, N, V)."""
    return F.normalize(real_NV[None] - virtual_NV[:, None], dim=-1, eps=eps)


def reliable_edges(real_NV: Tensor, virtual_NV: Tensor, *, keep: float) -> Tensor:
    """Return 1 for edges whose mixture entropy is at most its ``keep``-quantile, else 0, (N, N)."""
    real, virtual = (x / x.sum(1, keepdim=True) for x in (real_NV.detach(), virtual_NV.detach()))
    entropy_NN: Tensor = torch.special.entr((real[None] + virtual[:, None]) / 2).sum(-1)
    rank = int(keep * (entropy_NN.numel() - 1)) + 1
    kept_NN: Tensor = entropy_NN <= entropy_NN.flatten().kthvalue(rank).values
    return kept_NN.to(real_NV.dtype)


def graph_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], *, keep: float, eps: float) -> Tensor:
    """Return half the squared distance of relations, averaged over the kept edges.

    ``student`` and ``teacher`` hold the vertices (N, V) of the real and of the virtual view.
    """
    edge_NN = 0.5 * (relations(*student, eps=eps) - relations(*teacher, eps=eps)).square().sum(-1)
    if keep == 1:
        return edge_NN.mean()
    kept_NN = reliable_edges(*student, keep=keep)
    return (edge_NN * kept_NN).sum() / kept_NN.sum()


class NaiveVRM(Method):
    """The loss of a :class:`~vrm.methods.vrm.VRM` with the same options, computed from all edges."""

    def __init__(self, closed: VRM) -> None:
        """Take the options of ``closed``. Raise ``ConfigError`` for options that Algorithm 1 does not have."""
        super().__init__()
        for name, value in WRITTEN_FOR.items():
            if getattr(closed, name) != value:
                raise ConfigError(
                    f"the naive form is written for vrm.{name}={str(value).lower()}, not "
                    f"{str(getattr(closed, name)).lower()}; leave out vrm.{name}, or against=naive"
                )
        self.closed = closed

    @property
    def needs(self) -> Needs:
        """Return the needs of the closed form."""
        return self.closed.needs

    def _match(self, student: tuple[Outputs, Outputs], teacher: tuple[Outputs, Outputs]) -> tuple[Tensor, Tensor]:
        """Return both relation losses of the real view and one virtual view."""
        real_s, virtual_s, real_t, virtual_t = (
            F.softmax(view.logits / self.closed.temperature, 1) for view in (*student, *teacher)
        )
        keep, eps = self.closed.keep, self.closed.eps
        samples = graph_loss((real_s, virtual_s), (real_t, virtual_t), keep=keep, eps=eps)
        classes = graph_loss((real_s.T, virtual_s.T), (real_t.T, virtual_t.T), keep=keep, eps=eps)
        return samples, classes

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the terms of VRM."""
        losses = Losses(ce_real=Term(cross_entropy(student.real.logits, batch.target), 1.0, "task"))
        if self.closed.virtual_cross_entropy:
            each = [cross_entropy(virtual.logits, batch.target) for virtual in student.virtual]
            losses["ce_virtual"] = Term(torch.stack(each).mean(), 1.0, "task")
        pairs = zip(student.virtual, teacher.virtual, strict=True)
        matched = [self._match((student.real, s), (teacher.real, t)) for s, t in pairs]
        isv, icv = (torch.stack(each).mean() for each in zip(*matched, strict=True))
        losses["isv"] = Term(isv, self.closed.alpha)
        losses["icv"] = Term(icv, self.closed.beta)
        return losses


def measure_disagreement(closed: VRM, student: Views, teacher: Views, batch: Batch, progress: Progress) -> float:
    """Return the largest relative difference of a loss term between both forms, in float64 on the same outputs."""

    def double(views: Views) -> Views:
        return Views.of(Outputs(view.logits.detach().double()) for view in views.each())

    arguments = double(student), double(teacher), batch, progress
    ours, theirs = closed(*arguments), NaiveVRM(closed)(*arguments)
    gaps = [(ours[name].value - theirs[name].value).abs() / theirs[name].value.abs() for name in theirs]
    return float(torch.stack(gaps).max())
