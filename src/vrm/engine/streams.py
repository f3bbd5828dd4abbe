"""CUDA streams beside the current one, so that passes that do not depend on each other run at the same time.

The kernels of a small network leave most of a GPU idle. In a recording the streams become branches of the graph. The
results are the same to the last bit. On the CPU the passes run one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


class SideStreams:
    """Streams that work beside the current one, by number.

    Work on a side stream starts after everything already queued on the current stream; :meth:`join` makes the current
    stream wait for all side streams. So a tensor that a side stream reads must live until then. Memory that a side
    stream frees is reused by side streams alone, which start after everything that has read it.
    """

    def __init__(self, device: torch.device) -> None:
        """Use streams of this device."""
        self.device = device
        self.used: set[int] = set()

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        """Queue what is launched inside on side stream ``number``, after what is queued there already."""
        if self.device.type != "cuda":
            yield
            return
        stream = _stream(self.device, number)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        self.used.add(number)
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Make the current stream wait for all side streams used since the last call."""
        for number in sorted(self.used):
            torch.cuda.current_stream(self.device).wait_stream(_stream(self.device, number))
        self.used.clear()


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Return the same stream for all steps of a process, as cuBLAS allocates a workspace for each stream."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
