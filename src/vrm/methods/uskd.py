"""USKD: self-distillation without a teacher. Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to
Self-Knowledge Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023 (arXiv
2303.13005).

    P = softmax(s);  y = label with value v = 1;  w = softmax(W f + b), the weak classifier of a middle feature f
    target    = -mean_b sg(v + P_y^2 - mean over the batch of P_y^2) * log P_y
    nontarget = -mean_b sum_{c != y} z_c * log softmax(s without y)_c
    weak      = CE(w, y) with label smoothing 0.1
    L         = ce_weight * CE(s, y) + alpha * target + beta * nontarget + mu * weak

``z`` are soft labels of the other classes by Zipf's law, ``1 / rank`` normalised to the sum 1. The rank counts all
classes, in the order of ``w_c / (1 - w_y + 1e-6) + P_c / (1 - P_y + 1e-6)``. In the released code (yzd-v/cls_KD) a
variable is overwritten, so that the logarithms of ``P`` take the place of ``P`` in this sum. That is the default here;
``rank_by=probability`` is as the paper describes it. The feature is the average over positions of the last stage but
one, as released for convolutional networks.

The mean over the batch makes the loss depend on which samples stand together. Each process takes its own.

The functions also take soft labels (mixup, CutMix). Then the two classes with the largest values are targets, as
released: ``target`` sums over both, without those whose value is 0; ``P_y`` and ``w_y`` in the ranking are sums over
both; and both are left out of ``nontarget``, which is 0 if no class is left.

``alpha``, ``beta`` and ``mu`` are those released for ResNet-18 on CIFAR-100, and for all networks on ImageNet.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, hide_classes, lift
from vrm.projectors import as_map, map_shape

# B batch, C classes, K target classes of a sample (1, or 2 of soft labels)

RankBy = Literal["log_probability", "probability"]


def target_classes(target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target classes of each sample and their values, (B, K) each.

    Of classes (B,) it is the class with the value 1, of soft labels (B, C) the two with the largest values.
    """
    if target.ndim == 1:
        return target[:, None], torch.ones_like(target)[:, None]
    value_BC, class_BC = target.sort(dim=1, descending=True, stable=True)
    return class_BC[:, :2], value_BC[:, :2]


def soft_target(student_BC: Tensor, class_BK: Tensor, value_BK: Tensor) -> Tensor:
    """Return the soft labels of the target classes, constants (B, K); 0 where their value is."""
    square_BK = F.softmax(lift(student_BC.detach()), dim=1).gather(1, class_BK) ** 2
    return (value_BK + square_BK - square_BK.mean(0)) * (value_BK != 0)


