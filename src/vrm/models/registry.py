"""Networks by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vrm.models.cifar.mobilenet import MobileNetV2
from vrm.models.cifar.resnet import ResNet
from vrm.models.cifar.resnet_four_stage import FourStageResNet
from vrm.models.cifar.shufflenet import ShuffleNetV1, ShuffleNetV2
from vrm.models.cifar.vgg import VGG
from vrm.models.cifar.wide_resnet import WideResNet
from vrm.models.taps import TappedNetwork, known_taps

_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)

_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(ResNet, depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth, _WIDE) for depth in (8, 32)},
    **{f"wrn_{depth}_{width}": partial(WideResNet, depth, width) for depth in (16, 40) for width in (1, 2)},
    **{f"vgg{depth}": partial(VGG, depth) for depth in (8, 11, 13, 16, 19)},
    "mobilenetv2": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    **{f"resnet{depth}": partial(FourStageResNet, depth) for depth in (18, 50)},
}


def names() -> tuple[str, ...]:
    """The CIFAR networks of the knowledge distillation literature."""
    return tuple(_NETWORKS)


def create(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """A freshly initialised network, drawn from torch's global generator.

    Args:
        name: One of :func:`names`, ``timm:NAME`` or ``torchvision:NAME``.
        num_classes: Width of the logits.
        options: ``in_channels`` (3 by default) for the networks of :func:`names` and of timm; what else timm's or
            torchvision's own constructors take.

    Raises:
        ValueError: An unknown name, with the nearest ones; an option that the network does not take.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    _refuse_fetching(options)
    source, _, library_name = name.partition(":")
    if source == "timm":
        return _create_timm(library_name, num_classes, options)
    if source == "torchvision":
        return _create_torchvision(library_name, num_classes, options)
    if name not in _NETWORKS:
        near = difflib.get_close_matches(name.lower(), _NETWORKS, n=3, cutoff=0.4)
        raise ValueError(
            f"unknown network {name!r}"
            + (f"; nearest: {', '.join(near)}" if near else f"; known: {', '.join(_NETWORKS)}")
            + ". timm:NAME and torchvision:NAME work too."
        )
    unknown = sorted(set(options) - {"in_channels"})
    if unknown:
        raise ValueError(f"{name} takes num_classes and in_channels, not {', '.join(unknown)}")
    return _NETWORKS[name](num_classes=num_classes, **options)


FETCHING = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "weights", "weights_backbone")
"""Options with which timm and torchvision load weights themselves, from files or addresses that a card may name."""


def _refuse_fetching(options: Mapping[str, Any]) -> None:
    if found := sorted(set(options) & set(FETCHING)):
        raise ValueError(f"the option {found[0]} would load weights unchecked; give the weights as a file")


def _create_timm(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(f"timm:{name} needs the package timm; install vrm[models]") from error
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise ValueError(f"timm has no network {name!r}; nearest: {', '.join(near) or 'none'}")
    chans = {"in_chans": options["in_channels"]} if "in_channels" in options else {}
    rest = {key: value for key, value in options.items() if key != "in_channels"}
    network: nn.Module = timm.create_model(name, num_classes=num_classes, **chans, **rest)
    return network


def _create_torchvision(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(f"torchvision has no classification network {name!r}; nearest: {', '.join(near) or 'none'}")
    if options.get("in_channels", 3) != 3:
        raise ValueError(f"torchvision:{name} takes images of 3 channels, not {options['in_channels']}; use timm:NAME")
    rest = {key: value for key, value in options.items() if key != "in_channels"}
    network: nn.Module = models.get_model(name, num_classes=num_classes, **rest)
    return network


@dataclass(frozen=True)
class Description:
    """What ``vrm models`` shows of a network.

    ``parameters``: their number. ``flops``: floating point operations of one image's forward pass in convolutions and
    matrix products, a multiply-add counted as two. ``taps``: shapes without the batch axis.
    """

    name: str
    num_classes: int
    input_size: tuple[int, int]
    parameters: int
    flops: int
    taps: Mapping[str, tuple[int, ...]]


def describe(name: str, num_classes: int, input_size: tuple[int, int], **options: Any) -> Description:
    """Parameters, FLOPs and taps of a network, measured without computing anything (meta device)."""
    in_channels = options.get("in_channels", 3)
    with torch.random.fork_rng(devices=[]):
        network = create(name, num_classes=num_classes, **options).eval().requires_grad_(False).to("meta")
    image = torch.empty(1, in_channels, *input_size, device="meta")
    known = known_taps(network, input_size=input_size, in_channels=in_channels)
    tapped = TappedNetwork(network, tuple(known), input_size=input_size, in_channels=in_channels)
    counter = FlopCounterMode(display=False)
    with counter:
        outputs = tapped(image)
    return Description(
        name,
        num_classes,
        input_size,
        sum(parameter.numel() for parameter in network.parameters()),
        counter.get_total_flops(),
        {tap: tuple(value.shape[1:]) for tap, value in outputs.taps.items()},
    )
