"""Taps: what the wrapper returns, what the probe measures, and how they are found in other people's networks."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vrm.models import NetworkError, Preprocess, Tap, TappedNetwork, create, known_taps, probe

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
            return x, -x

    class Net(nn.Module):
        def __init__(self, *, unpack: bool) -> None:
            super().__init__()
            self.pair, self.unpack = Pair(), unpack

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            first, second = self.pair(x.mean((2, 3)))
            return first if self.unpack else (first, second)

    with pytest.raises(ValueError, match="'pair' is a tuple"):
        TappedNetwork(Net(unpack=True), ("pair",), input_size=(8, 8))(IMAGES)
    with pytest.raises(
        ValueError, match=r"Net returns a tuple, not a tensor of logits .* 0 \(2x3\), 1 \(2x3\): name the"
    ):
        TappedNetwork(Net(unpack=False), (), input_size=(8, 8))
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


class Turn(nn.Module):
    """Moves the channels to the end."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Odd(nn.Module):
    """A network with the channels last in its second stage, which may insist on a size."""

    def __init__(self, *, only: int | None = None, middle: nn.Module | None = None, channels: int = 8) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.down = nn.Conv2d(8, 8, 2, 2)
        self.turn = Turn()
        self.two = middle if middle is not None else nn.Sequential(nn.Linear(8, channels), nn.ReLU())
        self.fc = nn.Linear(channels, 5)
        self.only = only

    def forward(self, x: Tensor) -> Tensor:
        assert self.only is None or x.shape[2] == self.only, f"only {self.only}"
        return self.fc(self.two(self.turn(self.down(self.one(x)))).mean((1, 2)))


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (20, 12), (31, 17), (32, 8)])
def test_layouts_are_measured_on_another_size(size: tuple[int, int]) -> None:
    """Also where height, width and channels are alike, as in 8x8x8."""
    measured = probe(Odd(), name="odd", input_size=size, extra_taps=("turn", "two.1", "down"))
    height, width = (-(-side // 2) for side in size)
    small = (8, height // 2, width // 2)
    assert [measured.shapes[stage] for stage in measured.stages] == [(8, height, width), small]
    assert measured.shapes["turn"] == measured.shapes["two.1"] == measured.shapes["down"] == small
    images = torch.randn(2, 3, *size)
    network = Odd().eval()
    outputs = TappedNetwork(network, ("turn", "down", "stage2"), input_size=size)(images)
    assert torch.equal(outputs.taps["turn"], outputs.taps["down"])
    assert torch.equal(outputs.taps["stage2"].mean((2, 3)), outputs.pooled)


def test_a_network_of_one_size_tells_its_layout_by_its_modules() -> None:
    measured = probe(Odd(only=32, channels=6), name="odd", input_size=(32, 32), extra_taps=("down",))
    assert [measured.shapes[stage] for stage in measured.stages] == [(8, 16, 16), (6, 8, 8)]
    fixed = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.Identity(), nn.Flatten(), nn.Linear(8 * 64, 5))
    # its last layer takes one size alone, its maps do not
    assert probe(fixed, name="flat", input_size=(32, 32)).shapes["stage1"] == (8, 8, 8)


class Unclear(nn.Module):
    """A block that no part of tells the layout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_layout_that_nothing_tells_is_not_guessed() -> None:
    network = Odd(only=32, middle=Unclear(8))
    measured = probe(network, name="odd", input_size=(32, 32))
    assert measured.shapes == {"pooled": (8,), "logits": (5,)}, "logits and pooled can be read"
    told = r"'two' returns maps of 8x8x8, and which axis has the channels cannot be told, as the network takes images"
    for selector in ("stages", "last", "stage1"):
        with pytest.raises(ValueError, match=f"odd has no tap '{selector}': {told} of 32x32 alone"):
            measured.resolve((selector,))
    with pytest.raises(ValueError, match=told):
        TappedNetwork(network, ("two",), input_size=(32, 32))
    wide = Odd(only=8, middle=Unclear(8))  # a map is no larger than the image, so 2x2x8 may be both
    assert probe(wide, name="odd", input_size=(8, 8)).stages == ()
    assert probe(Odd(middle=Unclear(8)), name="odd", input_size=(32, 32)).shapes["stage2"] == (8, 8, 8)


def test_swin_of_one_size_declares_its_layout() -> None:
    network = create("timm:swin_tiny_patch4_window7_224", num_classes=4, img_size=(64, 40), depths=(1, 1, 1, 1))
    measured = probe(network, name="swin", input_size=(64, 40), extra_taps=("layers.1.blocks.0", "patch_embed.proj"))
    sizes = [(16, 10), (8, 5), (4, 3), (2, 2)]
    assert [measured.shapes[s] for s in measured.stages] == [(96 << k, *size) for k, size in enumerate(sizes)]
    assert measured.shapes["layers.1.blocks.0"] == (192, 8, 5)
    assert measured.shapes["patch_embed.proj"] == (96, 16, 10)


# ---- what a network returns, and raises ------------------------------------------------------------------------------


@dataclass
class Answer:
    """What networks of other libraries return."""

    hidden: Tensor
    logits: Tensor


Pair = namedtuple("Pair", ["logits", "auxiliary"])


class Returning(nn.Module):
    """Returns what ``make`` makes of logits (B, 5) and features (B, 8)."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.fc, self.make = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), make

    def forward(self, x: Tensor) -> Any:
        features = self.conv(x).mean((2, 3))
        return self.make(self.fc(features), features)


@pytest.mark.parametrize(
    ("make", "key", "entry"),
    [
        (lambda logits, features: {"logits": logits, "features": features}, None, "'logits' of the dict"),
        (lambda logits, features: Answer(features, logits), None, "'logits' of the Answer"),
        (lambda logits, features: Pair(logits, logits + 1), None, "'logits' of the Pair"),
        (lambda logits, features: (features, logits), None, "'1' of the tuple"),
        (lambda logits, features: [logits, [features]], None, "'0' of the list"),
        (lambda logits, features: {"out": logits, "loss": logits.sum()}, None, "'out' of the dict"),
        (lambda logits, features: (logits - 1, logits), "1", "'1' of the tuple"),
        (lambda logits, features: {"logits": logits - 1, "head": logits}, "head", "'head' of the dict"),
    ],
)
def test_logits_are_found_in_what_a_network_returns(
    make: Callable[[Tensor, Tensor], Any], key: str | None, entry: str
) -> None:
    network = Returning(make).eval()
    found = probe(network, name="mine", input_size=(8, 8), logits_key=key, num_classes=5)
    assert found.note == f"the logits are the entry {entry} that the network returns"
    assert (found.shapes["logits"], found.shapes["pooled"]) == ((5,), (8,))
    tapped = TappedNetwork(network, ("logits",), input_size=(8, 8), logits_key=key, num_classes=5)
    torch.compiler.reset()
    outputs, compiled = tapped(IMAGES), torch.compile(tapped, fullgraph=True, backend="eager")(IMAGES)
    assert torch.equal(outputs.logits, network.fc(outputs.pooled))
    assert torch.equal(outputs.logits, outputs.taps["logits"])
    assert torch.equal(outputs.logits, compiled.logits)


def test_logits_that_are_not_to_be_told_must_be_named() -> None:
    two = Returning(lambda logits, features: (logits, -logits))
    with pytest.raises(
        ValueError, match=r"Returning returns a tuple, .* 0 \(2x5\), 1 \(2x5\): name the logits among them"
    ):
        probe(two, name="two", input_size=(8, 8), num_classes=5)
    with pytest.raises(ValueError, match=r"it has no tensor '2' \(logits_key\); allowed: 0, 1"):
        probe(two, name="two", input_size=(8, 8), logits_key="2")
    with pytest.raises(ValueError, match=r"Returning returns a NoneType, .*; its tensors are none"):
        probe(Returning(lambda logits, features: None), name="none", input_size=(8, 8))
    plain = probe(create("resnet8", num_classes=5), name="plain", input_size=(8, 8))
    assert plain.note == ""


@pytest.mark.parametrize(
    "error", [AssertionError("of size"), TypeError("t"), IndexError("i"), KeyError("k"), RuntimeError("r"), OSError()]
)
def test_whatever_a_network_raises_is_told_with_the_shape_of_its_input(error: Exception) -> None:
    def fail(logits: Tensor, features: Tensor) -> Any:
        raise error

    with pytest.raises(NetworkError) as told:
        probe(Returning(fail), name="failing", input_size=(8, 12))
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    assert str(told.value) == f"Returning failed on images of 3x8x12 (a batch of 2): {words}"
    assert told.value.__cause__ is error
    assert told.value.exit_code == 2


def test_a_lack_of_memory_is_no_fault_of_the_network() -> None:
    def fail(logits: Tensor, features: Tensor) -> Any:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        probe(Returning(fail), name="large", input_size=(8, 8))


def test_probes_put_attributes_back() -> None:
    class Caching(Counting):
        size: tuple[int, ...] = ()

        def forward(self, x: Tensor) -> Tensor:
            self.size = tuple(x.shape)
            return super().forward(x)

    network = Caching()
    probe(network, name="caching", input_size=(16, 16))
    assert "size" not in vars(network)


def test_a_network_of_logits_that_are_not_finite_is_measured() -> None:
    """Whether that is a fault is for the checks before a run to say."""
    network = create("resnet8", num_classes=10)
    with torch.no_grad():
        network.get_submodule("fc").weight[0, 0] = float("nan")
    assert "map" not in probe(network, name="resnet8", input_size=(32, 32)).shapes
