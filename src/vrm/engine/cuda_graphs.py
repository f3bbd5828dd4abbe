"""Record a function of device tensors once as a CUDA graph, then replay it: no Python, no launches one by one.

A recording holds operations on tensors at fixed addresses. So the function may read and change any tensor that stays
in place (parameters, buffers, momenta, device scalars), but no Python value that changes between calls; where it
depends on one, that value is the ``variant`` under which a recording is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from vrm.wording import first_line

WARMUP = 3
"""Calls before a recording, as many as PyTorch's ``make_graphed_callables`` makes. They are real calls, whose effects
stay; in them libraries choose algorithms and allocate workspaces."""

Function = Callable[..., None]


class Recorder(Protocol):
    """Runs functions, and records them."""

    def run(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        """Call the function in the place where it would be recorded."""

    def record(self, function: Function, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
        """Record the function on exactly these tensors, without running it; return what replays it."""


class CudaGraphRecorder:
    """Records on a stream of its own. All recordings share one memory pool, as no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        """Record on this CUDA device."""
        self.device = device
        self._begin()

    def _begin(self) -> None:
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        """Call the function on the recording stream, after all earlier work and before all later work."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, function: Function, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
        """Capture the function into a graph. Other threads (pinned copies, loaders) may go on meanwhile.

        After a failure the next recording uses a new stream and a new pool.
        """
        graph = torch.cuda.CUDAGraph()
        outside = torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                function(*inputs)
        except BaseException:
            # PyTorch may leave its stream current, and goes on allocating from the pool of the broken capture
            torch.cuda.set_stream(outside)
            with suppress(RuntimeError):  # if the capture did end, the pool is free already
                torch._C._cuda_endAllocateToPool(outside.device_index, self.pool)
            self._begin()
            raise
        return graph.replay


class RecordedFunction:
    """A function that is called as it is at first, then recorded, then replayed.

    Calls share a recording if ``variant()`` and the shapes and types of the inputs are the same; the last, smaller
    batch of an epoch gets a recording of its own.
    """

    def __init__(
        self, function: Function, recorder: Recorder, *, variant: Callable[[], Hashable] = lambda: None
    ) -> None:
        """Wrap a ``function`` that takes device tensors and returns nothing."""
        self.function = function
        self.recorder = recorder
        self.variant = variant
        self.calls: dict[Hashable, int] = {}
        self.recordings: dict[Hashable, tuple[tuple[Tensor, ...], Callable[[], None]]] = {}

    def __call__(self, *inputs: Tensor) -> None:
        """Run on ``inputs``, by replay if there is a recording.

        Raise ``RuntimeError`` if the function cannot be recorded.
        """
        kind = (self.variant(), *((tuple(x.shape), x.dtype) for x in inputs))
        if kind not in self.recordings:
            self.calls[kind] = self.calls.get(kind, 0) + 1
            if self.calls[kind] <= WARMUP:
                self.recorder.run(self.function, inputs)
                return
            self.recordings[kind] = self._record(inputs)
        fixed, replay = self.recordings[kind]
        for place, value in zip(fixed, inputs, strict=True):
            place.copy_(value)
        replay()

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        fixed = tuple(x.clone() for x in inputs)
        try:
            return fixed, self.recorder.record(self.function, fixed)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = error.__context__ or error  # what broke the recording; ending it then fails, too
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise RuntimeError(
                f"the step cannot be recorded as a CUDA graph ({first_line(first)}): a network or the method reads a "
                "number from the device, or copies one to it; give capture=off to run it eagerly"
            ) from error
