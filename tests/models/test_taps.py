"""Taps: what the wrapper returns, what the probe measures, and how they are found in other people's networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vrm.models import Preprocess, Tap, TappedNetwork, create, known_taps, probe

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """A user's network: counts its calls even in eval mode, and has a batch norm, a list of layers and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.fc = nn.Linear(8, 5)  # registered before the layer that is called before it
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)])
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.neck = nn.Linear(8, 8)
        self.unused = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.layers:
            x = layer(x)
        x = self.pool(self.act(self.norm(x))).flatten(1)
        return self.fc(self.neck(x))


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_wrapper_returns_what_passes() -> None:
    network = create("resnet8", num_classes=10)
    tapped = TappedNetwork(network, ("stem", "stage2", "stage2:pre", "layer3.0.bn2", "logits", "pooled"))
    outputs = tapped(IMAGES)
    assert list(outputs.taps) == ["stem", "stage2", "stage2:pre", "layer3.0.bn2", "logits", "pooled"]
    assert torch.equal(outputs.taps["stage2"], outputs.taps["stage2:pre"].relu())
    assert torch.equal(outputs.taps["logits"], outputs.logits)
    assert torch.equal(outputs.taps["pooled"], outputs.pooled)
    assert torch.equal(network.fc(outputs.pooled), outputs.logits)
    assert list(tapped.network.state_dict()) == list(create("resnet8", num_classes=10).state_dict())


def test_gradient_reaches_the_network_through_a_tap() -> None:
    network = create("resnet8", num_classes=10)
    TappedNetwork(network, ("stage1:pre",))(IMAGES).taps["stage1:pre"].sum().backward()
    assert network.layer1[0].conv1.weight.grad is not None
    assert network.layer2[0].conv1.weight.grad is None


def test_calls_do_not_leak_into_each_other() -> None:
    tapped = TappedNetwork(create("resnet8", num_classes=10).eval(), ("stage3",))
    first = tapped(IMAGES)
    kept = first.taps["stage3"].clone()
    second = tapped(-IMAGES)
    assert torch.equal(first.taps["stage3"], kept)
    assert not torch.equal(second.taps["stage3"], kept)
    tapped.network(IMAGES)
    with pytest.raises(RuntimeError):
        tapped(IMAGES[:, :1])  # fails half-way
    assert tapped._recorder.caught is None