def target_loss(student_BC: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of the target classes against their soft labels, a scalar in nats.

    ``student`` are logits (B, C), ``target`` classes (B,) or soft labels (B, C).
    """
    class_BK, value_BK = target_classes(target)
    log_p_BK = F.log_softmax(lift(student_BC), dim=1).gather(1, class_BK)
    return -(soft_target(student_BC, class_BK, value_BK) * log_p_BK).sum(1).mean()


def zipf_labels(
    student_BC: Tensor, weak_BC: Tensor, class_BK: Tensor, *, rank_by: RankBy = "log_probability"
) -> Tensor:
    """Return soft labels of the classes that are no targets, constants (B, C): 1 / rank, normalised to the sum 1.

    They are 0 for the targets. ``student`` and ``weak`` are logits (B, C) of the network and of the weak classifier.
    """

    def score(share_BC: Tensor) -> Tensor:
        return share_BC / (1 - share_BC.gather(1, class_BK).sum(1, keepdim=True) + 1e-6)

    logarithm = rank_by == "log_probability"
    of_student_BC = (F.log_softmax if logarithm else F.softmax)(lift(student_BC.detach()), dim=1)
    score_BC = score(F.softmax(lift(weak_BC.detach()), dim=1)) + score(of_student_BC)
    order_BC = score_BC.argsort(dim=1, descending=True, stable=True)
    rank_C = torch.arange(1, score_BC.shape[1] + 1, dtype=score_BC.dtype, device=score_BC.device)
    label_BC = torch.zeros_like(score_BC).scatter(1, order_BC, (1 / rank_C).expand_as(score_BC))
    return F.normalize(label_BC.scatter(1, class_BK, 0.0), p=1, dim=1)


def nontarget_loss(
    student_BC: Tensor, weak_BC: Tensor, target: Tensor, *, rank_by: RankBy = "log_probability"
) -> Tensor:
    """Return the cross entropy among the classes that are no targets against their Zipf labels, a scalar in nats.

    ``student`` and ``weak`` are logits (B, C), ``target`` classes (B,) or soft labels (B, C).
    """
    class_BK, _ = target_classes(target)
    label_BC = zipf_labels(student_BC, weak_BC, class_BK, rank_by=rank_by)
    return F.cross_entropy(hide_classes(lift(student_BC), class_BK), label_BC)


def weak_loss(weak_BC: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of the weak classifier's logits (B, C) with label smoothing 0.1, a scalar in nats.

    ``target`` are classes (B,) or soft labels (B, C).
    """
    return F.cross_entropy(lift(weak_BC), target, label_smoothing=0.1)


def uskd_loss(
    student_BC: Tensor,
    weak_BC: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.1,
    beta: float = 0.1,
    mu: float = 0.1,
    rank_by: RankBy = "log_probability",
) -> Tensor:
    """Return the loss of self-distillation, a scalar in nats, without the cross entropy of the task.

    ``student`` and ``weak`` are logits (B, C) of the network and of the weak classifier, ``target`` classes (B,) or
    soft labels (B, C).
    """
    nontarget = nontarget_loss(student_BC, weak_BC, target, rank_by=rank_by)
    return alpha * target_loss(student_BC, target) + beta * nontarget + mu * weak_loss(weak_BC, target)


class USKD(Method):
    """Learn from soft labels that are made of the student's own predictions, without a teacher."""

    title = (
        "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and "
        "Customized Soft Labels"
    )
    venue = "ICCV"
    year = 2023
    family = "logit"
    published: ClassVar = {
        "cifar100": {"*": {"alpha": 0.1, "beta": 0.1, "mu": 0.1, "ce_weight": 1.0}},
        "imagenet": {"*": {"alpha": 1.0, "beta": 0.1, "mu": 0.005, "ce_weight": 1.0}},
    }

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 0.1,
        mu: float = 0.1,
        rank_by: RankBy = "log_probability",
        tap: str = "stages",
        ce_weight: float = 1.0,
    ) -> None:
        """Set the options.

        Args:
            alpha: weight of the term of the target class.
            beta: weight of the term of the other classes.
            mu: weight of the weak classifier's cross entropy.
            rank_by: what the final prediction adds to the ranks, its logarithms (as released) or itself (the paper).
            tap: what the weak classifier reads, averaged over positions; of ``stages`` the last but one.
            ce_weight: weight of the cross entropy.
        """
        super().__init__()
        if rank_by not in get_args(RankBy):
            raise ValueError(f"rank_by must be one of {', '.join(get_args(RankBy))}, got {rank_by!r}")
        self.alpha = alpha
        self.beta = beta
        self.mu = mu
        self.rank_by: RankBy = rank_by
        self.tap = tap
        self.ce_weight = ce_weight
        self.weak: nn.Module = nn.Identity()

    @property
    def needs(self) -> Needs:
        """One tap of the student, no teacher, and whole batches for the mean in the target's soft label."""
        return Needs(teacher=False, student_taps=(self.tap,), couples_samples=self.alpha != 0)

    def unused_options(self) -> dict[str, str]:
        """Return what only the ranks read, if they have no weight."""
        return {} if self.beta else {"rank_by": "method.beta=0 leaves out the ranks"}

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Choose the tap and create the weak classifier.

        Raise ``ValueError`` if the student lacks the tap, or has a single stage of which none is the last but one.
        """
        taps = student.resolve([self.tap])
        if self.tap.startswith("stages"):
            if len(taps) < 2:
                raise ValueError(
                    f"the weak classifier reads the last stage but one, but {student.name} has a single one; set tap "
                    "to the path of a module in its middle"
                )
            taps = taps[-2:-1]
        (self.tap,) = taps
        self.weak = nn.Linear(map_shape(student.shapes[self.tap])[0], data.num_classes)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and those of self-distillation."""
        s, target = student.real.logits, batch.target
        weak_BC = self.weak(as_map(student.real.taps[self.tap]).mean((2, 3)))
        return Losses(
            ce=Term(cross_entropy(s, target), self.ce_weight, "task"),
            target=Term(target_loss(s, target), self.alpha),
            nontarget=Term(nontarget_loss(s, weak_BC, target, rank_by=self.rank_by), self.beta),
            weak=Term(weak_loss(weak_BC, target), self.mu),
        )
