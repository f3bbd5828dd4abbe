"""Counter-based randomness: every draw is a pure function of integers.

A draw is identified by a seed, a purpose and coordinates (epoch, sample index, view, ...). They are hashed with 64-bit
integer arithmetic on the device that holds the coordinates. CPU and GPU therefore draw the same numbers, no state has
to be saved, and neither the number of workers nor the order of calls can change a result.

The hash is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), applied once for each coordinate.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vrm.compilation import constant

# The constants of SplitMix64 as signed 64-bit numbers.
_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, 2^64 / golden ratio
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def _shift(x: Tensor, count: int) -> Tensor:
    """Shift 64-bit words, held as int64, to the right and fill with zeros."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _signed(number: int) -> int:
    """Wrap a Python integer to signed 64 bits."""
    return ((number + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


@constant
def _key(name: str) -> int:
    """Return a 64-bit hash of a string that is the same in every process and version of Python."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


@constant
def _keys(seed: int, purposes: tuple[str, ...], device: torch.device) -> Tensor:
    """Return the keys of several purposes, (P,), on the device.

    They are copied there once, because a captured step may not copy from the host.
    """
    return torch.tensor([_key(f"{seed}/{purpose}") for purpose in purposes], device=device)


def bits(seed: int, purpose: str | tuple[str, ...], *coordinates: int | Tensor) -> Tensor:
    """Return 64 random bits (int64) for each point of the broadcast ``coordinates`` (integers or integer tensors).

    At least one coordinate must be a tensor, which decides shape and device; otherwise raise ``ValueError``. Several
    purposes add a first dimension of that length to the result.
    """
    tensors = [c for c in coordinates if isinstance(c, Tensor)]
    if not tensors:
        raise ValueError("randomness needs at least one tensor among the coordinates: it decides shape and device")
    device = tensors[-1].device
    if isinstance(purpose, str):
        state = torch.full((), _key(f"{seed}/{purpose}"), dtype=torch.int64, device=device)
    else:
        state = _keys(seed, purpose, device).view(-1, *[1] * (max(c.dim() for c in tensors) - 1))
    for coordinate in coordinates:
        if isinstance(coordinate, Tensor):
            state = _mix(torch.add(state + _GOLDEN, coordinate.to(torch.int64), alpha=_MIX_2))
        else:
            state = _mix(state + _signed(_GOLDEN + coordinate * _MIX_2))
    return state


def uniform(seed: int, purpose: str | tuple[str, ...], *coordinates: int | Tensor) -> Tensor:
    """Return uniform float64 numbers in [0, 1), multiples of 2^-53."""
    return _shift(bits(seed, purpose, *coordinates), 11).to(torch.float64) * 2.0**-53


def normal(seed: int, purpose: str, *coordinates: int | Tensor) -> Tensor:
    """Return standard normal float64 numbers, by inversion.

    Devices may differ in the last bits, since ``ndtri`` is floating-point arithmetic.
    """
    drawn: Tensor = torch.special.ndtri(uniform(seed, purpose, *coordinates) + 2.0**-54)
    return drawn


def permutation(
    size: int, seed: int, purpose: str, epoch: int | Tensor, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Return a permutation (size,) of ``0 .. size-1`` that depends on seed, purpose and epoch alone."""
    index = torch.arange(size, device=device)
    return torch.argsort(bits(seed, purpose, epoch, index), stable=True)
