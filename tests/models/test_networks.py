"""The CIFAR networks: shapes, sizes, training behaviour."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from vrm.models import create, describe, names, probe

TABLE = """
resnet8          83892  16@32   16@32   32@16   64@8           64
resnet14        181108  16@32   16@32   32@16   64@8           64
resnet20        278324  16@32   16@32   32@16   64@8           64
resnet32        472756  16@32   16@32   32@16   64@8           64
resnet44        667188  16@32   16@32   32@16   64@8           64
resnet56        861620  16@32   16@32   32@16   64@8           64
resnet110      1736564  16@32   16@32   32@16   64@8           64
resnet8x4      1233540  32@32   64@32  128@16  256@8          256
resnet32x4     7433860  32@32   64@32  128@16  256@8          256
wrn_16_1        180916  16@32   16@32   32@16   64@8           64
wrn_16_2        703284  16@32   32@32   64@16  128@8          128
wrn_40_1        569780  16@32   16@32   32@16   64@8           64
wrn_40_2       2255156  16@32   32@32   64@16  128@8          128
vgg8           3965028  64@32  128@16  256@8   512@4   512@4  512
vgg11          9277284  64@32  128@16  256@8   512@4   512@4  512
vgg13          9462180  64@32  128@16  256@8   512@4   512@4  512
vgg16         14774436  64@32  128@16  256@8   512@4   512@4  512
vgg19         20086692  64@32  128@16  256@8   512@4   512@4  512
mobilenetv2     812836  16@16   12@16   16@8    48@4   160@2  1280
shufflenetv1    949258  24@32  240@16  480@8   960@4          960
shufflenetv2   1355528  24@32  116@16  232@8   464@4         1024
resnet18      11220132  64@32   64@32  128@16  256@8   512@4  512
resnet50      23705252  64@32  256@32  512@16 1024@8  2048@4 2048
"""
"""Of the released networks on 32x32 images with 100 classes: parameters; channels@height of stem and stages; pooled."""
ROWS = {row.split()[0]: row.split()[1:] for row in TABLE.strip().splitlines()}


def test_all_networks_of_the_literature() -> None:
    assert set(names()) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_shapes_and_parameters(name: str) -> None:
    parameters, *maps, pooled = ROWS[name]
    sizes = [tuple(map(int, each.split("@"))) for each in maps]
    shapes = {f"stage{k}" if k else "stem": (c, height, height) for k, (c, height) in enumerate(sizes)}
    pre = {f"{tap}:pre": shape for tap, shape in shapes.items() if tap != "stem" and name != "mobilenetv2"}
    description = describe(name, 100, (32, 32))
    expected = {**shapes, "map": (int(pooled), *sizes[-1][1:] * 2), "pooled": (int(pooled),), "logits": (100,), **pre}
    assert list(description.taps.items()) == list(expected.items())
    assert description.parameters == int(parameters)


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
        ("resnet57", r"did you mean .*'resnet56'"),
        ("ShuffleNetV2", r"did you mean 'shufflenetv2'"),
        ("qqq", r"allowed: mobilenetv2, .*timm:NAME"),
        ("timm:resnet19", "timm has no network 'resnet19'; did you mean .*'resnet1"),
        ("torchvision:resnet19", "torchvision has no classification network 'resnet19'; did you mean .*'resnet1"),
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
