"""The GPU's decoder, by the same code on the CPU: the same boxes, near pixels, bad files named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vrm.data import load, place
from vrm.data.formats.images import BadImage
from vrm.data.stores import nvidia
from vrm.data.stores.store import epoch_batches
from vrm.data.stores.stream import StreamStore
from vrm.data.views.policies import view_policy
from vrm.data.views.transforms import RandomResizedCrop

POLICY = view_policy("imagenet", size=24)
FEED = {"epoch": 3, "seed": 1, "policy": POLICY, "num_virtual": 1}
GPU = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Smooth pictures of several sizes and kinds."""
    monkeypatch.setenv("VRM_CACHE", str(tmp_path / "cache"))
    for number in range(16):
        rough = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        size = [(60, 40), (35, 80), (120, 90), (24, 24)][number // 2 % 4]
        image = Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)
        image = image.convert("L") if number == 3 else image.convert("CMYK") if number == 4 else image
        for split in ("train", "test"):
            file = tmp_path / "data" / split / "ab"[number % 2] / f"{number:02d}.{'png' if number == 5 else 'jpg'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return tmp_path / "data"


def store(root: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> tuple[StreamStore, StreamStore]:
    """Decoded by workers' code, and by NVIDIA's decoder (on the CPU by torchvision's)."""
    if device == "cpu":
        monkeypatch.setattr(nvidia, "available", lambda device: "")
    options = {"root": root, "placement": "stream", "num_workers": 0}
    found = [place(load("folder", decoder=name, **options), device).train for name in ("cpu", "nvidia")]  # type: ignore[arg-type]
    assert isinstance(found[0], StreamStore)
    assert isinstance(found[1], StreamStore)
    return found[0], found[1]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_crops_are_those_of_the_workers(device: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, near = store(root, device, monkeypatch)
    batches = epoch_batches(16, 7, seed=1, epoch=3, device=device)
    fed = zip(exact.feed(batches, **FEED), near.feed(batches, **FEED), strict=True)  # type: ignore[arg-type]
    for (index, *expected), (same, *found) in fed:
        assert torch.equal(index, same)
        for one, other in zip(expected, found, strict=True):
            assert other.device.type == device
            difference = (one.int() - other.int()).abs()
            assert difference.float().mean() < 1
            assert difference.max() < 16
            for row, sample in enumerate(index.tolist()):
                if exact.files[sample].endswith(("03.jpg", "04.jpg", "05.png")):
                    assert not difference[row].any()
    assert exact.hash != near.hash
    evaluated = zip(exact.scan(7), near.scan(7), strict=True) if exact.crop else ()
    assert all(torch.equal(one, other) for (_, one), (_, other) in evaluated)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6),
    at_once=st.integers(1, 3000),
)
def test_groups_change_nothing(sizes: list[tuple[int, int]], at_once: int) -> None:
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    crop = RandomResizedCrop(9, resample="bicubic")

    def all_of(bytes_at_once: int) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nvidia, "_AT_ONCE", bytes_at_once)
            return torch.cat([nvidia._resized(group, crop) for group in nvidia._groups(images)])

    assert torch.equal(all_of(1), all_of(at_once))


@pytest.mark.parametrize("name", ["a/00.jpg", "b/05.png"])
def test_a_bad_image_is_named(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, near = store(root, "cpu", monkeypatch)
    file = root / "train" / name
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(BadImage, match=name):
        list(near.feed([torch.arange(16)], **FEED))  # type: ignore[arg-type]


def test_what_it_is_not_for_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"root": root, "decoder": "nvidia", "num_workers": 0}
    lazy = load("folder", placement="stream", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data\.decoder=nvidia does not work on cpu \(it decodes on NVIDIA GPUs\)"):
        place(lazy, "cpu")
    with pytest.raises(ValueError, match="these images are decoded beforehand"):
        load("folder", size=8, placement="host", **options)  # type: ignore[arg-type]
    _, near = store(root, "cpu", monkeypatch)
    for policy, size in ((view_policy("cifar"), None), (POLICY, 24)):
        with pytest.raises(ValueError, match=r"decodes for views that begin with a resized crop.*data\.decoder=cpu"):
            list(replace(near, size=size).feed([torch.arange(4)], **{**FEED, "policy": policy}))  # type: ignore[arg-type]


def test_its_absence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nat line 1")

    monkeypatch.setattr(nvidia, "_decode", none)
    assert nvidia.available(torch.device("cuda")).endswith("not compiled with nvJPEG support")


@pytest.mark.cuda
def test_it_is_there() -> None:
    assert nvidia.available(torch.device("cuda")) == ""
