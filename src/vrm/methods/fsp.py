"""FSP: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation", CVPR 2017.

    M(f, g)[p, q] = mean over pixels of g_p * f_q     f, g neighbouring maps, the larger average-pooled to the smaller
    L_fsp         = sum over neighbours of mean over b, p, q of (M_student - M_teacher)^2

Training has two phases: ``pretrain_epochs`` with ``L_fsp`` alone at a constant learning rate, then cross entropy alone
with a fresh optimiser. The flow between stem and stages is compared entry by entry, so student and teacher need the
same channels everywhere; their sizes may differ. The maps of wide residual networks are signed. The paper sums over
entries and pools by maximum. This follows the released code (HobbitLong/RepDistiller), which produced the published
table: means, and average pooling before the product.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from vrm.contract import Batch, DataInfo, Losses, Method, Phase, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.projectors import as_map, map_shape, to_smaller

# B batch, C and D channels, H height, W width, P = HW pixels


def flow(bottom_BCHW: Tensor, top_BDHW: Tensor) -> Tensor:
    """Return the FSP matrix (B, D, C) of two maps: the mean over pixels of products of channels. Yim et al., eq. 1."""
    bottom_BCP, top_BDP = (x.flatten(2) for x in to_smaller(lift(bottom_BCHW), lift(top_BDHW)))
    return top_BDP @ bottom_BCP.mT / bottom_BCP.shape[2]


def fsp_loss(student_BDC: Tensor, teacher_BDC: Tensor) -> Tensor:
    """Return the mean squared difference of FSP matrices, a scalar."""
    return (student_BDC - teacher_BDC.detach()).pow(2).mean()


class FSP(Method):
    """Learn how maps flow into each other before learning the task."""

    title = "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning"
    venue = "CVPR"
    year = 2017
    family = "relation"
    published: ClassVar = {"cifar100": {"*": {"pretrain_epochs": 30}}}

    def __init__(
        self,
        pretrain_epochs: int = 30,
        student_taps: tuple[str, ...] = ("stem", "stages"),
        teacher_taps: tuple[str, ...] = ("stem", "stages"),
    ) -> None:
        """Set the options.

        Args:
            pretrain_epochs: number of epochs of pretraining, before the run's own.
            student_taps: taps of the student, paired with the teacher's by position; ``stages`` pair by scale.
            teacher_taps: taps of the teacher.
        """
        super().__init__()
        if pretrain_epochs < 1:
            raise ValueError(f"pretrain_epochs must be at least 1, got {pretrain_epochs}; without them use method=ce")
        self.pretrain_epochs = pretrain_epochs
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The flow first, then the task."""
        return (
            Phase("pretrain", self.pretrain_epochs, terms=("fsp",), schedule="constant"),
            Phase("main", terms=("ce",)),
        )

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Pair the maps. Raise ``ValueError`` if they are too few or their channels differ."""
        super().build(student, teacher, data)
        if len(self.matched) < 2:
            raise ValueError(
                f"FSP compares neighbouring maps and needs two at least, found {self.matched}; name more with "
                "student_taps and teacher_taps"
            )
        for a, b in self.matched:
            of_student, of_teacher = map_shape(student.shapes[a])[0], map_shape(teacher.shapes[b])[0]
            if of_student != of_teacher:
                raise ValueError(
                    f"FSP compares channels one by one, but {a} of {student.name} has {of_student} and {b} of "
                    f"{teacher.name} has {of_teacher}; choose networks of the same widths (resnet56/resnet20, "
                    "resnet32x4/resnet8x4, wrn_40_2/wrn_16_2, vgg13/vgg8, ...)"
                )

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the term of the phase."""
        s, t = student.real, teacher.real
        if progress.phase == "main":
            return Losses(ce=Term(cross_entropy(s.logits, batch.target), role="task"))
        pairs = [
            fsp_loss(
                flow(as_map(s.taps[bottom[0]]), as_map(s.taps[top[0]])),
                flow(as_map(t.taps[bottom[1]]), as_map(t.taps[top[1]])),
            )
            for bottom, top in pairwise(self.matched)
        ]
        return Losses(fsp=Term(torch.stack(pairs).sum()))