def hooks(network: nn.Module) -> list[object]:
    return [hook for module in network.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_close_removes_the_hooks_of_one_wrapper_alone() -> None:
    network = create("resnet8", num_classes=10).eval()
    calls: list[object] = []
    network.layer1.register_forward_hook(lambda *_: calls.append(1))  # of the network's owner
    before = hooks(network)
    one, other = TappedNetwork(network, ("stage1",)), TappedNetwork(network, ("stem", "stage2:pre"))
    assert list(one(IMAGES).taps) == ["stage1"]
    one.close()
    assert list(other(IMAGES).taps) == ["stem", "stage2:pre"]
    other.close()
    assert hooks(network) == before
    network(IMAGES)
    assert len(calls) == 3


def test_copies_have_hooks_of_their_own() -> None:
    tapped = TappedNetwork(create("resnet8", num_classes=10).eval(), ("stage1",))
    twin = copy.deepcopy(tapped)
    nn.init.zeros_(twin.network.conv1.weight)
    assert twin(IMAGES).taps["stage1"].abs().max() < tapped(IMAGES).taps["stage1"].abs().max()
    twin.close()
    assert not hooks(twin)
    assert list(tapped(IMAGES).taps) == ["stage1"]


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_compiled_wrapper_catches_taps(name: str) -> None:
    tapped = TappedNetwork(
        create(name, num_classes=10).eval(), ("stage1", "stage3:pre"), Preprocess((0.5,) * 3, (0.2,) * 3)
    )
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(tapped, fullgraph=True, backend="aot_eager")
    for batch in (images, 255 - images):
        eager, traced = tapped(batch), compiled(batch)
        for tap, value in eager.taps.items():
            torch.testing.assert_close(traced.taps[tap], value)
        torch.testing.assert_close(traced.pooled, eager.pooled)


def test_unknown_tap_is_answered_with_the_nearest() -> None:
    network = create("resnet8", num_classes=10)
    with pytest.raises(ValueError, match=r"no tap 'stage4'; did you mean .*'stage3'"):
        TappedNetwork(network, ("stage4",))
    with pytest.raises(ValueError, match=r"no tap 'layer3\.0\.bn3'; did you mean .*'layer3\.0\.bn2'"):
        probe(network, name="resnet8", input_size=(32, 32), extra_taps=("layer3.0.bn3",))


def test_probe_leaves_no_trace() -> None:
    network = Counting().train()
    network.norm.eval()
    before = state(network)
    torch.manual_seed(1)
    random_state = torch.get_rng_state()
    measured = probe(network, name="mine", input_size=(16, 16), extra_taps=("layers.1",))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.training
    assert network.layers[0].training
    assert not network.norm.training
    assert not hooks(network)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert measured.shapes == {
        "stage1": (4, 16, 16),
        "stage2": (8, 8, 8),
        "pooled": (8,),
        "logits": (5,),
        "layers.1": (8, 8, 8),
    }
    assert measured.classifier is network.fc
    assert measured.num_classes == 5
    assert measured.signed == {"stage1", "pooled", "logits", "layers.1"}


def test_networks_without_declared_taps_need_an_input_size() -> None:
    with pytest.raises(ValueError, match="input_size"):
        TappedNetwork(Counting(), ())
    outputs = TappedNetwork(Counting(), ("layers.0",), input_size=(16, 16))(IMAGES)
    assert outputs.taps["layers.0"].shape == (2, 4, 32, 32)
    assert outputs.pooled is not None


def test_taps_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(ValueError, match="'unused' was not called"):
        probe(Counting(), name="mine", input_size=(16, 16), extra_taps=("unused",))
    with pytest.raises(ValueError, match="'norm' is overwritten by a later in-place operation"):
        probe(Counting(), name="mine", input_size=(16, 16), extra_taps=("norm",))

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Net(nn.Module):
        def __init__(self, *, unpack: bool) -> None:
            super().__init__()
            self.pair, self.unpack = Pair(), unpack

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            first, second = self.pair(x.mean((2, 3)))
            return first if self.unpack else (first, second)

    with pytest.raises(ValueError, match="'pair' is a tuple"):
        TappedNetwork(Net(unpack=True), ("pair",), input_size=(8, 8))(IMAGES)
    with pytest.raises(ValueError, match="Net returns tuple, not a tensor of logits"):
        TappedNetwork(Net(unpack=False), (), input_size=(8, 8))(IMAGES)
    with pytest.raises(ValueError, match="needs logits"):
        probe(nn.Sequential(nn.Conv2d(3, 5, 1)), name="maps", input_size=(8, 8))


def test_a_network_may_declare_its_taps() -> None:
    class Mine(Counting):
        def declared_taps(self) -> dict[str, Tap]:
            return {"stage1": Tap("act"), "pooled": Tap("neck", "input"), "logits": Tap("")}

    outputs = TappedNetwork(Mine().eval(), ("stage1",))(IMAGES)
    assert outputs.taps["stage1"].shape == (2, 8, 16, 16)
    assert outputs.pooled is not None
    torch.testing.assert_close(outputs.pooled, outputs.taps["stage1"].mean((2, 3)))


RESNET = {
    "stage1": (64, 32, 32),
    "stage2": (64, 16, 16),
    "stage3": (128, 8, 8),
    "stage4": (256, 4, 4),
    "stage5": (512, 2, 2),
}
MOBILENET = {
    "stage1": (16, 32, 32),
    "stage2": (24, 16, 16),
    "stage3": (32, 8, 8),
    "stage4": (96, 4, 4),
    "stage5": (1280, 2, 2),
}


@pytest.mark.parametrize(
    ("name", "size", "stages", "pooled"),
    [
        ("timm:resnet18", 64, RESNET, 512),
        ("torchvision:resnet18", 64, RESNET, 512),
        ("torchvision:mobilenet_v2", 64, MOBILENET, 1280),
        ("timm:convnext_atto", 64, {f"stage{k}": (20 << k, 32 >> k, 32 >> k) for k in (1, 2, 3, 4)}, 320),
        (
            "torchvision:shufflenet_v2_x0_5",
            64,
            {"stage1": (24, 32, 32), "stage2": (48, 8, 8), "stage3": (96, 4, 4), "stage4": (1024, 2, 2)},
            1024,
        ),
    ],
)
def test_stages_are_found(name: str, size: int, stages: dict[str, tuple[int, ...]], pooled: int) -> None:
    measured = probe(create(name, num_classes=10), name=name, input_size=(size, size))
    ends_in_norm = name == "timm:convnext_atto"  # after the pooling, so the classifier of a mean gives other logits
    last_map = {} if ends_in_norm else {"map": (pooled, *[*stages.values()][-1][1:])}
    assert measured.shapes == {**stages, **last_map, "pooled": (pooled,), "logits": (10,)}
    assert measured.stages == tuple(stages)
    assert measured.classifier is not None
    assert measured.classifier.in_features == pooled


def test_transformers_are_tapped_at_the_quarters_of_their_depth() -> None:
    network = create("timm:vit_tiny_patch16_224", num_classes=10, img_size=32)
    paths = [tap.path for tap in known_taps(network, input_size=(32, 32)).values()]
    assert paths == ["blocks.2", "blocks.5", "blocks.8", "blocks.11", "head", ""]
    measured = probe(network, name="vit", input_size=(32, 32))
    assert measured.shapes == {**{f"stage{k}": (5, 192) for k in (1, 2, 3, 4)}, "pooled": (192,), "logits": (10,)}
    del network.feature_info  # by structure alone the answer is the same
    assert [tap.path for tap in known_taps(network, input_size=(32, 32)).values()] == paths


def test_maps_with_channels_last_are_turned() -> None:
    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2))

    network = nn.Sequential(nn.Conv2d(3, 7, 4, 4), Turn(), nn.LayerNorm(7), nn.Linear(7, 5), Mean(), nn.Linear(5, 10))
    measured = probe(network, name="tokens", input_size=(32, 64))
    assert measured.shapes == {"stage1": (5, 8, 16), "map": (5, 8, 16), "pooled": (5,), "logits": (10,)}
    outputs = TappedNetwork(network, ("stage1",), input_size=(32, 32))(IMAGES)
    assert outputs.pooled is not None
    torch.testing.assert_close(outputs.taps["stage1"].mean((2, 3)), outputs.pooled)
