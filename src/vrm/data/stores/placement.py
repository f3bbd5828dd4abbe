"""Where images are kept for training: on the device, in the host's memory, or decoded for every batch."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from vrm.data.stores.base import Store
from vrm.data.stores.dataset import DataSet
from vrm.data.stores.host import HostStore, RowsInMemory
from vrm.data.stores.memory import ImageStore
from vrm.wording import bytes_in_words

Placement = Literal["auto", "device", "host", "stream"]
"""On the training device, in the host's memory or a mapped file, decoded for every batch; or the first that fits."""

DEVICE_FRACTION = 0.5
"""``auto`` keeps images on the device if they take at most this fraction of its free memory; steps need the rest."""

HOST_FRACTION = 0.5
"""``auto`` decodes files beforehand if the images then take at most this fraction of the host's free memory."""


def place(dataset: DataSet, device: torch.device | str, placement: Placement = "auto") -> DataSet:
    """Return the data set ready to train on ``device``; ``DataSet.placement`` says where its images are kept and why.

    ``auto`` on a GPU: on it if all images take at most half of its free memory (``DEVICE_FRACTION``), else in the
    host's memory, from where batches are sent ahead. On the CPU images stay where they are: in memory, or in mapped
    files. Images that are decoded for every batch (``stream``) stay so. Raise ``ValueError`` if ``placement`` is
    impossible.
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
    chosen: str = placement
    reason = "as asked for"
    if placement == "auto":
        fits = needed <= DEVICE_FRACTION * free
        in_memory = all(isinstance(store, ImageStore) for store in (dataset.train, dataset.test))
        chosen = "device" if (fits if on_gpu else in_memory) else "host"
        share = "at most" if fits else "more than"
        reason = f"{share} half of {bytes_in_words(free)} free on {device}" if on_gpu else ""
    size = bytes_in_words(needed) + f", {reason}" * bool(reason)
    if chosen == "host":
        train, test = _keep_on_host(dataset.train, device), _keep_on_host(dataset.test, device)
        text = f"images in {train.rows.location}, sent batch by batch: {size}"
        return replace(dataset, train=train, test=test, placement=text)
    if needed > free:
        raise ValueError(
            f"placement=device: the images take {bytes_in_words(needed)}, but {bytes_in_words(free)} are free on "
            f"{device}; use placement=host"
        )
    text = f"images {f'on {device}' if on_gpu else 'in memory'}: {size}"
    train_there, test_there = _copy_to(dataset.train, device), _copy_to(dataset.test, device)
    return replace(dataset, train=train_there, test=test_there, placement=text)


def _keep_on_host(store: Store, device: torch.device) -> HostStore:
    if isinstance(store, HostStore):
        return store.to(device)
    store = store.to("cpu")
    if not isinstance(store, ImageStore):
        raise ValueError(f"a store of kind {type(store).__name__} has no images that the host's memory could hold")
    rows = RowsInMemory(replace(store, crop=None))
    return HostStore(rows, store.targets.to(device), store.classes, store.skipped, store.crop)


def _copy_to(store: Store, device: torch.device) -> Store:
    return store.to(device).to_image_store() if isinstance(store, HostStore) else store.to(device)


def free_memory() -> int:
    """Return the bytes of memory that this process may still take.

    On Linux what the kernel calls available, within the limit of the process's control group; on Windows what is
    available; elsewhere all of the machine's memory.
    """
    if sys.platform == "win32":
        import ctypes

        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: two 32-bit fields, of which the first is the length
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return int(status[2])  # ullAvailPhys
    known = Path("/proc/meminfo")
    if not known.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":", 1) for line in known.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")  # of a container; a machine's own root group has no limit
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # The kernel gives inactive file cache back when memory is wanted.
        used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
        free = min(free, int(limit) - used)
    return max(free, 0)
