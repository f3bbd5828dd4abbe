"""Algorithm 1 of the VRM paper with explicit edge tensors and autograd: what the closed forms are compared with.

B samples, C classes, N real and M virtual vertices, D their length. Graphs are indexed [virtual, real].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Vertices = tuple[Tensor, Tensor, Tensor, Tensor]


def relations(real_ND: Tensor, virtual_MD: Tensor, eps: float = 1e-8) -> Tensor:
    """Unit differences (M, N, D); a difference shorter than ``eps`` is divided by ``eps``."""
    return F.normalize(real_ND[None] - virtual_MD[:, None], dim=-1, eps=eps)


def match(
    vertices: Vertices, keep_MN: Tensor | None = None, *, eps: float = 1e-8, delta: float | None = None
) -> Tensor:
    """Mean over kept edges of half the squared distance, or of the summed Huber loss, of student and teacher relations.

    ``vertices``: student real, student virtual, teacher real, teacher virtual.
    """
    student, teacher = relations(*vertices[:2], eps), relations(*vertices[2:], eps)
    if delta is None:
        edge_MN = 0.5 * (student - teacher).square().sum(-1)
    else:
        edge_MN = F.huber_loss(student, teacher, reduction="none", delta=delta).sum(-1)
    return edge_MN.mean() if keep_MN is None else (edge_MN * keep_MN).sum() / keep_MN.sum()


def predictions(logits: Vertices, temperature: float) -> Vertices:
    """Softmax of the four logits (B, C)."""
    student_real, student_virtual, teacher_real, teacher_virtual = (F.softmax(z / temperature, 1) for z in logits)
    return student_real, student_virtual, teacher_real, teacher_virtual


def transpose(vertices: Vertices) -> Vertices:
    """Sample vertices to class vertices."""
    student_real, student_virtual, teacher_real, teacher_virtual = (x.T for x in vertices)
    return student_real, student_virtual, teacher_real, teacher_virtual


def redundant(vertices: Vertices, *, dim: int = 0) -> tuple[Vertices, Tensor]:
    """All 2N vertices, real then virtual, against all of them, and the mask of all edges but the diagonal.

    ``dim=1``: of vertices whose coordinates are samples, which are as many and twice as long.
    """
    student, teacher = torch.cat(vertices[:2], dim), torch.cat(vertices[2:], dim)
    return (student, student, teacher, teacher), ~torch.eye(len(student), dtype=torch.bool)


def mixture_entropy(real_ND: Tensor, virtual_MD: Tensor) -> Tensor:
    """Entropy in nats of the mean of every two distributions, (M, N)."""
    return torch.special.entr((real_ND[None] + virtual_MD[:, None]) / 2).sum(-1)


def keep_mask(real_ND: Tensor, virtual_MD: Tensor, keep: float) -> Tensor:
    """Edges whose mixture entropy is at most its ``keep``-quantile, (M, N)."""
    entropy_MN = mixture_entropy(real_ND.detach(), virtual_MD.detach())
    return entropy_MN <= entropy_MN.flatten().quantile(keep)


def vrm_loss(logits: Vertices, *, temperature: float = 4.0, keep: float = 1.0) -> tuple[Tensor, Tensor]:
    """Inter-sample and inter-class loss of logits (B, C): student real and virtual, teacher real and virtual."""
    samples = predictions(logits, temperature)
    classes = transpose(samples)
    if keep == 1:
        return match(samples), match(classes)
    real, virtual = (w / w.sum(1, keepdim=True) for w in classes[:2])
    return match(samples, keep_mask(*samples[:2], keep)), match(classes, keep_mask(real, virtual, keep))
