"""CRD: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020.

    v = E(f) / |E(f)|,   p_bj = exp(<M[J_bj], v_b> / temperature) / Z,   c = K / N
    L(v, M) = -1/B * sum_b [ log(p_b0 / (p_b0 + c + eps)) + sum_{j=1..K} log(c / (p_bj + c + eps)) ],   eps = 1e-7
    L = ce_weight * CE + feature_weight * (L(v_student, M_teacher) + L(v_teacher, M_student))

``E`` are linear embeddings (with bias) of the pooled vectors, both trained. ``M`` are two memories with a unit row for
each of the N training samples; ``J_b0`` is the positive and ``J_bj`` are K negatives. Each network is scored against
the memory of the *other* network. That holds for the positive too, which is a row written earlier and never the present
embedding. ``Z = N * mean(exp(..))`` is one number for each of the two score tables, taken from the first batch and kept
for the rest of training. After the step, the rows of the batch's samples become ``M[i] <- normalised(momentum * M[i] +
(1 - momentum) * v)`` with the ``v`` of that step's forward pass. RepDistiller and mdistiller agree and are followed.

Here everything stays in log space: ``-log(p / (p + c'))`` is ``softplus(log c' - log p)``, so no exponential overflows.

Negatives are drawn for each sample and step, uniformly from the samples of other classes. Without replacement (CIFAR)
negative j is element ``perm(j)`` of a keyed permutation of those samples, evaluated only where it is needed. The
permutation is the *swap-or-not* shuffle (Hoang, Morris, Rogaway, CRYPTO 2012) followed by a random rotation. It needs
no rejection for any number of samples and uses integer arithmetic, so all devices agree. Every round and the rotation
are bijections, so no negative repeats. The rotation makes each negative uniform. A pair of negatives is uniform over
pairs unless no round has moved exactly one of the two, which has a probability of at most (1/2 + 1/n)^rounds for n
samples. With replacement (ImageNet in mdistiller, and whenever K exceeds the smallest number of samples of other
classes, as released) negatives are independent.

The released code's alias sampler requires CUDA and admits negatives of the sample's own class. Its own recipes do not
use it, and it is left out. RepDistiller saves neither memories nor ``Z`` in its checkpoints; here both are buffers. Two
samples of a batch with the same index write the same row, and the last one counts (undefined as released).

The numbers in the VRM paper's Tables 12 and 13 are of CRD alone, not of CRD + KD.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm import randomness
from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Probe, Progress, Term, Views
from vrm.divergences import check_temperature, cross_entropy, lift

# B batch, C classes, E embedding features, K negatives, N training samples, R rounds of the shuffle

Positive = Literal["exact", "relax"]

ROUNDS = 6  # 1.6 % of the pairs of a sample's negatives are then not perfectly independent


def contrast_scores(anchor_BE: Tensor, memory_NE: Tensor, contrast_BK: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Return inner products of anchors with the rows ``contrast`` of a memory, divided by the temperature, (B, K).

    All products are computed and the wanted ones selected, unless the wanted rows take less memory.
    """
    if len(memory_NE) <= contrast_BK.shape[1] * memory_NE.shape[1]:
        return (anchor_BE @ memory_NE.T).gather(1, contrast_BK) / temperature
    return torch.einsum("be,bke->bk", anchor_BE, memory_NE[contrast_BK]) / temperature


def log_normaliser(scores_BK: Tensor, *, num_data: int) -> Tensor:
    """Return ``log Z``, a constant scalar, as estimated from one table of scores. Wu et al., CVPR 2018, section 3.2."""
    return scores_BK.detach().flatten().logsumexp(0) + math.log(num_data / scores_BK.numel())


def contrast_loss(scores_BK: Tensor, log_z: Tensor, *, num_data: int, eps: float = 1e-7) -> Tensor:
    """Return the noise contrastive loss of scores whose column 0 is the positive, a scalar in nats.

    Tian et al., eq. 18, as released: summed over negatives, mean over the batch. The noise is uniform over ``num_data``
    samples.
    """
    log_p_BK = scores_BK - log_z
    noise = (scores_BK.shape[1] - 1) / num_data
    log_noise = math.log(noise + eps)
    positive_B = -F.logsigmoid(log_p_BK[:, 0] - log_noise)
    negative_BK = math.log1p(eps / noise) - F.logsigmoid(log_noise - log_p_BK[:, 1:])
    return (positive_B + negative_BK.sum(1)).mean()


