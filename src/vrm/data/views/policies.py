"""View policies: which random steps make the real view and the virtual views of an image.

A :class:`ViewPolicy` makes the real view and any number of virtual views of a batch. Every random choice is drawn with
:mod:`vrm.randomness` from the sample's own index: no pixel depends on the batch that a sample is in, on the number of
views, or on the device, and a teacher's outputs can be cached. Images go in and come out as uint8; each network
normalises them itself.

>>> policy = view_policy("cifar")
>>> real, virtual = policy(images, index, epoch=1, seed=0, num_virtual=1)

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vrm.compilation import compile_options
from vrm.data.views.transforms import (
    CentralCrop,
    Cutout,
    Draws,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomFlip,
    RandomResizedCrop,
    TimmRandAugment,
    Transform,
    apply_to_floats,
)
from vrm.wording import nearest


@dataclass(frozen=True)
class ViewPolicy:
    """The random steps of the real view and of every virtual view, and how evaluation crops the same images.

    Raise ``ValueError`` if the views begin with resized crops to another size than evaluation's.
    """

    name: str
    real: tuple[Transform, ...]
    virtual: tuple[Transform, ...]
    evaluation: CentralCrop | None = None
    """What evaluation sees of an image; ``None``: all of it, at its own size."""

    def __post_init__(self) -> None:
        trained = sorted({crop.size for crop in self.crops or ()})
        evaluated = [] if self.evaluation is None else [self.evaluation.size]
        if trained != evaluated:
            raise ValueError(
                f"the views {self.name!r} are trained on at the sizes {trained or 'of the images'} and evaluated at "
                f"{evaluated or 'that of the images'}; give both one size, with evaluation=CentralCrop(size)"
            )

    def __call__(
        self, images: Tensor | Sequence[Tensor], index: Tensor, *, epoch: int | Tensor, seed: int, num_virtual: int
    ) -> tuple[Tensor, ...]:
        """Make the real view, then ``num_virtual`` virtual views, (B, C, h, w) each, of the type of the images.

        Args:
            images: uint8 (B, C, H, W), or float32 (:func:`~vrm.data.views.transforms.apply_to_floats`), on any
                device; or one such tensor for each view, already cropped as the view begins (:attr:`crops`), a step
                that is then left out.
            index: integer (B,), the indices of these samples in the data set, on the same device.
            epoch: an integer, or an integer scalar on the device.
            seed: the run's ``data.seed``.
            num_virtual: how many virtual views.
        """
        cropped = not isinstance(images, Tensor)
        given = (images,) * (1 + num_virtual) if isinstance(images, Tensor) else tuple(images)
        if len(given) != 1 + num_virtual:
            raise ValueError(f"{1 + num_virtual} views need as many tensors of cropped images, got {len(given)}")
        if cropped and self.crops is None:
            raise ValueError(
                f"the views {self.name!r} do not begin with a resized crop; give one tensor of whole images"
            )
        steps = [(self.virtual if view else self.real)[int(cropped) :] for view in range(1 + num_virtual)]
        draws = Draws.for_views(index, epoch=epoch, seed=seed, steps=steps)
        views = []
        for made, transforms, drawn in zip(given, steps, draws, strict=True):
            if made.dtype not in (torch.uint8, torch.float32) or made.dim() != 4:
                raise ValueError(
                    f"views are made of uint8 or float32 images (B, C, H, W), got {made.dtype} {tuple(made.shape)}"
                )
            if index.shape != made.shape[:1]:
                raise ValueError(f"one index for each of the {len(made)} images is needed, got {tuple(index.shape)}")
            for transform in transforms:
                made = transform(made, drawn) if made.dtype == torch.uint8 else apply_to_floats(transform, made, drawn)
            views.append(made)
        return tuple(views)

    @property
    def crops(self) -> tuple[RandomResizedCrop, RandomResizedCrop] | None:
        """The resized crops with which the real view and the virtual views begin, or ``None`` if not both do.

        Whatever decodes images can make these crops itself, from :meth:`Draws.for_view` and the size of the file.
        """
        real, virtual = (steps[0] if steps else None for steps in (self.real, self.virtual))
        if isinstance(real, RandomResizedCrop) and isinstance(virtual, RandomResizedCrop):
            return real, virtual
        return None

    def describe(self) -> dict[str, Any]:
        """Return everything but seed, epoch, sample and view that decides the pixels, in the types of JSON."""
        steps = {
            kind: [{"transform": type(step).__name__, **asdict(step)} for step in transforms]  # type: ignore[call-overload]
            for kind, transforms in (("real", self.real), ("virtual", self.virtual))
        }
        description: dict[str, Any] = json.loads(json.dumps({"name": self.name, **steps}))
        return description


CHECKED_EPOCHS = 32
"""Epochs for which compiled views are compared with those of the policy itself."""


class CompiledViews:
    """A policy compiled by ``torch.compile``, which makes the same bytes with a tenth of the kernels.

    Views of float images are left to the policy.

    The first call for each shape of batch makes the views of :data:`CHECKED_EPOCHS` epochs both ways, and raises
    ``RuntimeError`` if a byte differs. Nothing is compiled before it.
    """

    def __init__(self, policy: ViewPolicy) -> None:
        self.policy = policy
        self.compiled = torch.compile(policy.__call__, fullgraph=True, dynamic=False, options=compile_options())
        self.checked: set[tuple[Any, ...]] = set()

    def __call__(
        self, images: Tensor | Sequence[Tensor], index: Tensor, *, epoch: Tensor, seed: int, num_virtual: int
    ) -> tuple[Tensor, ...]:
        """Make the views as :meth:`ViewPolicy.__call__` does; ``epoch`` is a tensor on the device."""
        given = (images,) if isinstance(images, Tensor) else tuple(images)
        if given[0].dtype != torch.uint8:  # compiled arithmetic may round floats otherwise
            return self.policy(images, index, epoch=epoch, seed=seed, num_virtual=num_virtual)
        kind = (num_virtual, len(given), *(tuple(image.shape) for image in given))
        if kind not in self.checked:
            self._check(images, index, epoch=epoch, seed=seed, num_virtual=num_virtual)
            self.checked.add(kind)
        views: tuple[Tensor, ...] = self.compiled(images, index, epoch=epoch, seed=seed, num_virtual=num_virtual)
        return views

    def _check(self, images: Tensor | Sequence[Tensor], index: Tensor, *, epoch: Tensor, **how: int) -> None:
        differing = torch.zeros((), dtype=torch.int64, device=index.device)
        for number in range(CHECKED_EPOCHS):
            both = (make(images, index, epoch=epoch + number, **how) for make in (self.policy, self.compiled))
            for view, compiled in zip(*both, strict=True):
                differing += (view != compiled).sum()
        if differing:
            raise RuntimeError(
                f"the compiled views {self.policy.name!r} differ from the policy's in {int(differing)} bytes of "
                f"{CHECKED_EPOCHS} epochs of a batch (torch {torch.__version__}, {index.device.type}); train with "
                "compile=false"
            )


def cifar(*, padding: int = 4, num_ops: int = 2, max_cutout: float = 0.5) -> ViewPolicy:
    """Return CIFAR's views in the VRM paper: padded crop, flip; virtual ones add TorchSSL's RandAugment, Cutout."""
    real = (RandomCrop(padding), RandomFlip())
    return ViewPolicy("cifar", real, (*real, RandAugment(num_ops), Cutout(max_cutout)))


def digits(*, padding: int = 1, degrees: float = 15.0, shear: float = 0.2) -> ViewPolicy:
    """Return views of small digits: a padded crop and no flip; virtual ones add a small rotation and shear."""
    return ViewPolicy("digits", (RandomCrop(padding),), (RandomCrop(padding), RandomAffine(degrees, shear)))


def imagenet(*, size: int = 224, num_ops: int = 2, max_cutout: float = 0.5) -> ViewPolicy:
    """Return the views of ImageNet in the VRM paper: as :func:`cifar`, with a resized crop.

    Evaluation cuts the centre out of images whose shorter side is resized to 8/7 of the size.
    """
    real = (RandomResizedCrop(size), RandomFlip())
    return ViewPolicy("imagenet", real, (*real, RandAugment(num_ops), Cutout(max_cutout)), CentralCrop(size))


def vit(
    *,
    size: int = 224,
    num_ops: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    erasing: float = 0.25,
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> ViewPolicy:
    """Return the views of ViT students in the VRM paper: resized crop (bicubic) and flip; timm's RandAugment, erasing.

    Virtual views alone have the last two. Evaluation resizes the shorter side to the size (bilinear) and crops only
    what is longer then: a square image is seen as a whole, as in the released code (tiny-transformers). ``mean`` and
    ``std`` are the network's normalisation: they give the colour that affine maps fill with, and the colours of erased
    pixels.
    """
    real = (RandomResizedCrop(size, resample="bicubic"), RandomFlip())
    colour = tuple(min(255, round(255 * value)) for value in mean)
    augment = TimmRandAugment(num_ops, magnitude, magnitude_std, fill=colour)
    virtual = (*real, augment, RandomErasing(erasing, mean=mean, std=std))
    return ViewPolicy("vit", real, virtual, CentralCrop(size, scale=1.0))


def none() -> ViewPolicy:
    """Return views that leave the images as they are."""
    return ViewPolicy("none", (), ())


POLICIES: dict[str, Callable[..., ViewPolicy]] = {
    "cifar": cifar,
    "digits": digits,
    "imagenet": imagenet,
    "vit": vit,
    "none": none,
}
"""View policies by name: functions whose keyword arguments are the options."""


def view_policy(name: str, **options: Any) -> ViewPolicy:
    """Return the policy of this name with these options. Raise ``ValueError`` for an unknown name or option."""
    if name not in POLICIES:
        raise ValueError(f"unknown view policy {name!r}; {nearest(name, POLICIES)}")
    known = inspect.signature(POLICIES[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"view policy {name!r} has no option {option!r}; {nearest(option, known)}")
    return POLICIES[name](**options)
