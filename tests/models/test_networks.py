"""The CIFAR networks: shapes, sizes, training behaviour."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from vrm.models import create, describe, names, probe

NARROW = {"stem": (16, 32, 32), "stage1": (16, 32, 32), "stage2": (32, 16, 16), "stage3": (64, 8, 8), "pooled": (64,)}
WIDE = {"stem": (32, 32, 32), "stage1": (64, 32, 32), "stage2": (128, 16, 16), "stage3": (256, 8, 8), "pooled": (256,)}
DOUBLE = {"stem": (16, 32, 32), "stage1": (32, 32, 32), "stage2": (64, 16, 16), "stage3": (128, 8, 8), "pooled": (128,)}
VGG = {
    "stem": (64, 32, 32),
    "stage1": (128, 16, 16),
    "stage2": (256, 8, 8),
    "stage3": (512, 4, 4),
    "stage4": (512, 4, 4),
    "pooled": (512,),
}


def four_stages(expansion: int) -> dict[str, tuple[int, ...]]:
    return {
        "stem": (64, 32, 32),
        "stage1": (64 * expansion, 32, 32),
        "stage2": (128 * expansion, 16, 16),
        "stage3": (256 * expansion, 8, 8),
        "stage4": (512 * expansion, 4, 4),
        "pooled": (512 * expansion,),
    }


TABLE = {
    **dict.fromkeys(("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"), NARROW),
    **dict.fromkeys(("resnet8x4", "resnet32x4"), WIDE),
    **dict.fromkeys(("wrn_16_1", "wrn_40_1"), NARROW),
    **dict.fromkeys(("wrn_16_2", "wrn_40_2"), DOUBLE),
    **dict.fromkeys(("vgg8", "vgg11", "vgg13", "vgg16", "vgg19"), VGG),
    "mobilenetv2": {
        "stem": (16, 16, 16),
        "stage1": (12, 16, 16),
        "stage2": (16, 8, 8),
        "stage3": (48, 4, 4),
        "stage4": (160, 2, 2),
        "pooled": (1280,),
    },
    "shufflenetv1": {
        "stem": (24, 32, 32),
        "stage1": (240, 16, 16),
        "stage2": (480, 8, 8),
        "stage3": (960, 4, 4),
        "pooled": (960,),
    },
    "shufflenetv2": {
        "stem": (24, 32, 32),
        "stage1": (116, 16, 16),
        "stage2": (232, 8, 8),
        "stage3": (464, 4, 4),
        "pooled": (1024,),
    },
    "resnet18": four_stages(1),
    "resnet50": four_stages(4),
}

# Of the released networks, 100 classes
PARAMETERS = {
    "resnet8": 83_892,
    "resnet20": 278_324,
    "resnet56": 861_620,
    "resnet8x4": 1_233_540,
    "wrn_16_1": 180_916,
    "wrn_40_2": 2_255_156,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "resnet50": 23_705_252,
    "resnet14": 181_108,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet110": 1_736_564,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "shufflenetv2": 1_355_528,
    "resnet18": 11_220_132,
}


def test_all_networks_of_the_literature() -> None:
    assert set(names()) == set(TABLE)
    assert len(names()) == 23


@pytest.mark.parametrize("name", sorted(TABLE))
def test_shapes_and_parameters(name: str) -> None:
    description = describe(name, 100, (32, 32))
    logical = {tap: shape for tap, shape in description.taps.items() if not tap.endswith(":pre")}
    assert logical == TABLE[name] | {"logits": (100,)}
    assert list(logical) == [*TABLE[name], "logits"]
    stages = [tap for tap in TABLE[name] if tap.startswith("stage")]
    pre = {f"{stage}:pre": TABLE[name][stage] for stage in stages} if name != "mobilenetv2" else {}
    assert {tap: shape for tap, shape in description.taps.items() if tap.endswith(":pre")} == pre
    assert description.parameters == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "resnet18"]
)
def test_learns_from_any_small_image(name: str) -> None:
    """Digits of 8x8, one channel, ten classes: a gradient reaches every parameter."""
    network = create(name, num_classes=10, in_channels=1)
    logits = network(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (4, 10)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network(torch.zeros(2, 1, 40, 24)).shape == (2, 10)


def test_vgg_pools_once_more_from_64_pixels() -> None:
    assert describe("vgg8", 10, (32, 32)).taps["stage4"] == (512, 4, 4)
    assert describe("vgg8", 10, (64, 64)).taps["stage4"] == (512, 4, 4)
    with pytest.raises(ValueError, match="at least 8x8, got 8x4"):
        create("vgg8", num_classes=10)(torch.zeros(2, 3, 8, 4))


@pytest.mark.parametrize("name", ["resnet20", "vgg8", "mobilenetv2", "wrn_16_2"])
def test_convolutions_start_as_he_et_al(name: str) -> None:
    torch.manual_seed(0)
    network = create(name, num_classes=100)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            expected = (2 / (module.out_channels * module.kernel_size[0] * module.kernel_size[1])) ** 0.5
            assert abs(module.weight.std().item() / expected - 1) < 0.03
            assert module.bias is None or not module.bias.any()


def test_wide_resnet_updates_each_batch_norm_once_a_step() -> None:
    """The released code feeds the batch norms of ``stageK:pre`` twice, an effective momentum of 0.19."""
    network = create("wrn_16_1", num_classes=10).train()
    seen: dict[str, torch.Tensor] = {}
    norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
    for path in norms:
        norm = network.get_submodule(path)
        norm.register_forward_pre_hook(lambda module, inputs, path=path: seen.update({path: inputs[0].detach()}))
    network(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    for path in norms:
        norm = network.get_submodule(path)
        assert norm.num_batches_tracked == 1
        torch.testing.assert_close(norm.running_mean, 0.1 * seen[path].mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
        variance = seen[path].var((0, 2, 3), unbiased=True)
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance, rtol=1e-4, atol=1e-6)


def test_signed_taps_and_norms() -> None:
    """Linear bottlenecks and the raw residual stream are signed; what comes out of a ReLU is not."""

    def signed(name: str) -> set[str]:
        return set(probe(create(name, num_classes=10), name=name, input_size=(32, 32)).signed)

    pre = {"stage1:pre", "stage2:pre", "stage3:pre"}
    assert signed("resnet8") == {"logits", *pre}
    assert signed("wrn_16_1") == {"logits", "stem", "stage1", "stage2", "stage3", *pre}
    assert signed("mobilenetv2") == {"logits", "stage1", "stage2", "stage3", "stage4"}
    assert signed("shufflenetv2") == {"logits", *pre}


@pytest.mark.parametrize(
    ("name", "norm_of_stage2"),
    [
        ("resnet8", "layer2.0.bn2"),
        ("wrn_16_1", "block3.layer.0.bn1"),
        ("vgg8", "block2.1"),
        ("shufflenetv1", "layer2.7.bn3"),
        ("resnet18", "layer2.1.bn2"),
    ],
)
def test_norm_before_the_relu(name: str, norm_of_stage2: str) -> None:
    network = create(name, num_classes=10)
    norm = network.get_submodule(norm_of_stage2)
    assert isinstance(norm, nn.BatchNorm2d)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    measured = probe(network, name=name, input_size=(32, 32))
    assert set(measured.norms) == {tap for tap in measured.shapes if tap.endswith(":pre")}
    assert torch.equal(measured.norms["stage2:pre"].weight, norm.weight)
    assert torch.equal(measured.norms["stage2:pre"].bias, norm.bias)
    assert not measured.norms["stage2:pre"].weight.requires_grad
    assert all(measured.channels(tap) == len(norm.bias) for tap, norm in measured.norms.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet57", "nearest: .*resnet56"),
        ("ShuffleNetV2", "nearest: .*shufflenetv2"),
        ("qqq", "known: resnet8, "),
        ("timm:resnet19", "timm has no network 'resnet19'.*resnet1"),
        ("torchvision:resnet19", "torchvision has no classification network 'resnet19'.*resnet1"),
    ],
)
def test_unknown_networks_are_refused_with_the_near_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, num_classes=10)


def test_missing_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"install vrm\[models\]"):
        create("timm:resnet18", num_classes=10)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="not width"):
        create("resnet8", num_classes=10, width=2)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        create("resnet8", num_classes=0)
    with pytest.raises(ValueError, match="3 channels, not 1"):
        create("torchvision:resnet18", num_classes=10, in_channels=1)
    assert create("timm:resnet18", num_classes=10, in_channels=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_describe_counts_a_multiply_add_as_two_and_draws_nothing() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    description = describe("resnet8", 10, (8, 8), in_channels=1)
    assert torch.equal(torch.get_rng_state(), before)
    stem, stage1 = 8 * 8 * 16 * 9, 2 * 8 * 8 * 16 * 16 * 9
    stage2 = 4 * 4 * (32 * 16 * 9 + 32 * 32 * 9 + 32 * 16)
    stage3 = 2 * 2 * (64 * 32 * 9 + 64 * 64 * 9 + 64 * 32)
    assert description.flops == 2 * (stem + stage1 + stage2 + stage3 + 64 * 10)
