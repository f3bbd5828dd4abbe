"""Images decoded for every batch: the same pixels as decoded beforehand, whoever decodes them, whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vrm.data import ImageStore, Store, epoch_batches, load, place
from vrm.data.formats.folders import find_class_folders
from vrm.data.formats.images import BadImage, decode
from vrm.data.stores import decoding, stream
from vrm.data.stores.decoding import Decoder, DecodingError
from vrm.data.stores.stream import StreamStore, stream_files
from vrm.data.views.policies import ViewPolicy, view_policy
from vrm.data.views.transforms import CentralCrop, RandomResizedCrop

RESIZED = view_policy("imagenet", size=12)
PADDED = view_policy("cifar")
SIZES = [(9, 14), (30, 21), (40, 40), (12, 12), (13, 50), (25, 8)]


def write(file: Path, size: tuple[int, int], seed: int) -> None:
    """A smooth picture of this height and width."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rough = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(rough).resize(size[::-1], Image.Resampling.BICUBIC).save(file)


def tree(root: Path, sizes: Sequence[tuple[int, int]], *, count: int = 23) -> Path:
    """Class folders of pictures of these sizes in turn, of several formats and modes."""
    for number in range(count):
        suffix = ("jpg", "png", "jpeg", "webp")[number % 4]
        write(root / "train" / "ab"[number % 2] / f"{number:02d}.{suffix}", sizes[number % len(sizes)], number)
    for number in range(7):
        write(root / "test" / "ab"[number % 2] / f"{number}.png", sizes[number % len(sizes)], 100 + number)
    return root


@pytest.fixture(scope="module")
def one_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("one"), [(20, 26)])


@pytest.fixture(scope="module")
def all_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tree(tmp_path_factory.mktemp("all"), SIZES)
    Image.open(root / "train" / "a" / "02.jpeg").convert("L").save(root / "train" / "a" / "02.jpeg")
    return root


@pytest.fixture(scope="module")
def decoders() -> dict[int, Decoder]:
    """Started once, used by all that do not harm them."""
    return {count: Decoder(count) for count in (0, 1, 2)}


def splits(
    root: Path, decoders: Decoder, *, size: int | None = None, crop: CentralCrop | None = None
) -> list[StreamStore]:
    found = find_class_folders(root)
    assert found is not None
    streams = stream_files(found, lambda files: files.read(), placement="stream", size=size, num_workers=0)
    assert streams is not None
    return [replace(store, decoder=decoders, crop=crop) for store in streams[:2]]


def views(
    store: Store, batches: Sequence[Tensor], policy: ViewPolicy, *, epoch: int = 3, seed: int = 5, num_virtual: int = 2
) -> list[tuple[Tensor, ...]]:
    """All views of all batches, as a training step makes them."""
    made = []
    for index, *images in store.batches(batches, epoch=epoch, seed=seed, policy=policy, num_virtual=num_virtual):
        given = images if store.crops(policy) else images[0] if images else store.batch(index)
        made.append(policy(given, index, epoch=epoch, seed=seed, num_virtual=num_virtual))
    return made


