"""Working ahead of the training step: tasks in threads, copies to a GPU on a stream of their own."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def split_on_host(indices: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copy batches of indices to the host in one transfer, so that the device is waited for only once."""
    if not indices:
        return ()
    return torch.split(torch.cat([*indices]).cpu(), [len(index) for index in indices])


def run_ahead(tasks: Iterable[Callable[[], T]], *, depth: int = 3) -> Iterator[T]:
    """Yield the results of ``tasks`` in order; up to ``depth`` of them run, in threads, before they are asked for."""
    pool = ThreadPoolExecutor(min(depth, os.cpu_count() or 1))
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def copy_to_device(device: torch.device, items: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the items with their tensors on ``device``; copies to a GPU run one item ahead, beside its other work."""
    if device.type != "cuda":
        for item in items:
            yield tuple(tensor.to(device) for tensor in item)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: deque[tuple[tuple[Tensor, ...], torch.cuda.Event]] = deque()

    def take() -> tuple[Tensor, ...]:
        copies, done = waiting.popleft()
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        for copy in copies:
            copy.record_stream(current)  # else a later copy could be given their memory while they are still in use
        return copies

    for item in items:
        with torch.cuda.stream(stream):
            waiting.append((tuple(tensor.to(device, non_blocking=True) for tensor in item), stream.record_event()))
        if len(waiting) > 1:
            yield take()
    while waiting:
        yield take()
