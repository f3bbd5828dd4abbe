"""Choosing a device, and its name."""

from __future__ import annotations

import platform

import torch

from vrm.config import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the device of ``device=name``; ``auto`` takes a GPU if there is one.

    Raise ``ConfigError`` for ``cuda`` without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: no CUDA device is visible here; use device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the GPU's own name, or the CPU's architecture and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
