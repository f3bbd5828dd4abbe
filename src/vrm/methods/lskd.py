"""LSKD: Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024 (arXiv 2403.01427).

    Z(z) = (z - mean_c z) / (eps + std_c z)          for each sample, of student and teacher
    L    = ce_weight * CE(s, y) + weight * base(Z(s), Z(t), y)

Each network's logits are standardised before another method, the base, compares them; the cross entropy stays on the
plain logits. With ``base=kd`` that is T^2 * KL(softmax(Z(t) / T) || softmax(Z(s) / T)). The base keeps its own options,
``method.base_options.temperature=3``, its ramp and its weight of the cross entropy; any method whose distillation is a
mean over rows of logits can be one.

The gradient passes through the student's mean and deviation. The paper divides by the deviation of all C logits, the
released code (sunshangquan/logit-standardization-KD) by that of a sample (divisor C - 1), which is the default here;
``std=population`` is the paper's. ``eps`` is added to the deviation: a constant row becomes 0 rather than NaN, and its
gradient is of the size 1 / eps, so a student whose classifier starts at zero needs a larger one, such as 1e-3. With two
classes the standardised logits are the same for all predictions, and there is nothing to learn.

The published settings are those in the names of the released logs; the released DKD launcher multiplies alpha and beta
by ``weight``.

The numbers in the VRM paper's Tables 12 and 13 are those of ``base=kd``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Needs, Progress, Term, Views
from vrm.divergences import cross_entropy, lift
from vrm.methods._base import build_base
from vrm.methods.kd import kd_loss

Deviation = Literal["sample", "population"]

SUITED: Mapping[str, Mapping[str, Any]] = {"kd": {"temperature": 2.0, "kd_weight": 1.0}, "dkd": {"temperature": 2.0}}
"""The options of a base that differ here from its own defaults: the released temperature, and no second weight."""


def standardise(logits_BC: Tensor, *, std: Deviation = "sample", eps: float = 1e-7) -> Tensor:
    """Return logits (B, C) with mean 0 and standard deviation 1 in each row. Sun et al., eq. 11."""
    logits_BC = lift(logits_BC)
    deviation_B1, mean_B1 = torch.std_mean(logits_BC, 1, correction=int(std == "sample"), keepdim=True)
    return (logits_BC - mean_B1) / (eps + deviation_B1)


def lskd_loss(
    student_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 2.0, std: Deviation = "sample", eps: float = 1e-7
) -> Tensor:
    """Return the KD loss of standardised logits (B, C), a scalar in nats times ``temperature**2``."""
    student_BC, teacher_BC = (standardise(x, std=std, eps=eps) for x in (student_BC, teacher_BC.detach()))
    return kd_loss(student_BC, teacher_BC, temperature=temperature)


def _kd(temperature: float, weight: float) -> dict[str, Any]:
    return {"base_options": {"temperature": temperature}, "weight": weight}


def _dkd(temperature: float, weight: float, beta: float) -> dict[str, Any]:
    return {"base_options": {"temperature": temperature, "beta": beta}, "weight": weight}


class LSKD(Method):
    """Standardise the logits of both networks before another method compares them."""

    title = "Logit Standardization in Knowledge Distillation"
    venue = "CVPR"
    year = 2024
    family = "logit"
    published: ClassVar = {
        "cifar100": {
            "base=kd": {
                "*": _kd(2.0, 9.0),
                "vgg13/vgg8": _kd(3.0, 9.0),
                "resnet110/resnet20": _kd(4.0, 12.0),
                "resnet32x4/wrn_16_2": _kd(3.0, 9.0),
                "resnet32x4/wrn_40_2": _kd(3.0, 9.0),
                "wrn_40_2/mobilenetv2": _kd(3.0, 9.0),
                "vgg13/mobilenetv2": _kd(3.0, 9.0),
                "resnet50/mobilenetv2": _kd(3.0, 1.0),
            },
            "base=dkd": {
                "resnet32x4/resnet8x4": _dkd(2.0, 9.0, 8.0),
                "vgg13/vgg8": _dkd(2.0, 15.0, 2.0),
                "wrn_40_2/wrn_40_1": _dkd(2.0, 12.0, 2.0),
                "wrn_40_2/wrn_16_2": _dkd(2.0, 12.0, 2.0),
                "resnet56/resnet20": _dkd(3.0, 18.0, 2.0),
                "resnet110/resnet32": _dkd(2.0, 15.0, 2.0),
                "resnet110/resnet20": _dkd(2.0, 15.0, 2.0),
            },
        },
        "imagenet": {"base=kd": {"*": {"base_options": {"temperature": 2.0, "ce_weight": 1.0}, "weight": 9.0}}},
    }

    def __init__(
        self,
        base: str = "kd",
        base_options: dict[str, Any] = {},  # noqa: B006
        weight: float = 9.0,
        std: Deviation = "sample",
        eps: float = 1e-7,
    ) -> None:
        """Set the options.

        Args:
            base: the method that compares the standardised logits.
            base_options: options of the base. Where they are not given, KD and DKD have temperature 2, and KD has
                ``kd_weight`` 1.
            weight: factor on the base's distillation terms.
            std: deviation by which logits are divided, ``sample`` (divisor C - 1) or ``population`` (divisor C).
            eps: added to the deviation, above 0.
        """
        super().__init__()
        if std not in get_args(Deviation):
            raise ValueError(f"std must be one of {', '.join(get_args(Deviation))}; got {std!r}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, so that a row of equal logits can be divided by it; got {eps}")
        self.base = build_base(base, {**SUITED.get(base, {}), **base_options})
        self.weight = weight
        self.std: Deviation = std
        self.eps = eps

    @property
    def needs(self) -> Needs:
        """At least three classes: two standardised logits are the same whatever the prediction."""
        return Needs(min_classes=3)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term on plain logits, and the base's loss of standardised ones."""
        s, t = (standardise(x.real.logits, std=self.std, eps=self.eps) for x in (student, teacher))
        return Losses(
            ce=Term(cross_entropy(student.real.logits, batch.target), self.base.ce_weight, "task"),
            distill=Term(self.base.row_loss(s, t, batch.target, progress).mean(), self.weight),
        )
