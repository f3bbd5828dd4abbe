"""Passes that do not depend on each other run side by side: a small network's kernels leave most of a GPU idle.

Each lane is a CUDA stream; in a recording the streams become branches of the graph. What is computed is the same, to
the last bit. On the CPU lanes are one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


class Lanes:
    """Work within ``with lanes(number):`` comes behind all launched before it, and ahead of what follows ``join``.

    So a tensor that a lane reads must live until then; and memory that a lane leaves is reused by lanes alone, which
    begin behind everything that has read it.
    """

    def __init__(self, device: torch.device) -> None:
        """On this device."""
        self.device = device
        self.open: set[int] = set()

    @contextmanager
    def __call__(self, number: int) -> Iterator[None]:
        """Lane ``number``; those of one number are in order."""
        if self.device.type != "cuda":
            yield
            return
        stream = _stream(self.device, number)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        self.open.add(number)
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """What follows comes behind all lanes that were begun."""
        for number in sorted(self.open):
            torch.cuda.current_stream(self.device).wait_stream(_stream(self.device, number))
        self.open.clear()


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """One for all steps of a process: to each stream of a matrix product cuBLAS gives memory of its own."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
