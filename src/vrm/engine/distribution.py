"""One run over several processes, started by ``torchrun``, with PyTorch's own data parallelism.

Every process has all networks and a share of each batch: every ``size``-th sample. Process 0 alone writes the run
folder. Two things differ from a run in one process: batch norm sees a process's share only, and its running statistics
are those of process 0; losses that couple samples see the share, unless the method gathers (``method.gather`` of VRM).
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vrm.wording import first_line

T = TypeVar("T")


class ProcessLost(RuntimeError):
    """Another process of the run died or does not answer."""

    exit_code = 1


@dataclass(frozen=True)
class World:
    """The place of this process among those of the run."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def part(self, index_B: Tensor) -> Tensor:
        """Return this process's share of a batch of indices."""
        return index_B[self.rank :: self.size]

    def weight(self, index_B: Tensor) -> float:
        """Return the weight of the mean over :meth:`part` in a mean over processes; every sample counts the same."""
        return len(self.part(index_B)) * self.size / len(index_B)

    def span(self, count: int) -> tuple[int, int]:
        """Return first and end of this process's share of ``count`` samples in order. Each sample is in one share."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose gradients are averaged over processes.

        Buffers are not averaged: each process keeps the batch-norm statistics of its share, see :meth:`copy_buffers`.
        """
        if self.size == 1:
            return module
        with warnings.catch_warnings():
            # torch 2.15 renamed broadcast_buffers; torch 2.8 does not know the new name
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)

    def synchronised(self, module: nn.Module, now: bool) -> AbstractContextManager[object]:
        """Average gradients over processes in a backward pass inside, or only accumulate them if ``now`` is false."""
        if now or not isinstance(module, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[object], module.no_sync())

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over processes."""
        if self.size == 1:
            return
        with explained():
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor.div_(self.size)

    def copy_buffers(self, module: nn.Module) -> None:
        """Give every process the buffers of process 0, which are evaluated and saved."""
        if self.size == 1:
            return
        with explained():
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over processes."""
        if self.size == 1:
            return value
        with explained():
            total = value.clone()
            dist.all_reduce(total)
        return total

    def all(self, flag: Tensor) -> Tensor:
        """Return whether a boolean scalar is true on every process."""
        if self.size == 1:
            return flag
        return self.sum(flag.int()) == self.size

    def any(self, flag: bool) -> bool:
        """Return whether a Python boolean is true on any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, value: T) -> list[T]:
        """Return each process's value, a plain Python object, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with explained():
            dist.all_gather_object(found, value)
        return found

    def from_main(self, value: T | None) -> T:
        """Return process 0's value on every process."""
        if self.size == 1:
            return cast(T, value)
        box: list[Any] = [value]
        with explained():
            dist.broadcast_object_list(box, 0)
        return cast(T, box[0])


ALONE = World()


def join(device: torch.device, timeout: float) -> World:
    """Join the other processes that ``torchrun`` started; return ``ALONE`` if there are none.

    A process that waits for another one longer than ``timeout`` seconds raises :class:`ProcessLost`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with explained():
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), dist.get_world_size())


def joined() -> bool:
    """Return whether this process has joined others."""
    return dist.is_initialized()


def leave(code: int | None) -> NoReturn:
    """End this process at once, after everything is written.

    ``DistributedDataParallel`` never ends the backends' threads, and a thread that outlives the interpreter may abort
    the process and change its exit code. If another process is lost, they cannot be shut down in order at all.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


@contextmanager
def explained() -> Iterator[None]:
    """Raise :class:`ProcessLost` for the backends' various errors about a lost or silent process."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))
        if not lost:
            raise
        raise ProcessLost(
            f"another process of this run died or did not answer in time ({first_line(error)}); this one "
            "stops too. `torchrun .. vrm resume RUN` goes on from the last checkpoint"
        ) from error