def updated_rows(memory_NE: Tensor, index_B: Tensor, value_BE: Tensor, *, momentum: float = 0.5) -> Tensor:
    """Return the rows (B, E) that replace ``memory[index]``. Equal indices get equal rows, computed from the last."""
    position_B = torch.arange(len(index_B), device=index_B.device)
    last_B = ((index_B[:, None] == index_B) * position_B).amax(1)
    return F.normalize(momentum * memory_NE[index_B] + (1 - momentum) * value_BE[last_B], dim=1)


def _scaled(bits: Tensor, size: Tensor) -> Tensor:
    """Map random bits to integers below ``size`` (at most 2^31)."""
    return ((bits >> 33) & 0x7FFFFFFF) * size >> 31


def shuffled(size_B: Tensor, count: int, bits_BR: Tensor) -> Tensor:
    """Return the first ``count`` values of a permutation of ``0 .. size-1`` for each row, (B, count).

    ``bits`` (B, 3 * rounds + 1) are random 64-bit words. ``size`` must be below 2^31 and at least ``count``.
    """
    size_B1 = size_B[:, None].to(torch.int32)
    place_BK = torch.arange(count, dtype=torch.int32, device=size_B.device).expand(len(size_B), count)
    for start in range(0, bits_BR.shape[1] - 1, 3):
        pivot_B1 = _scaled(bits_BR[:, start, None], size_B[:, None]).to(torch.int32)
        factor_B1, offset_B1 = (bits_BR[:, start + i, None].to(torch.int32) for i in (1, 2))
        partner_BK = pivot_B1 - place_BK
        partner_BK = torch.where(partner_BK < 0, partner_BK + size_B1, partner_BK)
        # Both partners decide by the same bit, the top bit of a pairwise independent hash of the greater place.
        swap_BK = factor_B1 * torch.maximum(place_BK, partner_BK) + offset_B1 < 0
        place_BK = torch.where(swap_BK, partner_BK, place_BK)
    rotated_BK = place_BK - (size_B1 - _scaled(bits_BR[:, -1:], size_B[:, None]).to(torch.int32))
    return torch.where(rotated_BK < 0, rotated_BK + size_B1, rotated_BK).long()


