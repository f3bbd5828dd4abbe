"""Training: the distiller, the step, the loop, and what makes a run survive."""

from __future__ import annotations

import platform

import torch


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
