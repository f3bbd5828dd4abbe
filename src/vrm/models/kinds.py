"""What kind of network a name stands for, as far as it decides how one trains it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from vrm.models.cifar import NETWORKS
from vrm.models.inputs import library_input
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
    said = library_input(network, name)
    if said is None or said.size is None:
        raise ValueError(f"{name} does not say for which images it was built; give data.size=PIXELS")
    return Kind(any(map(_is_of_transformers, network.modules())), max(said.size))


def _is_of_transformers(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm | nn.MultiheadAttention) or "Attention" in type(module).__name__
