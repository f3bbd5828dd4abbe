"""Images that lie off the training device: in the host's memory or in files, sent ahead batch by batch.

A batch is gathered into pinned memory by a thread, some batches ahead, and copied to the device on a stream of its own
while the device works on the one before. On the CPU the same code runs without pinning.

Shapes: N images, 3 channels (RGB), H x W pixels, B batch.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from vrm.data.stores.store import DataSet, ImageStore, Store, content_hash, count_levels, with_crop
from vrm.data.views.transforms import CentralCrop

if TYPE_CHECKING:
    from vrm.data.views.policies import ViewPolicy

T = TypeVar("T")

Placement = Literal["auto", "device", "host", "stream"]
"""On the training device, in the host's memory or a mapped file, decoded anew for every batch; or what fits best."""

DEVICE_SHARE = 0.5
"""Images lie on the device if they take at most this share of its free memory: the rest is for networks and steps."""

HOST_SHARE = 0.5
"""Images of files are decoded beforehand if they then take at most this share of the host's free memory."""

_AHEAD = 3  # batches gathered before they are asked for
_PORTION = 1 << 26  # bytes of images handled at once where all are


class Rows(Protocol):
    """Decoded images of one size in the host's memory or in files, by number."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""

    @property
    def hash(self) -> str:
        """The :func:`~vrm.data.stores.store.content_hash` of a store of all of them, without a crop."""

    @property
    def place(self) -> str:
        """Where they lie, in words."""

    def __len__(self) -> int: ...

    def gather(self, rows: Sequence[int], out: Tensor) -> None:
        """Write the images with these numbers to ``out``, uint8 (B, 3, H, W). Called from several threads."""


@dataclass(frozen=True, eq=False)
class MemoryRows:
    """Images in the host's memory: those of a store there, which has no crop."""

    store: ImageStore

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.store.stored_size

    @property
    def hash(self) -> str:
        """The store's."""
        return self.store.hash

    @property
    def place(self) -> str:
        """Where they lie, in words."""
        return "host memory"

    def __len__(self) -> int:
        return len(self.store)

    def gather(self, rows: Sequence[int], out: Tensor) -> None:
        """Write the images with these numbers to ``out``, uint8 (B, 3, H, W)."""
        # NumPy's take works on one core and lets other threads run; with this mode it needs no buffer.
        np.take(self.store.images.numpy(), rows, axis=0, out=out.numpy(), mode="clip")


