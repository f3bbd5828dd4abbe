"""Packs give back what went in, or say which file is damaged; what was made once is not made again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from vrm.data import load, place
from vrm.data.datasets.packed import open_pack
from vrm.data.formats import pack as format
from vrm.data.formats.pack import MANIFEST, DamagedPack, is_pack, verify
from vrm.data.stores import pack as module
from vrm.data.stores.dataset import DataSet, epoch_batches
from vrm.data.stores.host import HostStore
from vrm.data.stores.memory import ImageStore
from vrm.data.stores.pack import write_pack as pack
from vrm.data.views.policies import view_policy

NAMES = ["pack.json", "test-00000.safetensors", *(f"train-0000{number}.safetensors" for number in range(4))]


def store(count: int, size: tuple[int, int], seed: int, skipped: tuple[str, ...] = ()) -> ImageStore:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)
    return ImageStore(images, torch.randint(0, 3, (count,), generator=generator), ("a", "b", "ü c"), skipped)


def dataset(count: int = 20, size: tuple[int, int] = (5, 7), seed: int = 0) -> DataSet:
    train, test = store(count, size, seed, ("a/x.png: broken",)), store(6, size, seed + 1)
    return DataSet("toy", train, test, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "digits")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six images each."""
    monkeypatch.setattr(module, "_SHARD_BYTES", 6 * 3 * 5 * 7)
    monkeypatch.setattr(module, "_BATCH", 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pack of 20 and 6 images in 4 and 1 shards."""
    assert pack(dataset(), tmp_path / "pack") == 5
    return tmp_path / "pack"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def everything(data: DataSet) -> None:
    for split in (data.train, data.test):
        for _ in split.scan(5):
            pass


@given(
    count=st.integers(1, 30),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    shard=st.integers(1, 600),
    batches=st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=9), max_size=4),
)
def test_what_comes_out_went_in(
    count: int,
    size: tuple[int, int],
    shard: int,
    batches: list[list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, data = tmp_path_factory.mktemp("packs") / "pack", dataset(count, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SHARD_BYTES", shard)
        pack(data, folder)
    found = open_pack(folder)
    assert (found.name, found.classes, found.mean, found.std) == (data.name, data.classes, data.mean, data.std)
    assert (found.view_policy, found.image_size) == (data.view_policy, data.image_size)
    for there, here in ((found.train, data.train), (found.test, data.test)):
        assert isinstance(there, HostStore)
        assert there.hash == here.hash
        assert there.skipped == here.skipped
        assert torch.equal(there.targets, here.targets)
        assert torch.equal(torch.cat([images for _, images in there.scan(7)]), here.batch(torch.arange(len(here))))
    wanted = [torch.tensor(rows) % count for rows in batches]
    for rows, (index, images) in zip(wanted, found.train.read(wanted), strict=True):
        assert torch.equal(index, rows)
        assert torch.equal(images, data.train.batch(rows))
    assert verify(folder) == len(list(folder.glob("*.safetensors")))


def test_every_placement_gives_the_same_views(folder: Path) -> None:
    data, packed, policy = dataset(), open_pack(folder), view_policy("cifar", padding=1)
    batches, options = epoch_batches(20, 6, seed=1, epoch=2), {"epoch": 2, "seed": 1, "num_virtual": 1}
    mapped, resident = place(packed, "cpu"), place(packed, "cpu", "device")
    assert isinstance(mapped.train, HostStore)
    assert mapped.placement == f"images in {folder}, mapped files, sent batch by batch: 2.73 kB"
    assert isinstance(resident.train, ImageStore)
    assert mapped.train.hash == resident.train.hash == data.train.hash
    for split in (mapped.train, place(packed, "cpu", "host").train, resident.train):
        fed = split.batches(batches, policy=policy, **options)  # type: ignore[arg-type]
        for batch, (index, *images) in zip(batches, fed, strict=True):
            made = policy(images[0] if images else split.batch(index), index, **options)  # type: ignore[arg-type]
            expected = policy(data.train.batch(batch), batch, **options)  # type: ignore[arg-type]
            assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))
    with pytest.raises(ValueError, match="images of toy are decoded already"):
        place(packed, "cpu", "stream")


def test_shards_are_safetensors(folder: Path) -> None:
    images, targets = [], []
    for number in range(4):
        with safe_open(folder / f"train-0000{number}.safetensors", "pt") as tensors:
            images.append(tensors.get_tensor("images"))
            targets.append(tensors.get_tensor("targets"))
    data = dataset()
    assert torch.equal(torch.cat(images), data.train.batch(torch.arange(20)))
    assert torch.equal(torch.cat(targets), data.train.targets)
    assert sorted(files(folder)) == NAMES


# ---- made in part ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Takes the place of a signal that cannot be caught."""


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_pack_interrupted_anywhere_goes_on(
    call: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real = files(folder), getattr(os, call)
    made: list[int] = []
    for moment in range(100):
        here, left = tmp_path / f"{call}{moment}", iter(range(moment))

        def sometimes(*arguments: Any, left: Iterator[int] = left) -> Any:
            if next(left, None) is None:
                raise Killed
            return real(*arguments)

        monkeypatch.setattr("vrm.files.os", type("os", (), {**vars(os), call: staticmethod(sometimes)}))
        try:
            pack(dataset(), here)
        except Killed:
            if is_pack(here) and files(here) != whole:
                with pytest.raises(ValueError, match=r"unfinished \(\d of 5 shards made\); repeat the command"):
                    open_pack(here)
        else:
            assert moment > 10
            break
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(module, "_SHARD_BYTES", 6 * 3 * 5 * 7)
            monkeypatch.setattr(module, "_BATCH", 4)
        made.append(pack(dataset(), here))
        assert files(here) == whole
    assert made == sorted(made, reverse=True)
    assert made[0] == 5


def test_a_full_disk_is_told_and_what_was_made_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    here, real, left = tmp_path / "here", os.fsync, iter(range(9))

    def full(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot be written to .*here \(No space left on device\).*is kept"):
        pack(dataset(), here)
    monkeypatch.setattr(os, "fsync", real)
    assert not [name for name in files(here) if name.endswith(".tmp")]
    assert 0 < pack(dataset(), here) < 5
    assert files(here) == files(folder)


def test_room_is_looked_for_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _: 26 * 105 - 1)
    with pytest.raises(ValueError, match=r"the pack takes 2.73 kB, but 2.73 kB are free in .*smaller data\.size"):
        pack(dataset(), tmp_path / "here")


def test_what_is_whole_stays(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    told: list[tuple[int, int]] = []
    assert pack(dataset(), folder, progress=lambda done, total: told.append((done, total))) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == before
    assert told[-1] == (26, 26)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (dataset(size=(7, 5)), r"size: \(5, 7\) there, \(7, 5\) given"),
        (dataset(seed=5), r"train images\)"),
        (replace(dataset(), test=store(6, (5, 7), 9)), r"test images\)"),
        (replace(dataset(), name="doll"), "data set: toy there, doll given"),
    ],
)
def test_a_pack_of_other_data_is_left_alone(other: DataSet, words: str, folder: Path) -> None:
    before = files(folder)
    with pytest.raises(ValueError, match=f"holds a pack of other data .*{words}"):
        pack(other, folder)
    assert files(folder) == before


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds .*notes\.txt; name an empty folder"):
        pack(dataset(), tmp_path)
    file = tmp_path / "notes.txt"
    with pytest.raises(ValueError, match="cannot be written to"):
        pack(dataset(), file)
    assert sorted(files(tmp_path)) == ["notes.txt"]


def test_whole_images_are_packed_whatever_evaluation_sees(folder: Path, tmp_path: Path) -> None:
    data = open_pack(folder, views="imagenet")
    assert data.image_size == (224, 224)
    assert data.train.stored_size == (5, 7)
    assert pack(data, tmp_path / "other") == 5
    again = open_pack(tmp_path / "other")
    assert (again.train.hash, again.test.hash, again.view_policy) == (data.train.hash, data.test.hash, "imagenet")


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES[:3])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(name: str, share: float, bit: int, folder: Path) -> None:
    whole = (folder / name).read_bytes()
    content = bytearray(whole)
    content[int(share * len(content))] ^= 1 << bit
    (folder / name).write_bytes(content)
    with contextlib.suppress(ValueError):
        if name == MANIFEST and json.loads(content) == json.loads(whole):  # white space alone changed
            return
    with pytest.raises(DamagedPack, match=name.replace(".", r"\.")):
        everything(open_pack(folder))
    with pytest.raises(DamagedPack, match=name.replace(".", r"\.")):
        verify(folder)
    made = pack(dataset(), folder)
    assert made == (5 if name == MANIFEST else 1)
    assert (folder / name).read_bytes() == whole
    assert verify(folder) == 5


