"""CRLD: Zhang, Liu, Cai, Ma, "Cross-View Consistency Regularisation for Knowledge Distillation", ACM MM 2024.

Both networks see every image in a weak (real) view w and a strong (virtual) view v of it.

    k(a, b) = T^2 * KL(softmax(t_b / T) || softmax(s_a / T))            the student in view a, the teacher in view b
    m_b     = 1 if the teacher's largest probability in view b, at temperature 1, is at least tau_b, else 0
    within  = mean over samples of m_w * (k(w, w) + k(v, v))
    cross   = mean over samples of m_v * (k(v, w) + k(w, v))
    L       = ce_weight * (CE(s_w, y) + CE(s_v, y)) + within_weight * within + cross_weight * cross

The mean is over all samples, masked ones included: if all are masked, value and gradient are exactly 0. Labels play no
part in the masks, so a teacher that is confidently wrong is learned from. The student sees the two views in passes of
their own, so its batch norms never mix them.

The released code (arcaninez/CRLD) is followed: one mask for both divergences of a term, the teacher's in the weak view
for ``within`` and in the strong one for ``cross``. The paper can be read so that each divergence is masked by the view
of its own teacher; that is ``masks=teacher_view``, which gates k(a, b) by m_b. The strong view is the released one with
the views of the VRM paper (``data.views=cifar`` and ``imagenet``): TorchSSL's RandAugment of two operations, then
Cutout. On ImageNet the cross entropies count 2.

With twice the passes of both networks, a step takes about twice the time of KD's.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from torch import Tensor

from vrm.contract import Batch, Losses, Method, Needs, Progress, Term, Views
from vrm.divergences import check_temperature, cross_entropy, lift

Masks = Literal["term", "teacher_view"]

# B batch, C classes; 2 views, the weak and the strong one


def confident(teacher_BC: Tensor, *, threshold: float) -> Tensor:
    """Return 1 for each sample whose largest probability, at temperature 1, reaches ``threshold``, else 0, (B,)."""
    probability_BC = lift(teacher_BC).softmax(1)
    return (probability_BC.amax(1) >= threshold).to(probability_BC.dtype)


def divergences(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], *, temperature: float = 4.0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return ``k[a][b]``, (B,) each, of the student in view a and the teacher in view b, in nats times temperature^2.

    The logits (B, C) are given as (weak, strong).
    """
    log_p = [(lift(x) / temperature).log_softmax(1) for x in student]
    log_q = [(lift(x.detach()) / temperature).log_softmax(1) for x in teacher]
    q = [x.exp() for x in log_q]

    def k(a: int, b: int) -> Tensor:
        return temperature**2 * (q[b] * (log_q[b] - log_p[a])).sum(1)

    return (k(0, 0), k(0, 1)), (k(1, 0), k(1, 1))


def crld_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    temperature: float = 4.0,
    tau_weak: float = 0.9,
    tau_strong: float = 0.2,
    masks: Masks = "term",
) -> tuple[Tensor, Tensor]:
    """Return the within-view and the cross-view loss, two scalars in nats times temperature^2.

    Zhang et al., section 3; as released, or with ``masks="teacher_view"``.

    Args:
        student: the student's logits (B, C) in the weak (real) and the strong (virtual) view.
        teacher: the teacher's; no gradient reaches them.
        temperature: softens all four predictions, but not those that the masks are made of.
        tau_weak: the teacher's least confidence in the weak view, inclusive.
        tau_strong: the teacher's least confidence in the strong view, inclusive.
        masks: whether the confidence in the weak view masks both divergences of the first value, and that in the
            strong view those of the second (``term``); or each the divergences from its own view (``teacher_view``).

    Example:
        >>> within, cross = crld_loss((student(weak), student(strong)), (teacher(weak), teacher(strong)))
        >>> loss = cross_entropy(student_weak, target) + cross_entropy(student_strong, target) + 2 * within + cross / 2
    """
    (ww, ws), (sw, ss) = divergences(student, teacher, temperature=temperature)
    weak_B = confident(teacher[0].detach(), threshold=tau_weak)
    strong_B = confident(teacher[1].detach(), threshold=tau_strong)
    if masks == "term":
        return (weak_B * (ww + ss)).mean(), (strong_B * (sw + ws)).mean()
    return (weak_B * ww + strong_B * ss).mean(), (weak_B * sw + strong_B * ws).mean()