@dataclass(frozen=True, eq=False)
class HostStore(Store):
    """A split whose decoded images lie in the host's memory or in files; ``targets`` on the device that trains.

    ``chosen``: the rows (N,) that belong to the split, where not all of ``rows`` do.
    """

    rows: Rows
    targets: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    crop: CentralCrop | None = None
    chosen: Tensor | None = None

    @property
    def stored_size(self) -> tuple[int, int]:
        """(H, W) in pixels before the crop."""
        return self.rows.size

    @property
    def num_bytes(self) -> int:
        """Bytes of all images."""
        height, width = self.rows.size
        return len(self) * 3 * height * width

    @cached_property
    def hash(self) -> str:
        """That of the same images in memory."""
        if self.chosen is None:
            return with_crop(self.rows.hash, self.crop)
        return with_crop(content_hash(self.rows.size, self._portions(), self.targets, self.classes), self.crop)

    def to(self, device: torch.device | str) -> Self:
        """The same split for training on ``device``; the images stay."""
        return replace(self, targets=self.targets.to(device))

    def select(self, index_B: Tensor) -> Self:
        """The samples with these indices only, in their order; the class list stays whole."""
        rows = index_B.cpu() if self.chosen is None else self.chosen[index_B.cpu()]
        return replace(self, targets=self.targets[index_B], chosen=rows)

    def resident(self) -> ImageStore:
        """The same split with its images on the device of its targets."""
        images = torch.empty((len(self), 3, *self.rows.size), dtype=torch.uint8, device=self.targets.device)
        done = 0
        for portion in self._portions():
            images[done : done + len(portion)] = portion
            done += len(portion)
        return ImageStore(images, self.targets, self.classes, self.skipped, self.crop)

    def batch(self, index_B: Tensor) -> Tensor:
        """The images with these indices as evaluation sees them, uint8 (B, 3, H, W) on the device of ``targets``."""
        images = self._gather(index_B.cpu()).to(self.targets.device)
        return images if self.crop is None else self.crop(images)

    def read(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """``(index_B, self.batch(index_B))`` for every batch of indices, read ahead."""
        for index_B, images in self._sent(batches):
            yield index_B, images if self.crop is None else self.crop(images)

    def feed(
        self, batches: Sequence[Tensor], *, epoch: int, seed: int, policy: ViewPolicy, num_virtual: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """``(index_B, images)`` for every batch of indices: one tensor uint8 (B, 3, H, W) for all views, sent ahead."""
        yield from self._sent(batches)

    def levels(self, index_B: Tensor) -> Tensor:
        """How often each level occurs in each channel of these images, before any crop: int64 (3, 256) on the host."""
        return count_levels(self._gather(index_B.cpu()))

    def _sent(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        tasks = (partial(self._gather, rows) for rows in on_host(batches))
        images = onto(self.targets.device, ((gathered,) for gathered in ahead(tasks)))
        for index_B, (sent,) in zip(batches, images, strict=True):
            yield index_B, sent

    def _gather(self, index_B: Tensor) -> Tensor:
        """Images with these indices (on the host), pinned where they go on to a GPU."""
        rows = index_B if self.chosen is None else self.chosen[index_B]
        shape, pinned = (len(rows), 3, *self.rows.size), self.targets.device.type == "cuda"
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self.rows.gather(rows.tolist(), images)
        return images

    def _portions(self) -> Iterator[Tensor]:
        """All images in order, some at a time."""
        height, width = self.rows.size
        count = max(1, _PORTION // (3 * height * width))
        return ahead(partial(self._gather, index) for index in torch.split(torch.arange(len(self)), count))


def on_host(batches: Sequence[Tensor]) -> Sequence[Tensor]:
    """Batches of indices copied to the host, all at once: the device is waited for a single time."""
    if not batches:
        return ()
    return torch.split(torch.cat([*batches]).cpu(), [len(batch) for batch in batches])


def ahead(tasks: Iterable[Callable[[], T]], *, depth: int = _AHEAD) -> Iterator[T]:
    """The results of the tasks in their order, up to ``depth`` of them worked out before they are asked for."""
    if not depth:
        yield from (task() for task in tasks)
        return
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


class Beside:
    """Work beside that of a GPU, on a stream of its own; on other devices it is simply done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def begin(self, work: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        """Begin it; what comes back gives its results to the stream that is then current, which waits for them."""
        if self.stream is None:
            made = work()
            return lambda: made
        with torch.cuda.stream(self.stream):
            made, done = work(), self.stream.record_event()

        def finish() -> tuple[Tensor, ...]:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            for tensor in made:
                tensor.record_stream(current)  # else its memory could be given to the next work beside too early
            return made

        return finish


def onto(device: torch.device, items: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The items with their tensors on the device; to a GPU they are copied one item ahead, beside its work."""
    beside, waiting = Beside(device), deque[Callable[[], tuple[Tensor, ...]]]()
    for item in items:
        waiting.append(beside.begin(partial(_sent, item, device)))
        if len(waiting) > (device.type == "cuda"):
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def _sent(item: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device, non_blocking=True) for tensor in item)


# ---- where images lie -----------------------------------------------------------------------------------------------


def place(dataset: DataSet, device: torch.device | str, placement: Placement = "auto") -> DataSet:
    """The data set ready to train on ``device``, with its images where they belong; ``DataSet.placement`` says why.

    ``auto`` on a GPU: on it if all images take at most half of its free memory (``DEVICE_SHARE``), else in the host's
    memory, from where batches are sent ahead. On the CPU images stay where they are: in memory, or in mapped files.
    Images that are decoded for every batch (``stream``) stay so. ``ValueError`` if ``placement`` cannot be had.
    """
    device = torch.device(device)
    if placement not in get_args(Placement):
        raise ValueError(f"placement must be one of {', '.join(get_args(Placement))}, got {placement!r}")
    sizes = [store.num_bytes for store in (dataset.train, dataset.test)]
    needed = sum(size for size in sizes if size is not None)
    if None in sizes:
        if placement in ("device", "host"):
            raise ValueError(
                f"the images of {dataset.name} are decoded anew for every batch; load them with placement={placement}"
            )
        return dataset.to(device)
    if placement == "stream":
        raise ValueError(
            f"placement=stream decodes the image files of class folders for every batch, but the images of "
            f"{dataset.name} are decoded already; use placement=auto, device or host"
        )
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory()
    if placement == "auto":
        fits = needed <= DEVICE_SHARE * free
        resident = all(isinstance(store, ImageStore) for store in (dataset.train, dataset.test))
        chosen = "device" if (fits if on_gpu else resident) else "host"
        why = f"{'at most' if fits else 'more than'} half of {amount(free)} free on {device}" if on_gpu else ""
    else:
        chosen, why = placement, "as asked for"
    size = amount(needed) + f", {why}" * bool(why)
    if chosen == "host":
        train, test = _in_host(dataset.train, device), _in_host(dataset.test, device)
        text = f"images in {train.rows.place}, sent batch by batch: {size}"
        return replace(dataset, train=train, test=test, placement=text)
    if needed > free:
        raise ValueError(
            f"placement=device: the images take {amount(needed)}, but {amount(free)} are free on {device}; "
            "use placement=host"
        )
    text = f"images {f'on {device}' if on_gpu else 'in memory'}: {size}"
    return replace(
        dataset, train=_on_device(dataset.train, device), test=_on_device(dataset.test, device), placement=text
    )


def _in_host(store: Store, device: torch.device) -> HostStore:
    if isinstance(store, HostStore):
        return store.to(device)
    store = store.to("cpu")
    if not isinstance(store, ImageStore):
        raise ValueError(f"a store of kind {type(store).__name__} has no images that could lie in the host's memory")
    rows = MemoryRows(replace(store, crop=None))
    return HostStore(rows, store.targets.to(device), store.classes, store.skipped, store.crop)


def _on_device(store: Store, device: torch.device) -> Store:
    return store.to(device).resident() if isinstance(store, HostStore) else store.to(device)


def free_memory() -> int:
    """Bytes of memory that this process may still take: what Linux calls available, within its control group's limit.

    On other systems all of the machine's memory.
    """
    known = Path("/proc/meminfo")
    if not known.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":", 1) for line in known.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")  # of a container; a machine's own root group has no limit
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # the kernel gives cache back
        free = min(free, int(limit) - used)
    return max(free, 0)


def amount(num_bytes: int) -> str:
    """Bytes in words: 38 MB, 1.2 GB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
