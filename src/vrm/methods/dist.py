"""DIST: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022 (arXiv 2205.10536).

    p, q = softmax(s / T), softmax(t / T) of student and teacher
    rho(a, b) = <a - mean(a), b - mean(b)> / (|a - mean(a)| * |b - mean(b)| + eps),   eps = 1e-8
    inter = T^2 * (1 - mean over samples of rho(p[b, :], q[b, :]))
    intra = T^2 * (1 - mean over classes of rho(p[:, c], q[:, c]))
    L = ce_weight * CE(s, y) + beta * inter + gamma * intra

Pearson's correlation ignores shift and scale, so the student need not reproduce a strong teacher's probabilities, only
the order and the proportions of their differences: between the classes of a sample, and between the samples of a batch
in a class. The released code for classification (hunto/image_classification_sota) has the factor ``T^2``, and the
paper's pseudo-code has not (``temperature_squared=false``); at the published ``T = 4`` it is 16 times the weight. The
code weighs ``inter + intra`` by 2, which is ``beta = gamma = 2`` as the paper writes it. The functions also take dense
predictions (B, C, H, W), whose positions are all samples, as in the authors' code for segmentation (hunto/DIST_KD,
without a temperature).

``eps`` is added to the product of the norms, as released, so the correlation of columns that barely vary is well below
1 even for a perfect student: on saturated predictions ``intra`` is not 0 at its best. ``intra`` relates the samples of
a batch. For a batch of one it is ``T^2`` without gradient, and for a batch of two each correlation is 1 or -1 with
hardly any gradient. Across processes each relates its own samples, as released.

The published settings for CIFAR-100 are those of the released code, so of the form with ``T^2``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Needs, Progress, Term, Views
from vrm.divergences import check_temperature, cross_entropy, lift

# B batch, C classes, N samples: those of the batch, at every position of dense predictions


def correlation(student: Tensor, teacher: Tensor, *, dim: int, eps: float = 1e-8) -> Tensor:
    """Return the correlation of two tensors of mean 0 along an axis, which vanishes; as released, damped by ``eps``.

    The covariance is divided by the product of the norms plus ``eps``. Zero vectors have correlation 0, and no
    gradient. No gradient reaches the teacher.
    """
    a, b = lift(student), lift(teacher.detach())
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    found: Tensor = (a * b).sum(dim) / (norms + eps)
    return found


def softened(logits: Tensor, *, temperature: float) -> Tensor:
    """Return the predictions of logits (B, C) or (B, C, ...) as rows (N, C), one for each position."""
    rows_NC = lift(logits).movedim(1, -1).flatten(0, -2)
    return (rows_NC / temperature).softmax(1)


def dist_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, temperature_squared: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the inter-class and the intra-class loss, two scalars, of logits (B, C), or dense ones (B, C, ...).

    Each is 1 minus a mean correlation of softened predictions, so between 0 and 2, and multiplied by
    ``temperature**2`` if ``temperature_squared``. Huang et al., eq. 8 and 9.

    Example:
        >>> inter, intra = dist_loss(student(images), teacher(images))
        >>> loss = cross_entropy(...) + 2 * inter + 2 * intra
    """
    p_NC, q_NC = (softened(x, temperature=temperature) for x in (student, teacher))
    scale = temperature**2 if temperature_squared else 1.0
    # Means are constants: a correlation does not change with a shift. That of a row is known, as it adds up to 1.
    mean = 1 / p_NC.shape[1]
    inter = correlation(p_NC - mean, q_NC - mean, dim=1)
    intra = correlation(p_NC - p_NC.detach().mean(0), q_NC - q_NC.mean(0), dim=0)
    return scale * (1 - inter.mean()), scale * (1 - intra.mean())


class DIST(Method):
    """Match how the probabilities of a sample, and those of a class, vary together with the teacher's."""

    title = "Knowledge Distillation from A Stronger Teacher"
    venue = "NeurIPS"
    year = 2022
    family = "relation"
    published: ClassVar = {
        "cifar100": {"*": {"temperature": 4.0, "beta": 2.0, "gamma": 2.0, "ce_weight": 1.0}},
        "imagenet": {"*": {"temperature": 1.0, "beta": 2.0, "gamma": 2.0, "ce_weight": 1.0}},
    }

    def __init__(
        self,
        temperature: float = 4.0,
        beta: float = 2.0,
        gamma: float = 2.0,
        temperature_squared: bool = True,
        ce_weight: float = 1.0,
    ) -> None:
        """Set the options.

        Args:
            temperature: softens the predictions of both networks.
            beta: weight of the inter-class term, which correlates the classes of each sample.
            gamma: weight of the intra-class term, which correlates the samples of the batch in each class.
            temperature_squared: multiply both terms by the squared temperature, as in the code but not in the paper.
            ce_weight: weight of the cross entropy.
        """
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.beta = beta
        self.gamma = gamma
        self.temperature_squared = temperature_squared
        self.ce_weight = ce_weight

    @property
    def needs(self) -> Needs:
        """Logits, and batches kept whole because the intra-class term relates their samples."""
        return Needs(couples_samples=self.gamma != 0)

    def unused_options(self) -> dict[str, str]:
        """Return what has no effect without relations, and the switch of a factor that is 1."""
        if self.beta == self.gamma == 0:
            reason = "method.beta=0 and method.gamma=0 leave out the correlations"
            return dict.fromkeys(("temperature", "temperature_squared"), reason)
        return {"temperature_squared": "the square of method.temperature=1 is 1"} if self.temperature == 1 else {}

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the two correlations."""
        s, t = student.real.logits, teacher.real.logits
        inter, intra = dist_loss(s, t, temperature=self.temperature, temperature_squared=self.temperature_squared)
        return Losses(
            ce=Term(cross_entropy(s, batch.target), self.ce_weight, "task"),
            inter=Term(inter, self.beta),
            intra=Term(intra, self.gamma),
        )
