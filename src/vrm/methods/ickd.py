"""ICKD: Liu et al., "Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation", ICCV 2021.

    e      = bn(conv1x1(s))                 Cs -> Ct channels, no bias; also where Cs = Ct
    G(f)   = f f^T                          for each sample, (Ct, Ct), of the map as a matrix (Ct, H * W)
    G_i    = G_i / max(|G_i|, 1e-12)        each row
    L_ickd = mean over samples of 1/Ct * sum over i, j of (G(e)_ij - G(t)_ij)^2
    L      = ce_weight * CE + feature_weight * L_ickd + kd_weight * T^2 * KL(softmax(t / T) || softmax(s / T))

on the map of the last stage: which channels of an image fire together, wherever they do. This is ICKD-C, the form for
images; that for segmentation (ICKD-S) was not released. Maps of different sizes can be compared as they are. The
adapter is trained with the student and belongs to the method, so an exported student has none.

The released code for CIFAR-100 (ADLab-AutoDrive/ICKD) is followed. The paper compares the correlations as they are and
divides by Ct^2 (``normalisation=none division=channels_squared``; its weight is of another size, as the sums over
pixels are not divided). The released code for ImageNet has a 3x3 convolution and divides by the batch once more
(``kernel_size=3 division=batch``), so its weight 500 is 500 / B in the units of CIFAR-100. The code also creates a
second adapter, for the teacher, which no gradient reaches; there is none here.

The authors publish two versions, without the softened predictions (``kd_weight=0``, "w/o KL") and with them
(``kd_weight=1``, T = 4). The numbers in the VRM paper's Table 12 are those without, the default.

A channel of the teacher that is zero everywhere has a row of zeros; the student's row still has length 1 and adds 1 to
the sum, without a gradient.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Probe, Progress, Term, Views
from vrm.divergences import check_temperature, cross_entropy, lift, soft_kl
from vrm.projectors import as_map, map_shape

Normalisation = Literal["rows", "none"]
Division = Literal["channels", "channels_squared", "batch"]

# B batch, C channels (of the teacher), H height, W width, P pixels


def row_products(a_BCP: Tensor, b_BCP: Tensor) -> Tensor:
    """Return the inner product of each row of ``a a^T`` with that of ``b b^T``, (B, C), of matrices (C, pixels).

    The products are taken in the order that is cheaper, so nothing of size C x C is made of fewer pixels than channels.
    """
    channels, pixels = a_BCP.shape[1:]
    product_BCP = a_BCP @ (a_BCP.mT @ b_BCP) if pixels < channels else (a_BCP @ a_BCP.mT) @ b_BCP
    return (product_BCP * b_BCP).sum(2)


def ickd_loss(
    adapted_BCHW: Tensor,
    teacher_BCHW: Tensor,
    *,
    normalisation: Normalisation = "rows",
    division: Division = "channels",
) -> Tensor:
    """Return the squared difference of channel correlations, a scalar without unit.

    It is summed over pairs of channels, averaged over the batch and divided by the number of ``channels``, by its
    square, or by channels and ``batch`` size. The correlations themselves are never formed: the squared difference of
    two rows follows from their inner products, exact to rounding of their lengths. The maps may differ in height and
    width; raise ``ValueError`` if they differ in channels.
    """
    if adapted_BCHW.shape[1] != teacher_BCHW.shape[1]:
        raise ValueError(
            f"ICKD compares correlations of equally many channels, got {adapted_BCHW.shape[1]} and "
            f"{teacher_BCHW.shape[1]}; adapt the student's map to the teacher's channels"
        )
    a_BCP, b_BCP = lift(adapted_BCHW).flatten(2), lift(teacher_BCHW.detach()).flatten(2)
    aa_BC, bb_BC, ab_BC = row_products(a_BCP, a_BCP), row_products(b_BCP, b_BCP), row_products(a_BCP, b_BCP)
    if normalisation == "rows":
        a2_BC, b2_BC = aa_BC.clamp(min=1e-24), bb_BC.clamp(min=1e-24)  # the squares of norms of at least 1e-12
        aa_BC, bb_BC, ab_BC = aa_BC / a2_BC, bb_BC / b2_BC, ab_BC * a2_BC.rsqrt() * b2_BC.rsqrt()
    batch, channels = ab_BC.shape
    divisor = channels * {"channels": 1, "channels_squared": channels, "batch": batch}[division]
    return (aa_BC + bb_BC - 2 * ab_BC).sum() / (batch * divisor)


def adapter(inputs: int, outputs: int, *, kernel_size: int = 1) -> nn.Sequential:
    """Return a convolution without bias that keeps the size of a map, and a batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ICKD(Method):
    """Match which channels of a map fire together."""

    title = "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation"
    venue = "ICCV"
    year = 2021
    family = "relation"
    published: ClassVar = {
        "cifar100": {"*": {"kernel_size": 1, "ce_weight": 1.0, "feature_weight": 2.5, "kd_weight": 0.0}},
        "imagenet": {
            "*": {
                "kernel_size": 3,
                "division": "batch",
                "ce_weight": 0.5,
                "feature_weight": 500.0,
                "kd_weight": 0.5,
                "temperature": 1.0,
            }
        },
    }

    def __init__(
        self,
        kernel_size: int = 1,
        normalisation: Normalisation = "rows",
        division: Division = "channels",
        ce_weight: float = 1.0,
        feature_weight: float = 2.5,
        kd_weight: float = 0.0,
        temperature: float = 4.0,
        student_taps: tuple[str, ...] = ("last",),
        teacher_taps: tuple[str, ...] = ("last",),
    ) -> None:
        """Set the options.

        Args:
            kernel_size: size of the adapter's convolution, odd: 1 for CIFAR-100, 3 for ImageNet.
            normalisation: scale each row of the correlations to unit norm (``rows``), or leave them (``none``).
            division: what the sum over pairs of channels is divided by, beside the batch: the number of ``channels``,
                its square (``channels_squared``, as in the paper), or the channels and the ``batch`` once more, as in
                the released code for ImageNet.
            ce_weight: weight of the cross entropy.
            feature_weight: weight of the correlations.
            kd_weight: weight of the softened predictions, 1 in the published form "with KD".
            temperature: softens the predictions of both networks.
            student_taps: taps of the student, paired with the teacher's by position; ``stages`` pair by scale.
            teacher_taps: taps of the teacher.
        """
        super().__init__()
        check_temperature(temperature)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd and positive, so that it keeps the size of a map; got {kernel_size}"
            )
        for name, value, kind in (("normalisation", normalisation, Normalisation), ("division", division, Division)):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {value!r}")
        self.kernel_size = kernel_size
        self.normalisation: Normalisation = normalisation
        self.division: Division = division
        self.ce_weight = ce_weight
        self.feature_weight = feature_weight
        self.kd_weight = kd_weight
        self.temperature = temperature
        self.student_taps = tuple(student_taps)
        self.teacher_taps = tuple(teacher_taps)
        self.adapters = nn.ModuleList()

    @property
    def needs(self) -> Needs:
        """The taps of both networks, and batches kept whole if the loss is divided by their size."""
        coupled = self.division == "batch"
        return Needs(student_taps=self.student_taps, teacher_taps=self.teacher_taps, couples_samples=coupled)

    def unused_options(self) -> dict[str, str]:
        """Return ``temperature`` if the softened predictions have no weight."""
        return {} if self.kd_weight else {"temperature": "method.kd_weight=0 leaves out the softened predictions"}

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Pair the taps and create an adapter for each pair."""
        super().build(student, teacher, data)
        shapes = [(map_shape(student.shapes[a]), map_shape(teacher.shapes[b])) for a, b in self.matched]
        self.adapters = nn.ModuleList(adapter(s[0], t[0], kernel_size=self.kernel_size) for s, t in shapes)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term, the correlations of all pairs, and the softened predictions if they have weight."""
        s, t = student.real, teacher.real
        pairs = [
            ickd_loss(
                adapt(as_map(s.taps[a])),
                as_map(t.taps[b]),
                normalisation=self.normalisation,
                division=self.division,
            )
            for (a, b), adapt in zip(self.matched, self.adapters, strict=True)
        ]
        losses = Losses(
            ce=Term(cross_entropy(s.logits, batch.target), self.ce_weight, "task"),
            ickd=Term(torch.stack(pairs).sum(), self.feature_weight),
        )
        if self.kd_weight:
            kl_B = soft_kl(s.logits, t.logits.detach(), temperature=self.temperature)
            losses["kd"] = Term(self.temperature**2 * kl_B.mean(), self.kd_weight)
        return losses
