"""Measurements of training steps, summed on the device and read once per log interval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vrm.engine.distribution import World

Measured = tuple[tuple[str, ...], Tensor]
"""Names of quantities, and their float64 values on the device, (N,)."""


class Meter:
    """Named sums over steps, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        """Start without any sum."""
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, names: Sequence[str], value_N: Tensor) -> None:
        """Add one float64 value to each named sum."""
        for name in names:
            if name not in self.sums:
                self.sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
        torch._foreach_add_([self.sums[name] for name in names], list(value_N.unbind()))

    def read(self, world: World) -> dict[str, float]:
        """Return the means over samples since the last reading, and reset. Wait for the device.

        ``samples``, ``nonfinite`` and ``overflows`` are counts, of samples and of steps.
        """
        if not self.sums:
            return {"samples": 0.0, "nonfinite": 0.0, "overflows": 0.0}
        values = dict(zip(self.sums, world.sum(torch.stack([*self.sums.values()])).tolist(), strict=True))
        for value in self.sums.values():
            value.zero_()
        counts = {name: values.pop(name) for name in ("samples", "nonfinite", "overflows")}
        counts |= {name: counts[name] / world.size for name in ("nonfinite", "overflows")}
        return {name: value / max(counts["samples"], 1.0) for name, value in values.items()} | counts
