"""The device of a run, and the names of devices."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from vrm.config import ConfigError
from vrm.wording import counted


def choose_device(name: str) -> torch.device:
    """Return the device of ``device=name``; ``auto`` takes a GPU if there is one.

    Of several processes on a machine, as ``torchrun`` starts them, each takes a GPU of its own. Raise ``ConfigError``
    for ``cuda`` without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: no CUDA device is visible here; use device=cpu or device=auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Return the GPU's own name, or the CPU's architecture and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {counted(torch.get_num_threads(), 'thread')})"


def processor_name() -> str:
    """Return the processor's name as Linux knows it, elsewhere its architecture."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
