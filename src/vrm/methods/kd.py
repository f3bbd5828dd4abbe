"""KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", NIPS workshop 2014 (arXiv 1503.02531).

    L = ce_weight * CE(s, y) + kd_weight * T^2 * mean_b KL(softmax(t_b / T) || softmax(s_b / T))

The divergence is summed over classes and averaged over the batch; ``T^2`` keeps its gradient comparable in size with
that of the cross entropy. Paper and released code agree. The weights 0.1 and 0.9 are those of the published CIFAR-100
tables.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vrm.contract import Batch, Losses, Method, Progress, Term, Views
from vrm.divergences import check_temperature, cross_entropy, soft_kl


def kd_loss(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Return the divergence of softened logits (B, C), a scalar in nats times ``temperature**2``.

    Hinton et al., section 2.
    """
    return temperature**2 * soft_kl(student_BC, teacher_BC.detach(), temperature=temperature).mean()


class KD(Method):
    """Learn the teacher's softened predictions beside the labels."""

    title = "Distilling the Knowledge in a Neural Network"
    venue = "NIPS workshop"
    year = 2014
    family = "logit"
    published: ClassVar = {
        "cifar100": {"*": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}},
        "imagenet": {"*": {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5}},
    }

    def __init__(self, temperature: float = 4.0, ce_weight: float = 0.1, kd_weight: float = 0.9) -> None:
        """Set the options.

        Args:
            temperature: softens the predictions of both networks.
            ce_weight: weight of the cross entropy.
            kd_weight: weight of the distillation term.
        """
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight

    def unused_options(self) -> dict[str, str]:
        """Return ``temperature`` if the distillation term has no weight."""
        return {} if self.kd_weight else {"temperature": "method.kd_weight=0 leaves out the softened predictions"}

    def row_loss(self, student_RC: Tensor, teacher_RC: Tensor, target_R: Tensor, progress: Progress) -> Tensor:
        """Return the weighted divergence of each row of logits, (R,)."""
        rows = soft_kl(student_RC, teacher_RC.detach(), temperature=self.temperature)
        return self.kd_weight * self.temperature**2 * rows

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the distillation term."""
        s, t = student.real.logits, teacher.real.logits
        return Losses(
            ce=Term(cross_entropy(s, batch.target), self.ce_weight, "task"),
            kd=Term(kd_loss(s, t, temperature=self.temperature), self.kd_weight),
        )