class CRD(Method):
    """Make the two embeddings of a sample agree, and differ from those of other classes."""

    title = "Contrastive Representation Distillation"
    venue = "ICLR"
    year = 2020
    family = "relation"
    student_taps = teacher_taps = ("pooled",)
    published: ClassVar = {
        "cifar100": {
            "*": {
                "embed_dim": 128,
                "num_negatives": 16384,
                "temperature": 0.07,
                "momentum": 0.5,
                "ce_weight": 1.0,
                "feature_weight": 0.8,
            }
        },
        "imagenet": {
            "*": {
                "embed_dim": 128,
                "num_negatives": 16384,
                "temperature": 0.07,
                "momentum": 0.5,
                "replacement": True,
                "ce_weight": 1.0,
                "feature_weight": 0.8,
            }
        },
    }

    memory_student: Tensor
    memory_teacher: Tensor
    log_z: Tensor
    started: Tensor
    order: Tensor
    first: Tensor
    count: Tensor

    def __init__(
        self,
        embed_dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        positive: Positive = "exact",
        replacement: bool = False,
        ce_weight: float = 1.0,
        feature_weight: float = 0.8,
    ) -> None:
        """Set the options.

        Args:
            embed_dim: width of the embeddings.
            num_negatives: number of negatives K for each sample.
            temperature: divides the scores.
            momentum: share of its old value that a row of a memory keeps.
            positive: the sample itself (``exact``), or a random one of its class (``relax``).
            replacement: draw negatives with replacement.
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the distillation term.
        """
        super().__init__()
        for name, value in (("embed_dim", embed_dim), ("num_negatives", num_negatives)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_temperature(temperature)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if positive not in get_args(Positive):
            raise ValueError(f"positive must be one of {', '.join(get_args(Positive))}, got {positive!r}")
        self.embed_dim = embed_dim
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.momentum = momentum
        self.positive = positive
        self.replacement = replacement
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def needs(self) -> Needs:
        """Pooled vectors, sample indices, random draws, and whole batches, as the first one fixes the normalisers."""
        return Needs(
            student_taps=self.student_taps, teacher_taps=self.teacher_taps, index=True, draws=True, couples_samples=True
        )

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Create embeddings and memories, and sort the samples by class.

        Raise ``ValueError`` if all samples are of one class.
        """
        super().build(student, teacher, data)
        count = torch.bincount(data.targets)
        smallest = data.num_samples - int(count.max())
        if smallest == 0:
            raise ValueError(
                "CRD contrasts samples of different classes, but all training samples are of one class; use other data"
            )
        self.embed_student = nn.Linear(student.channels("pooled"), self.embed_dim)
        self.embed_teacher = nn.Linear(teacher.channels("pooled"), self.embed_dim)
        self.independent = self.replacement or self.num_negatives > smallest
        self.register_buffer("order", torch.argsort(data.targets, stable=True), persistent=False)
        self.register_buffer("first", count.cumsum(0) - count, persistent=False)
        self.register_buffer("count", count, persistent=False)
        bound = math.sqrt(3 / self.embed_dim)  # rows of expected squared norm 1
        for name in ("memory_student", "memory_teacher"):
            self.register_buffer(name, torch.empty(data.num_samples, self.embed_dim).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.zeros(2))  # of the student's and the teacher's scores
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def draw(self, batch: Batch, progress: Progress) -> Tensor:
        """Return the rows of the memories to contrast with, (B, 1 + K): the positive, then the negatives."""
        first_B, count_B = self.first[batch.target], self.count[batch.target]
        size_B = len(self.order) - count_B
        name = (progress.view, progress.step, batch.index[:, None])
        if self.independent:
            column_K = torch.arange(self.num_negatives, device=batch.index.device)
            bits_BK = randomness.bits(progress.seed, "crd negatives", *name, column_K)
            place_BK = _scaled(bits_BK, size_B[:, None])
        else:
            column_R = torch.arange(3 * ROUNDS + 1, device=batch.index.device)
            bits_BR = randomness.bits(progress.seed, "crd shuffle", *name, column_R)
            place_BK = shuffled(size_B, self.num_negatives, bits_BR)
        # Negatives are the samples in sorted order without those of the own class, which are contiguous.
        place_BK = place_BK + (place_BK >= first_B[:, None]) * count_B[:, None]
        positive_B1 = batch.index[:, None]
        if self.positive == "relax":
            bits_B1 = randomness.bits(progress.seed, "crd positive", *name)
            positive_B1 = self.order[first_B[:, None] + _scaled(bits_B1, count_B[:, None])]
        return torch.cat([positive_B1, self.order[place_BK]], dim=1)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the distillation term."""
        student_BE = F.normalize(self.embed_student(lift(student.real.taps["pooled"])), dim=1)
        teacher_BE = F.normalize(self.embed_teacher(lift(teacher.real.taps["pooled"].detach())), dim=1)
        contrast_BK = self.draw(batch, progress)
        num_data = len(self.order)
        scores = (
            contrast_scores(student_BE, self.memory_teacher, contrast_BK, temperature=self.temperature),
            contrast_scores(teacher_BE, self.memory_student, contrast_BK, temperature=self.temperature),
        )
        estimate = torch.stack([log_normaliser(score_BK, num_data=num_data) for score_BK in scores])
        log_z = torch.where(self.started, self.log_z, estimate)
        if progress.view == 0:  # kept for after_step, when the weights will have changed
            self._seen = (student_BE.detach(), teacher_BE.detach(), log_z)
        of_student, of_teacher = (contrast_loss(scores[i], log_z[i], num_data=num_data) for i in range(2))
        return Losses(
            ce=Term(cross_entropy(student.real.logits, batch.target), self.ce_weight, "task"),
            crd=Term(of_student + of_teacher, self.feature_weight),
        )

    @torch.no_grad()
    def after_step(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> None:
        """Write the embeddings of this step's forward pass into the memories, and keep the normalisers."""
        if self._seen is None:
            raise ValueError("CRD's after_step needs the embeddings of this step's forward pass; call forward first")
        student_BE, teacher_BE, log_z = self._seen
        for memory_NE, value_BE in ((self.memory_student, student_BE), (self.memory_teacher, teacher_BE)):
            rows_BE = updated_rows(memory_NE, batch.index, value_BE, momentum=self.momentum)
            memory_NE.index_copy_(0, batch.index, rows_BE)
        self.log_z.copy_(log_z)
        self.started.fill_(True)
        self._seen = None