class CRLD(Method):
    """Agree with a confident teacher within each of two views, and across them."""

    title = "Cross-View Consistency Regularisation for Knowledge Distillation"
    venue = "ACM MM"
    year = 2024
    family = "logit"
    published: ClassVar = {
        "cifar100": {
            "*": {
                "temperature": 4.0,
                "tau_weak": 0.9,
                "tau_strong": 0.2,
                "ce_weight": 1.0,
                "within_weight": 2.0,
                "cross_weight": 0.5,
            }
        },
        "tinyimagenet": {
            "resnet32x4/resnet8x4": {"temperature": 2.0, "within_weight": 4.0, "cross_weight": 1.0},
        },
        "imagenet": {"*": {"temperature": 1.0, "ce_weight": 2.0}},
    }

    def __init__(
        self,
        temperature: float = 4.0,
        tau_weak: float = 0.9,
        tau_strong: float = 0.2,
        masks: Masks = "term",
        ce_weight: float = 1.0,
        within_weight: float = 2.0,
        cross_weight: float = 0.5,
    ) -> None:
        """Set the options.

        Args:
            temperature: softens the predictions of both networks.
            tau_weak: the teacher's least confidence in the weak (real) view, from 0 to 1, inclusive.
            tau_strong: the teacher's least confidence in the strong (virtual) view, from 0 to 1, inclusive.
            masks: one mask for each term (``term``), or one for each view of the teacher (``teacher_view``).
            ce_weight: weight of the cross entropy in each of the two views.
            within_weight: weight of the term within views.
            cross_weight: weight of the term across views.
        """
        super().__init__()
        check_temperature(temperature)
        for name, value in (("tau_weak", tau_weak), ("tau_strong", tau_strong)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 (no mask) to 1, as a probability is; got {value}")
        if masks not in get_args(Masks):
            raise ValueError(f"masks must be one of {', '.join(get_args(Masks))}; got {masks!r}")
        self.temperature = temperature
        self.tau_weak = tau_weak
        self.tau_strong = tau_strong
        self.masks: Masks = masks
        self.ce_weight = ce_weight
        self.within_weight = within_weight
        self.cross_weight = cross_weight

    @property
    def needs(self) -> Needs:
        """Logits in the real view and in one virtual view."""
        return Needs(virtual_views=1)

    def unused_options(self) -> dict[str, str]:
        """Return what only the two divergence terms read, where they are left out."""
        if self.within_weight == self.cross_weight == 0:
            reason = "method.within_weight=0 and method.cross_weight=0 leave out the divergences"
            return dict.fromkeys(("temperature", "tau_weak", "tau_strong", "masks"), reason)
        if self.masks == "term":
            if self.within_weight == 0:
                return {"tau_weak": "method.within_weight=0 leaves out the term that it masks"}
            if self.cross_weight == 0:
                return {"tau_strong": "method.cross_weight=0 leaves out the term that it masks"}
        return {}

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the cross entropies of both views and the two masked terms."""
        weak, strong = (view.logits for view in student.each())
        teacher_weak, teacher_strong = (view.logits for view in teacher.each())
        within, cross = crld_loss(
            (weak, strong),
            (teacher_weak, teacher_strong),
            temperature=self.temperature,
            tau_weak=self.tau_weak,
            tau_strong=self.tau_strong,
            masks=self.masks,
        )
        return Losses(
            ce_real=Term(cross_entropy(weak, batch.target), self.ce_weight, "task"),
            ce_virtual=Term(cross_entropy(strong, batch.target), self.ce_weight, "task"),
            within=Term(within, self.within_weight),
            cross=Term(cross, self.cross_weight),
        )
