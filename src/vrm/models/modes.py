"""Eval mode that ends with the block it was set for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Set eval mode inside; afterwards give each module its own mode back, which may differ from its parent's."""
    training = network.training
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        network.train(training)  # a network may override it to do more than set the mode
        for module, mode in modes:
            module.training = mode
