"""The recipe ``folder``: what suits the networks, and a first try on images of one's own that works."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vrm.cli import main
from vrm.config import ConfigError, describe_sources, resolve, resolve_evaluation
from vrm.models.kinds import kind_of


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders with images of many sizes: red ones, and blue ones."""
    rng = np.random.RandomState(0)
    for split, count in (("train", 12), ("val", 6)):
        for channel, name in ((0, "red"), (2, "blue")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.randint(0, 100, (*rng.randint(30, 70, 2), 3)).astype(np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return tmp_path / "photos"


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["vrm", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_first_try_works(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VRM_CACHE", str(tmp_path / "cache"))
    few = ["data.root=photos", "epochs=4", "batch_size=8", "threads=1"]
    assert command(monkeypatch, "train", "folder", "model=resnet8", *few, "run=teacher") == 0
    assert "settings from recipe folder (input of 32 pixels): data.size=32" in capsys.readouterr().out
    assert command(monkeypatch, "distill", "folder", "teacher=teacher/", "student=resnet8", "method=kd", *few) == 0
    assert "top-1 100.00 %" in capsys.readouterr().out
    student = "model=runs/folder-resnet8-kd-seed0/"
    assert command(monkeypatch, "eval", "folder", student, "data.root=photos") == 0
    assert "on the 12 test images of folder: top-1 100.00 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "transformer", "side"),
    [
        ("resnet20", False, 32),
        ("vgg8", False, 32),
        ("timm:resnet10t", False, 176),
        ("timm:efficientnet_b0", False, 224),
        ("timm:vit_tiny_patch16_384", True, 384),
        ("timm:convnext_atto", True, 224),
        ("timm:levit_128s", True, 224),
        ("torchvision:mobilenet_v3_small", False, 224),
        ("torchvision:swin_t", True, 224),
    ],
)
def test_the_kind_of_a_network(name: str, transformer: bool, side: int) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    assert kind_of(name) == (transformer, side)


def test_an_option_decides_what_a_network_is_built_for() -> None:
    pytest.importorskip("timm")
    assert kind_of("timm:vit_tiny_patch16_224", img_size=96).side == 96
    assert kind_of("torchvision:vit_b_32", image_size=64).side == 64


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["student=resnet20"], ("sgd", 0.05, 0, 32, None)),
        (["student=torchvision:resnet18"], ("sgd", 0.05, 0, 256, "imagenet")),
        (["student=torchvision:inception_v3"], ("sgd", 0.05, 0, 299, None)),
        (["student=torchvision:swin_t"], ("adamw", 0.0005, 5, 256, "imagenet")),
        (["student=resnet20", "teacher=torchvision:resnet18", "method=kd"], ("sgd", 0.05, 0, 256, "imagenet")),
        (["student=torchvision:swin_t", "optimizer.lr=0.1", "epochs=40"], ("adamw", 0.1, 2, 256, "imagenet")),
        (["student=torchvision:resnet18", "data.size=64"], ("sgd", 0.05, 0, 64, None)),
        (["student=torchvision:resnet18", "data.views=cifar"], ("sgd", 0.05, 0, 224, "cifar")),
        (["student=resnet20", "data=digits"], ("sgd", 0.05, 0, None, None)),
    ],
)
def test_the_settings_suit_the_networks(words: list[str], found: tuple[Any, ...]) -> None:
    run = resolve("distill", "folder", ["method=ce"] * (len(words) < 3 or "kd" not in words[2]) + words).run
    chosen = (run.optimizer.name, run.optimizer.lr, run.schedule.warmup_epochs, run.data.size, run.data.views)
    assert chosen == found
    assert run.schedule.name == "cosine"


def test_every_choice_is_told() -> None:
    lines = describe_sources(resolve("train", "folder", ["model=torchvision:swin_t"]))
    assert "settings from recipe folder (input of 224 pixels): data.size=256, data.views=imagenet" in lines
    assert any(line.startswith("settings from recipe folder (transformers): optimizer=adamw, ") for line in lines)
    with pytest.raises(ConfigError, match=r"^model=resnet21: unknown network 'resnet21'"):
        resolve("train", "folder", ["model=resnet21"])
    with pytest.raises(ConfigError, match=r"^teacher=resnet21: unknown network 'resnet21'"):
        resolve("distill", "folder", ["student=resnet20", "teacher=resnet21", "method=kd"])


def test_an_evaluation_makes_the_same_images(tmp_path: Path) -> None:
    assert resolve_evaluation("folder", ["model=resnet20"]).data.size == 32
    large = resolve_evaluation("folder", ["model=torchvision:resnet18"]).data
    assert (large.size, large.views) == (256, "imagenet")
    assert resolve_evaluation("folder", []).data.size is None
    assert resolve_evaluation("folder", ["model=resnet20", "data.size=64"]).data.size == 64
