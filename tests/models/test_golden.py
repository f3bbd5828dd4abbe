"""Every network of the files of reference vectors: state dict, logits and taps, in float64."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vrm.models import TappedNetwork, create

FOLDER = Path(os.environ.get("VRM_GOLDENS") or Path(__file__).parents[1] / "goldens")


@cache
def read(file: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(file, "pt") as golden:
        return json.loads(golden.metadata()["spec"]), {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118


CASES = [
    pytest.param(file, name, id=f"{file.stem}-{name}")
    for file in sorted(FOLDER.glob("models_cifar*.safetensors"))
    for name in read(file)[0]["models"]
]


def fill(position: int, key: str, tensor: Tensor) -> Tensor:
    """Return the weights of the reference: a sine of the element's index, scaled by what the tensor is for."""
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor)
    index = torch.arange(tensor.numel(), dtype=torch.float64)
    x = torch.sin(index * 0.7390851 + (position + 1) * 1.6180339).reshape(tensor.shape)
    if key.endswith("running_var"):
        return 1 + 0.3 * x.abs()
    if key.endswith("running_mean"):
        return 0.1 * x
    if tensor.ndim == 1:
        return 1 + 0.2 * x if key.endswith(".weight") else 0.1 * x
    return x * (2 * tensor.shape[0] / tensor.numel()) ** 0.5


@pytest.mark.parametrize(("file", "name"), CASES)
def test_golden(file: Path, name: str) -> None:
    spec, reference = read(file)
    expected = spec["models"][name]
    tolerance = {"rtol": 1e-9, "atol": 1e-12} | spec.get("tolerance", {})

    def assert_close(ours: Tensor, key: str) -> None:
        theirs = reference[f"{name}.{key}"]
        assert ours.shape == theirs.shape, key
        error, allowed = (ours - theirs).abs().max(), tolerance["atol"] + tolerance["rtol"] * theirs.abs().max()
        assert error <= allowed, f"{key}: {error:.3g} > {allowed:.3g}"

    batch_size, num_classes = reference[f"{name}.logits"].shape
    network = create(name, num_classes=num_classes).double().eval()
    state = network.state_dict()
    assert [[key, list(tensor.shape)] for key, tensor in state.items()] == expected["keys"]
    assert sum(parameter.numel() for parameter in network.parameters()) == expected["params"]
    network.load_state_dict({key: fill(k, key, tensor) for k, (key, tensor) in enumerate(state.items())})

    shapes = expected["feats"]
    stages = [f"stage{k}" for k in range(1, len(shapes["feats"]))]
    pre = [f"{stage}:pre" for stage in stages] if "preact_feats" in shapes else []
    index = torch.arange(batch_size * 3 * 32 * 32, dtype=torch.float64)
    images = (torch.cos(index * 0.0137) + 0.5 * torch.sin(index * 0.00071)).reshape(batch_size, 3, 32, 32)
    with torch.no_grad():
        outputs = TappedNetwork(network, ("stem", *stages, *pre))(images)

    assert_close(outputs.logits, "logits")
    assert_close(outputs.pooled, "pooled_feat")
    lists = {"feats": ["stem", *stages], "preact_feats": ["stem", *pre]}
    for kind in sorted(set(shapes) & set(lists)):
        for k, tap in enumerate(lists[kind]):
            assert list(outputs.taps[tap].shape) == shapes[kind][k], tap
            assert_close(outputs.taps[tap].mean((2, 3)), f"{kind}.{k}.mean")


@pytest.mark.skipif(bool(os.environ.get("VRM_GOLDENS")), reason="another folder need not have vectors of networks")
def test_golden_files_are_there() -> None:
    assert CASES, f"no models_cifar*.safetensors in {FOLDER}"
