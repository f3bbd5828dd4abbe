"""The order in which an epoch visits the samples: a function of seed and epoch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from vrm.randomness import permutation


def epoch_order(num_samples: int, *, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the order (N,) in which an epoch visits the samples."""
    return permutation(num_samples, seed, "epoch order", epoch, device=device)


def epoch_batches(
    num_samples: int, batch_size: int, *, seed: int, epoch: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Cut the epoch's order into batches of indices (B,); the last one may be smaller, none is dropped."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return torch.split(epoch_order(num_samples, seed=seed, epoch=epoch, device=device), batch_size)
