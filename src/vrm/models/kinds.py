"""What kind of network a name stands for, as far as it decides how one trains it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from vrm.models.cifar import NETWORKS
from vrm.models.registry import create


class Kind(NamedTuple):
    """How a network is built."""

    transformer: bool
    """Whether it has layer norms or attention, as transformers, mixers and ConvNeXt have."""
    side: int
    """The side in pixels of the square images that it was designed for."""


def kind_of(name: str, **options: Any) -> Kind:
    """Return the kind of a network. Arguments and errors as those of :func:`vrm.models.create`."""
    if name in NETWORKS:
        return Kind(transformer=False, side=32)
    with torch.random.fork_rng(devices=[]):
        network = create(name, num_classes=10, **options)
    return Kind(any(map(_is_of_transformers, network.modules())), _side(network, name))


def _is_of_transformers(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.MultiheadAttention) or "Attention" in type(module).__name__


def _side(network: nn.Module, name: str) -> int:
    """Return the side that a network of timm or torchvision was built for, else that of its published weights."""
    source, _, library_name = name.partition(":")
    if source == "torchvision":
        from torchvision.models import get_model_weights

        built = getattr(network, "image_size", None)
        return int(built or next(iter(get_model_weights(library_name))).transforms().crop_size[0])
    built = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return int(max(built if isinstance(built, tuple) else network.pretrained_cfg["input_size"][1:]))  # type: ignore[index]