def same(one: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(x, y) for xs, ys in pairs for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("policy", [RESIZED, PADDED], ids=lambda policy: policy.name)
@pytest.mark.parametrize("size", [None, 16])
def test_placement_changes_no_pixel(
    count: int, policy: ViewPolicy, size: int | None, one_size: Path, decoders: dict[int, Decoder]
) -> None:
    decoded = load("folder", root=one_size, size=size, placement="device")
    train, test = splits(one_size, decoders[count], size=size)
    batches = epoch_batches(len(train), 7, seed=5, epoch=3)
    expected = views(place(decoded, "cpu").train, batches, policy)
    assert same(expected, views(place(decoded, "cpu", "host").train, batches, policy))
    assert same(expected, views(train, batches, policy))
    assert torch.equal(train.targets, decoded.train.targets)
    seen = torch.cat([images for _, images in test.scan(3)])
    assert torch.equal(seen, decoded.test.batch(torch.arange(len(test))))
    assert torch.equal(test.batch(torch.tensor([4, 1])), seen[[4, 1]])
    assert (train.image_size, train.classes) == (decoded.image_size, decoded.classes)
    assert torch.equal(train.histogram(torch.arange(23)), decoded.train.histogram(torch.arange(23)))


@pytest.mark.parametrize("num_virtual", [0, 1, 3])
def test_boxes_are_drawn_with_the_size_of_the_file(
    num_virtual: int, all_sizes: Path, decoders: dict[int, Decoder]
) -> None:
    train, _ = splits(all_sizes, decoders[2])
    batches = epoch_batches(len(train), 10, seed=5, epoch=3)
    for index, *images in train.batches(batches, epoch=3, seed=5, policy=RESIZED, num_virtual=num_virtual):
        assert len(images) == 1 + num_virtual
        made = RESIZED(images, index, epoch=3, seed=5, num_virtual=num_virtual)
        for row, sample in enumerate(index.tolist()):
            file = Path(train.file(sample))
            alone = torch.from_numpy(decode(file, "", size=None))[None]
            expected = RESIZED(alone, index[row : row + 1], epoch=3, seed=5, num_virtual=num_virtual)
            for view, whole in zip(made, expected, strict=True):
                assert torch.equal(view[row], whole[0]), file


def test_what_is_held_at_once_changes_nothing(
    all_sizes: Path, decoders: dict[int, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = splits(all_sizes, decoders[0])
    batches = epoch_batches(len(train), 10, seed=5, epoch=3)
    expected = views(train, batches, RESIZED)
    for held, part in ((0, 32), (4000, 32), (1 << 26, 3)):
        monkeypatch.setattr(decoding, "_HELD", held)
        monkeypatch.setattr(stream, "REQUEST_SIZE", part)
        assert same(expected, views(train, batches, RESIZED))


@given(
    cut=st.integers(0, 5),
    size=st.integers(1, 9),
    chosen=st.none() | st.lists(st.integers(0, 22), min_size=1, max_size=30),
    epoch=st.integers(0, 500),
)
def test_an_epoch_resumed_goes_on_as_it_would_have(
    cut: int, size: int, chosen: list[int] | None, epoch: int, all_sizes: Path, decoders: dict[int, Decoder]
) -> None:
    (train, _), (other, _) = splits(all_sizes, decoders[2]), splits(all_sizes, decoders[0])
    if chosen is not None:
        train, other = train.select(torch.tensor(chosen)), other.select(torch.tensor(chosen))
        assert train.targets.tolist() == [splits(all_sizes, decoders[0])[0].targets[i] for i in chosen]
    batches = epoch_batches(len(train), size, seed=5, epoch=epoch)
    whole = views(train, batches, RESIZED, epoch=epoch)
    assert same(whole[cut:], views(other, batches[cut:], RESIZED, epoch=epoch))


def test_readers_do_not_disturb_each_other(all_sizes: Path, decoders: dict[int, Decoder]) -> None:
    train, test = splits(all_sizes, decoders[2], crop=CentralCrop(12))
    batches = epoch_batches(len(train), 2, seed=5, epoch=3)
    options = {"epoch": 3, "seed": 5, "policy": RESIZED, "num_virtual": 1}
    expected = list(train.batches(batches, **options))  # type: ignore[arg-type]
    evaluated = list(test.scan(2))
    abandoned = train.batches(batches, **options)  # type: ignore[arg-type]
    next(abandoned)
    abandoned.close()
    kept = train.batches(batches, **options)  # type: ignore[arg-type]
    found = []
    for number, item in enumerate(kept):
        found.append(item)
        if number % 4 == 0:
            assert same(evaluated, list(test.scan(2)))
    assert same(expected, found)


def test_nothing_is_drawn_from_global_generators(all_sizes: Path, decoders: dict[int, Decoder]) -> None:
    state = torch.get_rng_state()
    views(splits(all_sizes, decoders[2])[0], [torch.arange(5)], RESIZED)
    assert torch.equal(state, torch.get_rng_state())


# ---- evaluation ------------------------------------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    side=st.integers(1, 20),
    resample=st.sampled_from(["bilinear", "bicubic"]),
    scale=st.sampled_from([1.0, 8 / 7]),
)
def test_the_centre_is_the_same_for_tensors_and_files(
    size: tuple[int, int], side: int, resample: str, scale: float
) -> None:
    image = np.random.default_rng(side).integers(0, 256, (*size, 3), dtype=np.uint8)
    crop = CentralCrop(side, resample, scale)  # type: ignore[arg-type]
    expected = np.asarray(decoding.crop_centre(Image.fromarray(image), crop)).transpose(2, 0, 1)
    made = crop(torch.from_numpy(image).permute(2, 0, 1)[None].contiguous())[0]
    assert torch.equal(made, torch.from_numpy(expected.copy()))


def test_the_centre_is_the_literatures() -> None:
    crop = CentralCrop(224)
    assert (crop.scaled(375, 500), crop.corner(256, 341)) == ((256, 341), (16, 58))
    assert (crop.scaled(500, 375), crop.scaled(224, 224), crop.scaled(256, 256)) == ((341, 256), (224, 224), (256, 256))
    image = torch.arange(256 * 256).remainder(251).to(torch.uint8).view(1, 1, 256, 256)
    assert torch.equal(crop(image), image[:, :, 16:240, 16:240])


def test_evaluation_sees_the_centre(all_sizes: Path, one_size: Path) -> None:
    streams = load("folder", root=all_sizes, views="imagenet", placement="stream", num_workers=0)
    assert (streams.image_size, streams.train.image_size) == ((224, 224), (224, 224))
    assert RandomResizedCrop(224).size == 224
    lazy = load("folder", root=one_size, views="imagenet", placement="stream", num_workers=0).test
    eager = load("folder", root=one_size, views="imagenet", placement="device")
    assert eager.image_size == (224, 224)
    assert torch.equal(lazy.batch(torch.arange(7)), eager.test.batch(torch.arange(7)))
    host = place(eager, "cpu", "host").test
    assert torch.equal(host.batch(torch.arange(7)), eager.test.batch(torch.arange(7)))
    assert host.hash == eager.test.hash != load("folder", root=one_size).test.hash


# ---- what cannot be decoded -----------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    root = tree(tmp_path / "data", SIZES)
    for name in ("b/03.webp", "a/10.jpeg"):
        file = root / "train" / name
        file.write_bytes(file.read_bytes()[:40])
    return root


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_bad_image_is_named(count: int, damaged: Path, decoders: dict[int, Decoder]) -> None:
    train, _ = splits(damaged, decoders[count])
    order = [Path(train.file(row)).name for row in range(len(train))]
    first, second = order.index("10.jpeg"), order.index("03.webp")
    good = [row for row in range(23) if row not in (first, second)]
    batches = [torch.tensor(good[:6]), torch.tensor([good[6], second, first]), torch.tensor(good[7:])]
    feed = train.batches(batches, epoch=1, seed=0, policy=RESIZED, num_virtual=1)
    assert torch.equal(next(feed)[0], batches[0])
    with pytest.raises(BadImage, match=r"train/b/03\.webp: no readable image.*data\.bad_images=skip"):
        next(feed)
    assert len(views(train, batches[2:], RESIZED)) == 1, "the workers go on"


def test_bad_images_are_left_out_or_listed(damaged: Path) -> None:
    options = {"root": damaged, "placement": "stream", "num_workers": 0, "views": "imagenet"}
    with pytest.warns(UserWarning, match="2 bad images left out"):
        skipped = load("folder", bad_images="skip", **options)  # type: ignore[arg-type]
    assert len(skipped.train) == 21
    assert [line.split(":")[0] for line in skipped.train.skipped] == ["train/a/10.jpeg", "train/b/03.webp"]
    assert len(list(skipped.train.scan(5))) == 5
    with pytest.raises(ValueError, match=r"2 of 30 images are bad.*\n.*10\.jpeg.*\n.*03\.webp"):
        load("folder", bad_images="report", **options)  # type: ignore[arg-type]


def test_images_of_one_size_are_wanted_where_nothing_resizes_them(
    all_sizes: Path, decoders: dict[int, Decoder]
) -> None:
    train, _ = splits(all_sizes, decoders[2])
    with pytest.raises(ValueError, match=r"is 40x40 pixels, but all images must be 9x14 .*data\.size=N"):
        views(train, [torch.arange(5)], PADDED)


def processes(decoder: Decoder) -> list[BaseProcess]:
    """The workers, which wait for requests."""
    return decoder._idle[-1].processes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_left_to_the_process_that_trains(
    number: int, all_sizes: Path, decoders: dict[int, Decoder]
) -> None:
    train, _ = splits(all_sizes, decoders[2])
    views(train, [torch.arange(9)], RESIZED)
    workers = list(processes(decoders[2]))
    for worker in workers:
        os.kill(worker.pid or 0, number)
    views(train, epoch_batches(len(train), 4, seed=5, epoch=3), RESIZED)
    assert processes(decoders[2]) == workers
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def at(pool: Any, name: str, number: int) -> Thread:
    """Send a signal to the worker that decodes the file of this name, once one does."""

    def send() -> None:
        while True:
            for worker, process in enumerate(pool.processes):
                if pool.answers.status[worker, 0] == 1 and pool.answers.file(worker).endswith(name):
                    os.kill(process.pid, number)
                    return
            time.sleep(0.005)

    thread = Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, r"ended by signal SIGKILL, at .*train/b/large\.png\. .*fewer data\.workers"),
        (signal.SIGSTOP, r"finished no image for 2 s, at .*train/b/large\.png\. .*does the disk answer"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_reported_with_its_image(number: int, words: str, tmp_path: Path) -> None:
    root = tree(tmp_path / "data", SIZES)
    Image.new("RGB", (9000, 9000)).save(root / "train" / "b" / "large.png")  # takes a second
    decoder = Decoder(2)
    train, _ = splits(root, decoder)
    views(train, [torch.arange(9)], RESIZED)
    decoder.timeout = 2
    (pool,) = decoder._idle
    killer = at(pool, "large.png", number)
    with pytest.raises(DecodingError, match=words):
        views(train, [torch.arange(24)] * 4, RESIZED)
    killer.join()
    with pytest.raises(DecodingError, match=words):
        views(train, [torch.arange(9)], RESIZED)
    assert not any(process.is_alive() for process in pool.processes)


def test_a_worker_that_dies_between_images_is_reported(all_sizes: Path) -> None:
    decoder = Decoder(1)
    train, _ = splits(all_sizes, decoder)
    views(train, [torch.arange(9)], RESIZED)
    processes(decoder)[0].kill()
    with pytest.raises(DecodingError, match=r"ended by signal SIGKILL, after .*train/[ab]/"):
        views(train, [torch.arange(9)], RESIZED)


def test_workers_end_with_those_who_need_them(all_sizes: Path) -> None:
    decoder = Decoder(1)
    train, _ = splits(all_sizes, decoder)
    views(train, [torch.arange(9)], RESIZED)
    (process,) = processes(decoder)
    del decoder, train, _
    process.join(10)
    assert not process.is_alive()


SCRIPT = """
import multiprocessing, sys, torch
from pathlib import Path
from vrm.data import load
from vrm.data.views.policies import view_policy

def main():
    train = load("folder", root=Path(sys.argv[1]), placement="stream", num_workers=1, size=16).train
    batches = train.batches([torch.arange(4)] * 50, epoch=1, seed=0, policy=view_policy("cifar"), num_virtual=1)
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.read()
    return train, batches

"""


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_workers_end_with_the_process(end: str, all_sizes: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT + "if __name__ == '__main__':\n    kept = main()")
    with subprocess.Popen(
        [sys.executable, script, all_sizes, "wait" if end == "killed" else "end"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        if end == "killed":
            process.kill()
        else:
            assert process.wait(60) == 0
        deadline = time.monotonic() + 30
        while Path(f"/proc/{worker}").exists() and "zombie" not in Path(f"/proc/{worker}/status").read_text():
            assert time.monotonic() < deadline, "the worker lives on"
            time.sleep(0.05)


def test_a_script_without_a_guard_is_told_what_it_needs(all_sizes: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT + "main()")
    done = subprocess.run([sys.executable, script, all_sizes, "end"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "DecodingError: a decoding process ended with exit code 1, before its first image" in done.stderr
    assert "if __name__ == '__main__'" in done.stderr


# ---- which data are streamed ----------------------------------------------------------------------------------------


def test_auto_streams_what_would_fill_the_memory(one_size: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 30 * 3 * 20 * 26
    monkeypatch.setattr(stream, "free_memory", lambda: 2 * needed)
    assert isinstance(load("folder", root=one_size).train, ImageStore)
    monkeypatch.setattr(stream, "free_memory", lambda: 2 * needed - 1)
    data = load("folder", root=one_size, num_workers=1)
    assert isinstance(data.train, StreamStore)
    assert data.placement.endswith("by one process: decoded they take 46.8 kB, more than half of 93.6 kB free")
    assert place(data, "cpu").placement == data.placement
    assert isinstance(place(data, "cpu", "stream").train, StreamStore)
    assert isinstance(load("folder", root=one_size, placement="host").train, ImageStore)
    assert isinstance(load("folder", root=one_size, size=4).train, ImageStore)
    with pytest.raises(ValueError, match="decoded anew for every batch; load them with placement=host"):
        place(data, "cpu", "host")


def test_only_files_of_images_are_streamed() -> None:
    with pytest.raises(
        ValueError, match="these data are kept otherwise; use placement=auto, device or host, or make a pack"
    ):
        load("digits", placement="stream")


def test_statistics_and_labels_are_those_of_decoded_images(one_size: Path) -> None:
    for size in (None, 16):
        eager = load("folder", root=one_size, size=size, labels_per_class=3)
        lazy = load("folder", root=one_size, size=size, labels_per_class=3, placement="stream", num_workers=0)
        assert (lazy.mean, lazy.std) == (eager.mean, eager.std)
        assert torch.equal(lazy.train.targets, eager.train.targets)
        assert torch.equal(lazy.train.batch(torch.arange(6)), eager.train.batch(torch.arange(6)))


def test_a_fixed_size_is_held_to(tmp_path: Path, decoders: dict[int, Decoder]) -> None:
    root = tree(tmp_path, [(32, 32)])
    write(root / "train" / "a" / "04.jpg", (31, 32), 0)
    found = find_class_folders(root)
    assert found is not None
    fixed = replace(found, image_size=(32, 32))
    for size in (None, 16):
        streams = stream_files(fixed, lambda files: files.read(), placement="stream", size=size, num_workers=0)
        assert streams is not None
        assert streams.train.image_size == (size or 32,) * 2
        with pytest.raises(ValueError, match=r"04\.jpg is 31x32 pixels, but all images must be 32x32"):
            views(streams.train, [torch.arange(23)], RESIZED)
        assert len(views(streams.test, [torch.arange(7)], RESIZED)) == 1


def test_the_hash_is_of_names_sizes_content_labels_and_settings(
    all_sizes: Path, tmp_path: Path, decoders: dict[int, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(all_sizes, root)

    def found(**options: object) -> str:
        return splits(root, decoders[0], **options)[0].hash  # type: ignore[arg-type]

    first = splits(all_sizes, decoders[2])[0]
    assert first.hash == found() == first.to("cpu").hash == replace(first, decoder=Decoder(0)).hash
    others = {found(size=9), found(crop=CentralCrop(9)), first.select(torch.arange(22)).hash}
    os.rename(root / "train/a/00.jpg", root / "train/a/0.jpg")
    others.add(found())
    os.rename(root / "train/a/0.jpg", root / "train/b/00.jpg")
    others.add(found())
    os.rename(root / "train/b/00.jpg", root / "train/a/00.jpg")
    assert found() == first.hash
    file = root / "train/a/00.jpg"
    good = file.read_bytes()
    file.write_bytes(good + b"0")
    others.add(found())
    changed = good[:-1] + bytes([good[-1] ^ 1])  # of equal size
    file.write_bytes(changed)
    others.add(found())
    file.unlink()
    others.add(found())
    assert len(others | {first.hash}) == 9

    # of much data some files are read: the first, and others all over the split
    total = sum(Path(first.file(row)).stat().st_size for row in range(len(first)))
    monkeypatch.setattr(stream, "_HASHED", -(-total // 4))
    read: list[Path] = []
    real = stream.fingerprint
    monkeypatch.setattr(stream, "fingerprint", lambda path: read.append(path) or real(path))
    file.write_bytes(good)
    whole = found()
    assert sorted(read) == [Path(root / "train", *Path(first.file(row)).parts[-2:]) for row in range(0, 23, 4)]
    file.write_bytes(changed)
    assert found() != whole
