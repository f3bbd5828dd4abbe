"""The device of a run, and the names of devices."""

from __future__ import annotations

import platform
from pathlib import Path

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


def processor_name() -> str:
    """Return the processor's name as Linux knows it, elsewhere its architecture."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
