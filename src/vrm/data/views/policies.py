"""Views: what the networks see of an image, as a pure function of (seed, epoch, sample, view).

A :class:`ViewPolicy` makes the real view and any number of virtual views of a batch. Every random choice is drawn with
:mod:`vrm.randomness` from the sample's own index, so neither the batch a sample is in, nor the number of views, nor the
device changes a pixel; a teacher's outputs can be cached. Images go in and come out as uint8: normalisation belongs
to each network.

>>> policy = view_policy("cifar")
>>> real, virtual = policy(images, index, epoch=1, seed=0, num_virtual=1)

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
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
)


@dataclass(frozen=True)
class ViewPolicy:
    """Makes views: the steps of the real view, and those of every virtual view."""

    name: str
    real: tuple[Transform, ...]
    virtual: tuple[Transform, ...]

    def __call__(
        self, images: Tensor | Sequence[Tensor], index: Tensor, *, epoch: int | Tensor, seed: int, num_virtual: int
    ) -> tuple[Tensor, ...]:
        """The real view, then ``num_virtual`` virtual views, uint8 (B, C, h, w) each.

        Args:
            images: uint8 (B, C, H, W), on any device; or one such tensor for each view, of images that went through the
                view's crop (:attr:`crops`) already, which is then left out.
            index: integer (B,), which samples of the data set these are, on the same device.
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
        draws = Draws.of_views(index, epoch=epoch, seed=seed, steps=steps)
        views = []
        for made, transforms, drawn in zip(given, steps, draws, strict=True):
            if made.dtype != torch.uint8 or made.dim() != 4:
                raise ValueError(f"views are made of uint8 images (B, C, H, W), got {made.dtype} {tuple(made.shape)}")
            if index.shape != made.shape[:1]:
                raise ValueError(f"one index for each of the {len(made)} images is needed, got {tuple(index.shape)}")
            for transform in transforms:
                made = transform(made, drawn)
            views.append(made)
        return tuple(views)

    @property
    def crops(self) -> tuple[RandomResizedCrop, RandomResizedCrop] | None:
        """The resized crops with which the real view and the virtual views begin, if both do.

        What decodes images can make them, with :meth:`Draws.of_view` of the sample and the size that the file has.
        """
        real, virtual = (steps[0] if steps else None for steps in (self.real, self.virtual))
        if isinstance(real, RandomResizedCrop) and isinstance(virtual, RandomResizedCrop):
            return real, virtual
        return None

    @property
    def evaluation(self) -> CentralCrop | None:
        """How evaluation sees an image that these views are trained on; ``None``: as it is."""
        return None if self.crops is None else CentralCrop(self.crops[0].size, self.crops[0].resample)

    def describe(self) -> dict[str, Any]:
        """All that decides the pixels beside seed, epoch, sample and view, as it would come back from a JSON file."""
        steps = {
            kind: [{"transform": type(step).__name__, **asdict(step)} for step in transforms]  # type: ignore[call-overload]
            for kind, transforms in (("real", self.real), ("virtual", self.virtual))
        }
        description: dict[str, Any] = json.loads(json.dumps({"name": self.name, **steps}))
        return description


PROOF = 32
"""Epochs of which compiled views are compared with the views themselves."""


class CompiledViews:
    """What a policy makes, by code that ``torch.compile`` makes of it: the same bytes by a tenth of the kernels.

    For each shape of batch the first call makes the views of :data:`PROOF` epochs both ways, and raises
    ``RuntimeError`` if a byte differs.
    """

    def __init__(self, policy: ViewPolicy) -> None:
        """Nothing is compiled before the first call."""
        self.policy = policy
        self.compiled = torch.compile(policy.__call__, fullgraph=True, dynamic=False, options=compile_options())
        self.proven: set[tuple[Any, ...]] = set()

    def __call__(
        self, images: Tensor | Sequence[Tensor], index: Tensor, *, epoch: Tensor, seed: int, num_virtual: int
    ) -> tuple[Tensor, ...]:
        """As :meth:`ViewPolicy.__call__`, of an epoch on the device."""
        given = (images,) if isinstance(images, Tensor) else tuple(images)
        kind = (num_virtual, len(given), *(tuple(image.shape) for image in given))
        if kind not in self.proven:
            self._prove(images, index, epoch=epoch, seed=seed, num_virtual=num_virtual)
            self.proven.add(kind)
        views: tuple[Tensor, ...] = self.compiled(images, index, epoch=epoch, seed=seed, num_virtual=num_virtual)
        return views

    def _prove(self, images: Tensor | Sequence[Tensor], index: Tensor, *, epoch: Tensor, **how: int) -> None:
        differing = torch.zeros((), dtype=torch.int64, device=index.device)
        for number in range(PROOF):
            both = (make(images, index, epoch=epoch + number, **how) for make in (self.policy, self.compiled))
            for view, compiled in zip(*both, strict=True):
                differing += (view != compiled).sum()
        if differing:
            raise RuntimeError(
                f"the compiled views {self.policy.name!r} differ from the views in {int(differing)} bytes of {PROOF} "
                f"epochs of a batch (torch {torch.__version__}, {index.device.type}); train with compile=false"
            )


def cifar(*, padding: int = 4, num_ops: int = 2, max_cutout: float = 0.5) -> ViewPolicy:
    """CIFAR in the VRM paper: padded crop and flip; virtual views add TorchSSL's RandAugment and Cutout."""
    real = (RandomCrop(padding), RandomFlip())
    return ViewPolicy("cifar", real, (*real, RandAugment(num_ops), Cutout(max_cutout)))


def digits(*, padding: int = 1, degrees: float = 15.0, shear: float = 0.2) -> ViewPolicy:
    """Small digits: a padded crop and no flip; virtual views add a small rotation and shear."""
    return ViewPolicy("digits", (RandomCrop(padding),), (RandomCrop(padding), RandomAffine(degrees, shear)))


def imagenet(*, size: int = 224, num_ops: int = 2, max_cutout: float = 0.5) -> ViewPolicy:
    """ImageNet in the VRM paper: resized crop and flip; virtual views add TorchSSL's RandAugment and Cutout."""
    real = (RandomResizedCrop(size), RandomFlip())
    return ViewPolicy("imagenet", real, (*real, RandAugment(num_ops), Cutout(max_cutout)))


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
    """ViT students in the VRM paper: resized crop (bicubic) and flip; virtual views add timm's RandAugment and erasing.

    ``mean`` and ``std`` are the network's normalisation: the colour that maps fill with, and that of erased pixels.
    """
    real = (RandomResizedCrop(size, resample="bicubic"), RandomFlip())
    colour = tuple(min(255, round(255 * value)) for value in mean)
    augment = TimmRandAugment(num_ops, magnitude, magnitude_std, fill=colour)
    return ViewPolicy("vit", real, (*real, augment, RandomErasing(erasing, mean=mean, std=std)))


def none() -> ViewPolicy:
    """The images as they are, for every view."""
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
    """The policy of this name with these options; ``ValueError`` names the near ones for what is unknown."""
    if name not in POLICIES:
        raise ValueError(f"unknown view policy {name!r}; {_nearest(name, POLICIES)}")
    known = inspect.signature(POLICIES[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"view policy {name!r} has no option {option!r}; {_nearest(option, known)}")
    return POLICIES[name](**options)


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"
