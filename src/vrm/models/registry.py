"""Networks by name: the CIFAR networks of the literature, and those of timm and torchvision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vrm.models.cifar import NETWORKS
from vrm.models.taps import TappedNetwork, known_taps
from vrm.models.wrappers import unwrap
from vrm.wording import nearest


def names() -> tuple[str, ...]:
    """Return the names of the CIFAR networks of the knowledge distillation literature."""
    return tuple(NETWORKS)


def create(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """Build a network with new weights, drawn from torch's global random generator.

    Args:
        name: One of :func:`names`, ``timm:NAME`` or ``torchvision:NAME``.
        num_classes: Width of the logits.
        options: ``in_channels`` (3 by default) for the networks of :func:`names` and of timm; for timm and torchvision
            also what their own constructors take.

    Raises:
        ValueError: The name is unknown (the message has the nearest ones), or the network does not take an option.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    _refuse_fetching(options)
    network = _create(name, num_classes, options)
    network.created_as = (name, options, _layout(network))  # type: ignore[assignment]
    return network


def created_as(network: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Return the name and the options with which :func:`create` made a network.

    None for any other network, and for one of which a part was replaced since; the number of classes may differ.
    """
    network = unwrap(network)
    name, options, layout = getattr(network, "created_as", None) or ("", {}, None)
    return (name, options) if name and _layout(network) == layout else None


def _layout(network: nn.Module) -> list[tuple[str, ...]]:
    """Return the kind and the settings of each layer, and the shapes of the state, without the number of classes."""
    heads = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    head = heads[-1] if heads else None
    found: list[tuple[str, ...]] = []
    for path, module in network.named_modules():
        told = module.extra_repr()
        found.append((path, type(module).__qualname__, re.sub(r"out_features=\d+", "", told) if path == head else told))
    for name, value in network.state_dict().items():
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        found.append((name, str(shape[1:] if name.rpartition(".")[0] == head else shape), ""))
    return found


def _create(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    source, _, library_name = name.partition(":")
    if source == "timm":
        return _create_timm(library_name, num_classes, options)
    if source == "torchvision":
        return _create_torchvision(library_name, num_classes, options)
    if name not in NETWORKS and "." in name:  # what the card of a run has for a user's module
        raise ValueError(
            f"the network, a {name}, was a module given from Python, which cannot be made again by its name: make it "
            "in Python, fill it with vrm.models.load_weights(module, 'RUN_FOLDER/model.safetensors'), and give the "
            "module itself, as in vrm.distill(teacher=module, ..)"
        )
    if name not in NETWORKS:
        raise ValueError(
            f"unknown network {name!r}; {nearest(name, NETWORKS)} (timm:NAME and torchvision:NAME are allowed as well)"
        )
    unknown = sorted(set(options) - {"in_channels"})
    if unknown:
        raise ValueError(f"{name} takes num_classes and in_channels, not {', '.join(unknown)}")
    return NETWORKS[name](num_classes=num_classes, **options)


FETCHING = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "weights", "weights_backbone")
"""Options with which timm and torchvision load weights themselves. They are refused: a card could name any address."""


def _refuse_fetching(options: Mapping[str, Any]) -> None:
    if found := sorted(set(options) & set(FETCHING)):
        raise ValueError(f"the option {found[0]} would load weights unchecked; give the weights as a file")


def _create_timm(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(f"timm:{name} needs the package timm; install vrm[models]") from error
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"timm has no network {name!r}; {nearest(name, timm.list_models())}")
    chans = {"in_chans": options["in_channels"]} if "in_channels" in options else {}
    rest = {key: value for key, value in options.items() if key != "in_channels"}
    network: nn.Module = timm.create_model(name, num_classes=num_classes, **chans, **rest)
    return network


def _create_torchvision(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classification network {name!r}; {nearest(name, known)}")
    if options.get("in_channels", 3) != 3:
        raise ValueError(f"torchvision:{name} takes images of 3 channels, not {options['in_channels']}; use timm:NAME")
    rest = {key: value for key, value in options.items() if key != "in_channels"}
    network: nn.Module = models.get_model(name, num_classes=num_classes, **rest)
    return network


@dataclass(frozen=True)
class Description:
    """What ``vrm models`` shows of a network."""

    name: str
    num_classes: int
    input_size: tuple[int, int]
    parameters: int
    """The number of parameters."""
    flops: int
    """Floating point operations in the convolutions and matrix products of one image; a multiply-add counts as two."""
    taps: Mapping[str, tuple[int, ...]]
    """The shape of each tap, without the batch axis."""


def describe(name: str, num_classes: int, input_size: tuple[int, int], **options: Any) -> Description:
    """Return parameters, FLOPs and taps of a network, found on the meta device, where nothing is computed."""
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
