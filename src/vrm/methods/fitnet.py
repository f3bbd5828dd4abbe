"""FitNets: Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015.

    r = relu(bn(conv(s)))                    a learned regressor from the student's map to the teacher's
    L = ce_weight * CE + feature_weight * mean over all elements of (r - t)^2

at the second stage. The convolution (with bias) is chosen by the sizes of the maps: 3x3 of stride 2 to halve,
transposed 4x4 of stride 2 to double, otherwise an unpadded kernel just large enough to get from one size to the other,
1x1 if they are equal. This is the joint form of the released codes (HobbitLong/RepDistiller,
megvii-research/mdistiller), which is the one in every published table. They choose by height alone, and fail with a
``TypeError`` if no convolution fits; here the width counts too, and the run is refused with the reason.

The paper's own form is ``two_stage=true``: first the layers up to the hint learn from the hint alone, through a
regressor without batch norm and with half the squared error, then the whole student learns from

    L = CE + lambda * KL(softmax(t / T) || softmax(s / T)),    lambda falling linearly from kd_weight to 1,

with lambda from 4 and T = 3 in the paper. (The paper sums the hint over elements and uses RMSprop; here it is the mean,
times ``feature_weight``, under the run's optimiser.)

The regressor ends in a ReLU, so it cannot reach the negative values of signed targets (wide residual networks,
MobileNetV2), as in the released codes. The bias before the batch norm has zero gradient.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Phase, Probe, Progress, Term, Views
from vrm.divergences import check_temperature, cross_entropy, lift, soft_kl
from vrm.pairing import match_stages
from vrm.projectors import ConvRegressor, as_map, map_shape

# B batch, C channels, H height, W width


def fitnet_loss(regressed_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    """Return the mean squared error between the regressed student map and the teacher's, a scalar."""
    return (lift(regressed_BCHW) - lift(teacher_BCHW.detach())).pow(2).mean()


class FitNet(Method):
    """Learn from a hint in the middle of the teacher."""

    title = "FitNets: Hints for Thin Deep Nets"
    venue = "ICLR"
    year = 2015
    family = "feature"
    published: ClassVar = {"cifar100": {"*": {"student_tap": "stage2", "ce_weight": 1.0, "feature_weight": 100.0}}}

    def __init__(
        self,
        student_tap: str = "stage2",
        teacher_tap: str | None = None,
        ce_weight: float = 1.0,
        feature_weight: float = 100.0,
        two_stage: bool = False,
        hint_epochs: int = 30,
        kd_weight: float = 4.0,
        temperature: float = 3.0,
    ) -> None:
        """Set the options.

        Args:
            student_tap: the map of the student that is regressed.
            teacher_tap: the hint; by default the teacher's stage that pairs with the student's.
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the hint.
            two_stage: train the hint first and then distil, as in the paper.
            hint_epochs: with ``two_stage``, number of epochs of the hint, before the run's own.
            kd_weight: with ``two_stage``, weight of the distillation in its first epoch; it falls to 1.
            temperature: with ``two_stage``, softens the predictions of both networks.
        """
        super().__init__()
        check_temperature(temperature)
        if hint_epochs < 1:
            raise ValueError(f"hint_epochs must be at least 1, got {hint_epochs}")
        self.student_tap = student_tap
        self.teacher_tap = teacher_tap
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight
        self.two_stage = two_stage
        self.hint_epochs = hint_epochs
        self.kd_weight = kd_weight
        self.temperature = temperature
        self.regressor: nn.Module = nn.Identity()

    @property
    def needs(self) -> Needs:
        """One map of each network."""
        teacher_tap = self.matched[0][1] if self.matched else self.teacher_tap or "stages"
        return Needs(student_taps=(self.student_tap,), teacher_taps=(teacher_tap,))

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One phase, or with ``two_stage`` the hint first."""
        if not self.two_stage:
            return (Phase(),)
        return (Phase("hint", self.hint_epochs, terms=("hint",), schedule="constant"), Phase(terms=("ce", "kd")))

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Find the hint and create the regressor.

        Raise ``ValueError`` if no stage pairs with the student's, or if no convolution reaches the teacher's size.
        """
        student.resolve([self.student_tap])
        hint = self.teacher_tap
        if hint is None:
            stages = dict(match_stages(student, teacher))
            if self.student_tap not in stages:
                raise ValueError(
                    f"no stage of {teacher.name} matches {self.student_tap!r} of {student.name}; set teacher_tap, or "
                    f"student_tap to one of {', '.join(stages)}"
                )
            hint = stages[self.student_tap]
        teacher.resolve([hint])
        self.matched = ((self.student_tap, hint),)
        shapes = map_shape(student.shapes[self.student_tap]), map_shape(teacher.shapes[hint])
        self.regressor = ConvRegressor(*shapes, norm=not self.two_stage, relu=True)

    def hint_loss(self, student: Views, teacher: Views) -> Tensor:
        """Return the error of the hint, a scalar; half of it with ``two_stage``, as in the paper."""
        ((a, b),) = self.matched
        loss = fitnet_loss(self.regressor(as_map(student.real.taps[a])), as_map(teacher.real.taps[b]))
        return loss / 2 if self.two_stage else loss

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the terms of the phase: the hint, or the task with the hint (``two_stage``: with distillation)."""
        s, t = student.real.logits, teacher.real.logits
        if progress.phase == "hint":
            return Losses(hint=Term(self.hint_loss(student, teacher), self.feature_weight))
        losses = Losses(ce=Term(cross_entropy(s, batch.target), self.ce_weight, "task"))
        if self.two_stage:
            elapsed = (progress.epoch - 1) / max(progress.num_epochs - 1, 1)
            weight = self.kd_weight + (1 - self.kd_weight) * elapsed
            losses["kd"] = Term(soft_kl(s, t.detach(), temperature=self.temperature).mean(), weight)
        else:
            losses["hint"] = Term(self.hint_loss(student, teacher), self.feature_weight)
        return losses
