"""Images off the training device reach it as those on it do, in order and untouched."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vrm.data.stores import placement
from vrm.data.stores.dataset import DataSet
from vrm.data.stores.host import HostStore, RowsInMemory
from vrm.data.stores.memory import ImageStore
from vrm.data.stores.placement import free_memory, place
from vrm.data.views.policies import view_policy
from vrm.data.views.transforms import CentralCrop

POLICY = view_policy("cifar")


def store(count: int = 20, *, size: int = 8, seed: int = 0, crop: CentralCrop | None = None) -> ImageStore:
    images = torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return ImageStore(images, torch.arange(count) % 3, ("a", "b", "c"), ("x.png: broken",), crop)


def on_host(whole: ImageStore) -> HostStore:
    return HostStore(RowsInMemory(replace(whole, crop=None)), whole.targets, whole.classes, whole.skipped, whole.crop)


def dataset() -> DataSet:
    return DataSet("toy", store(20), store(7, seed=1), (0.5,) * 3, (0.2,) * 3, "cifar")


@given(
    chosen=st.none() | st.lists(st.integers(0, 19), min_size=1, max_size=25),
    sizes=st.lists(st.integers(1, 9), max_size=6),
    cropped=st.booleans(),
)
def test_host_equals_resident(chosen: list[int] | None, sizes: list[int], cropped: bool) -> None:
    whole = store(crop=CentralCrop(4) if cropped else None)
    host: HostStore | ImageStore
    host, resident = on_host(whole), whole
    if chosen is not None:
        host, resident = host.select(torch.tensor(chosen)), resident.select(torch.tensor(chosen))
    assert host.hash == resident.hash
    assert (len(host), host.image_size, host.stored_size) == (len(resident), resident.image_size, resident.stored_size)
    assert (host.classes, host.skipped, host.num_bytes) == (resident.classes, resident.skipped, resident.num_bytes)
    assert torch.equal(host.targets, resident.targets)
    generator = torch.Generator().manual_seed(len(sizes))
    batches = [torch.randint(0, len(host), (size,), generator=generator) for size in sizes]
    fed = list(host.batches(batches, epoch=1, seed=0, policy=POLICY, num_virtual=1))
    read = list(host.read(batches))
    assert len(fed) == len(read) == len(batches)
    for batch, (index, *images), (same, seen) in zip(batches, fed, read, strict=True):
        assert torch.equal(index, batch)
        assert torch.equal(same, batch)
        assert len(images) == 1
        assert torch.equal(images[0], resident.images[batch])
        assert torch.equal(seen, resident.batch(batch))
        assert torch.equal(host.batch(batch), resident.batch(batch))
    back = host.to_image_store()
    assert torch.equal(back.images, resident.images)
    assert back.hash == resident.hash


@pytest.mark.parametrize("kind", [lambda s: s, on_host])
def test_scan_goes_through_the_split_in_order(kind: object) -> None:
    split = kind(store())  # type: ignore[operator]
    parts = list(split.scan(6))
    assert [len(index) for index, _ in parts] == [6, 6, 6, 2]
    assert torch.equal(torch.cat([index for index, _ in parts]), torch.arange(20))
    assert torch.equal(torch.cat([images for _, images in parts]), store().images)
    assert torch.cat([index for index, _ in split.scan(4, 3, 9)]).tolist() == [3, 4, 5, 6, 7, 8]
    assert list(split.scan(4, 20)) == []


def test_a_feed_can_be_left_early() -> None:
    split, before = on_host(store()), threading.active_count()
    feeding = split.batches([torch.tensor([i]) for i in range(20)], epoch=1, seed=0, policy=POLICY, num_virtual=0)
    assert next(feeding)[0].tolist() == [0]
    feeding.close()
    assert threading.active_count() == before


def test_placement_on_the_cpu() -> None:
    data = dataset()
    for where in ("auto", "device"):
        placed = place(data, "cpu", where)  # type: ignore[arg-type]
        assert isinstance(placed.train, ImageStore)
        assert isinstance(placed.test, ImageStore)
        assert placed.placement.startswith("images in memory: 5.18 kB")
    host = place(data, "cpu", "host")
    assert isinstance(host.train, HostStore)
    assert isinstance(host.test, HostStore)
    assert host.placement == "images in host memory, sent batch by batch: 5.18 kB, as asked for"
    assert (host.train.hash, host.test.hash) == (data.train.hash, data.test.hash)
    assert isinstance(place(host, "cpu").train, HostStore)
    again = place(host, "cpu", "device")
    assert isinstance(again.train, ImageStore)
    assert again.train.hash == data.train.hash
    with pytest.raises(ValueError, match="placement must be one of auto, device, host, stream, got 'disk'"):
        place(data, "cpu", "disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images of toy are decoded already; use placement=auto, device or host"):
        place(data, "cpu", "stream")


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"take 5.18 kB, but 100 B are free on cpu; use placement=host"):
        place(dataset(), "cpu", "device")


@pytest.mark.parametrize(("free", "where"), [(2 * 27 * 192, "device"), (2 * 27 * 192 - 1, "host")])
def test_a_gpu_takes_half_of_its_free_memory(free: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    monkeypatch.setattr(ImageStore, "to", lambda self, device: self)
    monkeypatch.setattr(Tensor, "to", lambda self, *_, **__: self)
    placed = place(dataset(), "cuda:0")
    assert isinstance(placed.train, ImageStore if where == "device" else HostStore)
    share = "at most half" if where == "device" else "more than half"
    assert placed.placement.startswith("images on cuda:0" if where == "device" else "images in host memory")
    assert placed.placement.endswith(f"{share} of 10.4 kB free on cuda:0")


def test_free_memory_is_that_of_the_machine_at_most() -> None:
    import os

    assert 0 < free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("placement", ["auto", "device", "host"])
def test_a_gpu_gets_the_same_views(placement: str) -> None:
    data = DataSet("toy", store(300, size=32), store(7, size=32, seed=1), (0.5,) * 3, (0.2,) * 3, "cifar")
    placed = place(data, "cuda", placement)  # type: ignore[arg-type]
    assert isinstance(placed.train, HostStore if placement == "host" else ImageStore)
    assert placed.train.targets.device.type == "cuda"
    index = torch.arange(300).flip(0)
    expected = POLICY(data.train.batch(index), index, epoch=2, seed=1, num_virtual=2)
    made = []
    options = {"epoch": 2, "seed": 1, "num_virtual": 2}
    for batch, *images in placed.train.batches(torch.split(index.cuda(), 17), policy=POLICY, **options):  # type: ignore[arg-type]
        made.append(POLICY(images[0] if images else placed.train.batch(batch), batch, **options))
    for view, whole in enumerate(expected):
        assert torch.equal(torch.cat([views[view] for views in made]).cpu(), whole)
    seen = torch.cat([images for _, images in placed.train.scan(64)])
    assert torch.equal(seen.cpu(), data.train.batch(torch.arange(300)))


@pytest.mark.cuda
def test_what_is_sent_stays_until_it_is_used() -> None:
    """A slow consumer: memory that is given back too early would be written over by later batches."""
    data = store(64, size=64)
    host = HostStore(RowsInMemory(data), data.targets.cuda(), data.classes)
    batches = torch.split(torch.arange(64).cuda(), 8)
    sums = []
    for _, images in host.batches(batches * 20, epoch=1, seed=0, policy=POLICY, num_virtual=0):
        torch.cuda._sleep(1_000_000)
        sums.append(images.long().sum())
        del images
    expected = [data.images[start : start + 8].long().sum() for start in range(0, 64, 8)] * 20
    assert torch.equal(torch.stack(sums).cpu(), torch.stack(expected))