@pytest.mark.parametrize(("name", "kept"), [(name, kept) for name in NAMES[:3] for kept in (None, 0, 0.25, 0.99, -1)])
def test_a_file_cut_off_or_lost_is_found(name: str, kept: float | None, folder: Path) -> None:
    file = folder / name
    content = file.read_bytes()
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(content[: -1 if kept == -1 else int(kept * len(content))])
    with pytest.raises(DamagedPack, match=name.replace(".", r"\.")):
        open_pack(folder)
    if not (name == MANIFEST and kept is None):
        pack(dataset(), folder)
        everything(open_pack(folder))


def test_a_manifest_that_was_edited_is_refused(folder: Path) -> None:
    file = folder / MANIFEST
    told = json.loads(file.read_bytes())
    for change in ({"classes": ["b", "a", "ü c"]}, {"mean": [0, 0, 0]}, {"name": "other"}):
        file.write_text(json.dumps({**told, "pack": {**told["pack"], **change}}))
        with pytest.raises(DamagedPack, match="its checksum differs"):
            open_pack(folder)
    later = {**told["pack"], "format": "vrm pack 2"}
    file.write_text(json.dumps({"sha256": format._sum_json(later), "pack": later}))
    with pytest.raises(ValueError, match="of the kind 'vrm pack 2', not 'vrm pack 1'"):
        open_pack(folder)


