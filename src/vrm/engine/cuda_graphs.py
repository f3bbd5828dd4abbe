"""A function of device tensors, recorded once as a CUDA graph and then replayed: no Python, no launches one by one.

What is recorded are operations on tensors at fixed addresses. So the function may read and change any tensor that
stays in place (parameters, buffers, momenta, device scalars), but no Python value that changes between calls; those it
depends on make the ``key`` under which a recording is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

WARMUP = 3
"""Calls before a recording, as PyTorch's own ``make_graphed_callables`` has them: they are real calls, whose effects
stay, and give libraries the chance to choose algorithms and allocate workspaces."""

Function = Callable[..., None]


class Recorder(Protocol):
    """Where functions run, and how they are recorded."""

    def run(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        """Call the function as a recording would."""

    def record(self, function: Function, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
        """Record the function on exactly these tensors, without running it; returns its replay."""


class CudaGraphs:
    """Records on a stream of its own; all recordings share one memory pool, as no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        """``device`` is a CUDA device."""
        self.device = device
        self._begin()

    def _begin(self) -> None:
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        """Call the function on the recording stream, in order with the work before and after."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, function: Function, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
        """Capture into a graph. Other threads (pinned copies, loaders) may go on meanwhile.

        If that fails, whatever it was, the next recording begins anew.
        """
        graph = torch.cuda.CUDAGraph()
        outside = torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                function(*inputs)
        except BaseException:
            # PyTorch may leave its stream current, and goes on to take memory from the pool of a broken capture
            torch.cuda.set_stream(outside)
            with suppress(RuntimeError):  # where the capture did end, the pool is free already
                torch._C._cuda_endAllocateToPool(outside.device_index, self.pool)
            self._begin()
            raise
        return graph.replay


class Captured:
    """Calls ``function``; from the fourth call of a kind on, replays its recording.

    Calls are of one kind if ``key()`` and the inputs' shapes and types are the same: the last, smaller batch of an
    epoch gets a recording of its own.
    """

    def __init__(self, function: Function, recorder: Recorder, *, key: Callable[[], Hashable] = lambda: None) -> None:
        """``function`` takes device tensors and returns nothing."""
        self.function = function
        self.recorder = recorder
        self.key = key
        self.calls: dict[Hashable, int] = {}
        self.recordings: dict[Hashable, tuple[tuple[Tensor, ...], Callable[[], None]]] = {}

    def __call__(self, *inputs: Tensor) -> None:
        """Run on ``inputs``, by the recording where there is one."""
        kind = (self.key(), *((tuple(x.shape), x.dtype) for x in inputs))
        if kind not in self.recordings:
            self.calls[kind] = self.calls.get(kind, 0) + 1
            if self.calls[kind] <= WARMUP:
                self.recorder.run(self.function, inputs)
                return
            fixed = tuple(x.clone() for x in inputs)
            try:
                self.recordings[kind] = fixed, self.recorder.record(self.function, fixed)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                first = error.__context__ or error  # what broke the recording; ending it fails then, too
                if isinstance(first, torch.OutOfMemoryError):
                    raise first from None
                raise RuntimeError(
                    f"the step cannot be recorded as a CUDA graph ({str(first).splitlines()[0]}): a network or the "
                    "method reads a number from the device, or copies one to it; capture=off runs it as it is"
                ) from error
        fixed, replay = self.recordings[kind]
        for place, value in zip(fixed, inputs, strict=True):
            place.copy_(value)
        replay()
