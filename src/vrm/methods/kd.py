"""KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS workshop 2014 (arXiv 1503.02531).

    L = ce_weight * CE(s, y) + kd_weight * T^2 * mean_b KL(softmax(t_b / T) || softmax(s_b / T))

Sum over classes, mean over the batch; ``T^2`` keeps the gradient's size comparable with the cross entropy's. Paper and
released code agree. The weights 0.1 and 0.9 are those behind the published CIFAR-100 tables.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vrm.contract import Batch, Losses, Method, Needs, Progress, Term, Views
from vrm.divergences import cross_entropy, soft_kl


def kd_loss(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Distillation of softened logits (B, C), a scalar in nats times ``temperature**2``. Hinton et al., section 2."""
    return temperature**2 * soft_kl(student_BC, teacher_BC.detach(), temperature=temperature).mean()


class KD(Method):
    """Soft targets of the teacher beside the labels."""

    title = "Distilling the Knowledge in a Neural Network"
    venue = "NIPS workshop"
    year = 2014
    family = "logit"
    published: ClassVar = {
        "cifar100": {"*": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}},
        "imagenet": {"*": {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5}},
    }

    def __init__(self, temperature: float = 4.0, ce_weight: float = 0.1, kd_weight: float = 0.9) -> None:
        """``temperature`` softens both networks' predictions; the weights multiply the two terms."""
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight

    @property
    def needs(self) -> Needs:
        """Logits only."""
        return Needs()

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Task term and distillation term."""
        s, t = student.real.logits, teacher.real.logits
        return Losses(
            ce=Term(cross_entropy(s, batch.target), self.ce_weight, "task"),
            kd=Term(kd_loss(s, t, temperature=self.temperature), self.kd_weight),
        )
