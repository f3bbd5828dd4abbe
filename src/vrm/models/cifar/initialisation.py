"""Initial weights of the networks of the KD literature."""

from __future__ import annotations

from torch import nn


def kaiming_fan_out(network: nn.Module, *, linear_std: float | None = None) -> None:
    """Draw convolutions from N(0, 2 / (kernel area * output channels)) and zero their biases (He et al., ICCV 2015).

    Batch norms keep PyTorch's initial values (weight 1, bias 0). ``linear_std`` draws linear weights from N(0, std^2)
    with zero bias (VGG, MobileNetV2); ``None`` keeps PyTorch's.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