def test_an_image_is_checked_at_its_first_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = open_pack(folder), []
    crc32 = module.zlib.crc32
    monkeypatch.setattr(module, "zlib", type("zlib", (), {"crc32": lambda data: seen.append(1) or crc32(data)}))
    for expected in (3, 3, 4):
        data.train.batch(torch.tensor([1, 9, 17] if expected == 3 else [1, 9, 18]))
        assert len(seen) == expected


# ---- as a data set --------------------------------------------------------------------------------------------------


def test_a_pack_is_loaded_by_its_name(tmp_path: Path) -> None:
    digits, folder = load("digits"), tmp_path / "pack"
    pack(digits, folder)
    for name in ("digits", "packed"):
        found = load(name, root=folder)
        assert found.name == "digits"
        assert (found.mean, found.std, found.view_policy) == (digits.mean, digits.std, digits.view_policy)
        assert (found.train.hash, found.test.hash) == (digits.train.hash, digits.test.hash)
    few, expected = load("packed", root=folder, size=8, labels_per_class=4), load("digits", labels_per_class=4)
    assert few.train.hash == expected.train.hash
    assert torch.equal(few.train.batch(torch.arange(40)), expected.train.batch(torch.arange(40)))
    assert load("packed", root=folder, views="imagenet").image_size == (224, 224)
    with pytest.raises(ValueError, match=r"is a pack of digits, not of cifar10; give data=digits or data=packed"):
        load("cifar10", root=folder)
    with pytest.raises(ValueError, match=r"data\.size=16, but the images in .* are packed at 8 x 8 pixels"):
        load("packed", root=folder, size=16)
    with pytest.raises(ValueError, match=r"data\.views=flip: unknown view policy"):
        load("packed", root=folder, views="flip")
    with pytest.raises(ValueError, match="no packed images in"):
        load("packed", root=tmp_path)


MEASURE = """
import sys, torch
from vrm.data import place, load

def own():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return int(lines["RssAnon"].split()[0]) * 1024

load("digits")
before = own()
data = place(load("packed", root=sys.argv[1]), "cpu")
opened = own()
index = torch.arange(0, len(data.train), len(data.train) // 20)
data.train.batch(index)
print(opened - before, own() - before, data.train.num_bytes)
"""


def test_a_pack_takes_no_memory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 1 << 24)
    pack(dataset(5000, (64, 64)), tmp_path / "pack")
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "pack"], capture_output=True, text=True, check=True
    ).stdout
    opened, read, size = map(int, told.split())
    assert size > 60e6
    assert opened < 1e6
    assert read < 8e6


def test_a_pack_that_failed_at_its_first_image_may_be_made_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the advice of the failure says: with another size."""

    def refuse(self: ImageStore, *where: int) -> Iterator[Any]:
        raise ValueError("images of two sizes; give data.size=N")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "scan", refuse)
        with pytest.raises(ValueError, match="two sizes"):
            pack(dataset(size=(6, 7)), tmp_path / "pack")
    assert is_pack(tmp_path / "pack")
    assert pack(dataset(), tmp_path / "pack") == 5
