"""AB: Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries", AAAI 2019.

    l(s, t) = (s + margin)^2 if t <= 0 and s > -margin;  (s - margin)^2 if t > 0 and s <= margin;  else 0
    L_ab    = sum over stages i of 2^(i-n+1) * 3/1000 / B * sum over b, c, h, w of l(connector(s), t)

where s and t are the pre-activations of the stages, from the shallow (i = 0) to the deep (n - 1). Training has two
phases: ``pretrain_epochs`` with ``L_ab`` alone at a constant learning rate, then cross entropy alone with a fresh
optimiser, in which the connectors are not used.

This follows the released code of HobbitLong/RepDistiller, which produced the published table: its weights, and its
connectors (none where channels and sizes agree, otherwise the convolution of FitNets and batch norm). The authors' own
code connects by 1x1 convolutions without bias, and only where widths differ; keeps its teacher in train mode during
pretraining; and can continue with KD. RepDistiller's pretraining leaves the last batch norm of wide residual networks
untrained in evaluation mode, and evaluates batch norms twice a step. These bugs are not reproduced; the whole student
trains, as in the authors' code. Networks whose stages end without a ReLU (MobileNetV2) have signed outputs, which
replace the pre-activations as in the published numbers: ``student_taps=[stages]``, set for its pairs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vrm.contract import Batch, DataInfo, Losses, Method, Phase, Probe, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.projectors import ConvRegressor, as_map, map_shape

# B batch, C channels (of the teacher), H height, W width

SCALE = 3 / 1000
"""As released."""


def ab_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, *, margin: float = 1.0) -> Tensor:
    """Return the squared hinge on the teacher's side of the boundary, summed, times ``SCALE / B``, a scalar.

    Heo et al., eq. 5. A teacher's activation of exactly zero counts as inactive.
    """
    student_BCHW = lift(student_BCHW)
    off_BCHW = (student_BCHW + margin).relu().pow(2)
    on_BCHW = (margin - student_BCHW).relu().pow(2)
    return SCALE * torch.where(teacher_BCHW > 0, on_BCHW, off_BCHW).sum() / student_BCHW.shape[0]


def connector(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> nn.Module:
    """Return the identity if the shapes (C, H, W) agree, otherwise the regressor of FitNets without its ReLU."""
    return nn.Identity() if student == teacher else ConvRegressor(student, teacher, relu=False)


class AB(Method):
    """Learn which neurons fire before learning the task."""

    title = "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons"
    venue = "AAAI"
    year = 2019
    family = "feature"
    published: ClassVar = {
        "cifar100": {
            "*": {"margin": 1.0, "pretrain_epochs": 30},
            "vgg13/mobilenetv2": {"student_taps": ("stages",)},
            "resnet50/mobilenetv2": {"student_taps": ("stages",)},
        }
    }

    def __init__(
        self,
        margin: float = 1.0,
        pretrain_epochs: int = 30,
        student_taps: tuple[str, ...] = ("stages:pre",),
        teacher_taps: tuple[str, ...] = ("stages:pre",),
    ) -> None:
        """Set the options.

        Args:
            margin: margin of the hinge on both sides of zero.
            pretrain_epochs: number of epochs of pretraining, before the run's own.
            student_taps: taps of the student, paired with the teacher's by position; ``stages:pre`` pair by scale.
            teacher_taps: taps of the teacher.
        """
        super().__init__()
        if margin < 0:
            raise ValueError(f"margin must not be negative, got {margin}")
        if pretrain_epochs < 1:
            raise ValueError(f"pretrain_epochs must be at least 1, got {pretrain_epochs}; without them use method=ce")
        self.margin = margin
        self.pretrain_epochs = pretrain_epochs
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)
        self.connectors = nn.ModuleList()

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The boundaries first, then the task."""
        return (
            Phase("pretrain", self.pretrain_epochs, terms=("ab",), schedule="constant"),
            Phase("main", trained=("student",), terms=("ce",)),
        )

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Pair the stages and create a connector for each pair. Raise ``ValueError`` if a size cannot be reached."""
        super().build(student, teacher, data)
        shapes = [(map_shape(student.shapes[a]), map_shape(teacher.shapes[b])) for a, b in self.matched]
        self.connectors = nn.ModuleList(connector(s, t) for s, t in shapes)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the term of the phase."""
        s, t = student.real, teacher.real
        if progress.phase == "main":
            return Losses(ce=Term(cross_entropy(s.logits, batch.target), role="task"))
        stages = [
            2.0 ** (i + 1 - len(self.matched))
            * ab_loss(connect(as_map(s.taps[a])), as_map(t.taps[b]), margin=self.margin)
            for i, ((a, b), connect) in enumerate(zip(self.matched, self.connectors, strict=True))
        ]
        return Losses(ab=Term(torch.stack(stages).sum()))
