"""Weights: what loads, what is refused and why, and that a write is all or nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vrm.models import create, load_weights, save_weights, weights_hash


def network(seed: int = 0, num_classes: int = 10, name: str = "resnet8") -> nn.Module:
    torch.manual_seed(seed)
    return create(name, num_classes=num_classes)


SOURCE = network(1)
STATE = SOURCE.state_dict()


def test_round_trip(tmp_path: Path) -> None:
    save_weights(SOURCE, tmp_path / "model.safetensors")
    for path in (tmp_path / "model.safetensors", tmp_path, str(tmp_path)):
        loaded = network()
        assert weights_hash(loaded) != weights_hash(SOURCE)
        load_weights(loaded, path)
        assert weights_hash(loaded) == weights_hash(SOURCE)
    first = (tmp_path / "model.safetensors").read_bytes()
    save_weights(SOURCE, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == first
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(SOURCE, path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_weights(network(2), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".tar"])
@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "epoch": 240, "best_acc": torch.tensor(72.63), "optimizer": {"state": {}, "lr": 0.1}},
        {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}},
        {"model": {"state_dict": STATE}},
    ],
    ids=["plain", "model", "module", "nested"],
)
def test_checkpoints_of_others(tmp_path: Path, suffix: str, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / f"ckpt{suffix}")
    loaded = network()
    load_weights(loaded, tmp_path / f"ckpt{suffix}")
    assert weights_hash(loaded) == weights_hash(SOURCE)


def test_old_checkpoint_format(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "ckpt_epoch_240.pth", _use_new_zipfile_serialization=False)
    loaded = network()
    load_weights(loaded, tmp_path / "ckpt_epoch_240.pth")
    assert weights_hash(loaded) == weights_hash(SOURCE)


class Malicious:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickles_that_run_code_are_refused_unrun(tmp_path: Path, new_format: bool) -> None:
    sentinel, path = tmp_path / "executed", tmp_path / "evil.pth"
    torch.save({"model": STATE, "x": Malicious(sentinel)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match="refused"):
        load_weights(network(), path)
    assert not sentinel.exists()
    path.write_bytes(pickle.dumps(Malicious(sentinel), protocol=2))
    with pytest.raises(ValueError, match="refused"):
        load_weights(network(), path)
    assert not sentinel.exists()
    pickle.loads(path.read_bytes())  # the sentinel works
    assert sentinel.exists()


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / ("w.safetensors" if "safetensors" in kind else "w.pth")
    if kind == "missing":
        return path
    if "safetensors" in kind:
        save_weights(SOURCE, path)
    else:
        torch.save(STATE, path)
    if kind.startswith("truncated"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind.startswith("empty"):
        path.write_bytes(b"")
    elif kind.startswith("text"):
        path.write_text("<html>404</html>")
    elif kind == "ending":
        path = path.rename(tmp_path / "w.onnx")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "no state dict":
        torch.save({"epoch": 3, "net": {}}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no weights at .*w.pth; give"),
        ("empty .pth", "is empty"),
        ("empty safetensors", "is empty"),
        ("truncated .pth", "truncated"),
        ("truncated safetensors", "truncated"),
        ("text .pth", "broken|truncated"),
        ("text safetensors", "truncated or no safetensors"),
        ("ending", "unknown ending"),
        ("list", "holds a list, not a state dict"),
        ("no state dict", "its keys are epoch, net"),
    ],
)
def test_unreadable_files(tmp_path: Path, kind: str, message: str) -> None:
    target = network()
    before = weights_hash(target)
    with pytest.raises(ValueError, match=message):
        load_weights(target, broken(tmp_path, kind))
    assert weights_hash(target) == before


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights at .*model\.safetensors"):
        load_weights(network(), tmp_path)


def test_files_that_do_not_fit_say_why(tmp_path: Path) -> None:
    save_weights(SOURCE, tmp_path / "resnet8.safetensors")
    target = network(num_classes=100)
    before = weights_hash(target)
    with pytest.raises(ValueError, match="trained for 10 classes, this network has 100"):
        load_weights(target, tmp_path / "resnet8.safetensors")
    with pytest.raises(ValueError, match=r"ResNet .*72 missing: layer1\.1\.conv1\.weight, .*, \.\.\."):
        load_weights(network(name="resnet20"), tmp_path / "resnet8.safetensors")
    with pytest.raises(ValueError, match=r"of another shape: conv1\.weight \(16, 3, 3, 3\) instead of \(32, 3, 3, 3\)"):
        load_weights(network(name="resnet8x4"), tmp_path / "resnet8.safetensors")
    save_weights(network(name="resnet20"), tmp_path / "resnet20.safetensors")
    with pytest.raises(ValueError, match=r"72 unexpected: layer1\.1\."):
        load_weights(target, tmp_path / "resnet20.safetensors")
    assert weights_hash(target) == before


def renamed(tensors: dict[str, Tensor]) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def test_hash_depends_on_names_types_shapes_and_values_but_not_on_order() -> None:
    a, b = torch.arange(6.0), torch.ones(2)
    reference = weights_hash(renamed({"a": a, "b": b}))
    assert weights_hash(renamed({"b": b, "a": a})) == reference
    others = [
        {"a": a, "c": b},
        {"a": a.double(), "b": b},
        {"a": a.reshape(2, 3), "b": b},
        {"a": a + 1, "b": b},
        {"a": a.view(torch.int32), "b": b},
    ]
    assert len({reference, *(weights_hash(renamed(other)) for other in others)}) == 1 + len(others)
    assert weights_hash(renamed({"a": torch.ones(3, 2).T})) == weights_hash(renamed({"a": torch.ones(2, 3)}))
    assert weights_hash(renamed({"a": a.bfloat16()})) != reference
