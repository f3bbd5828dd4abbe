"""What a network or its library tells of its input, and how images become it."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from vrm import models
from vrm.models import Preprocess, TappedNetwork, grey_statistics, input_channels, library_input
from vrm.models.taps import log_probabilities

IMAGES = torch.randint(0, 256, (4, 3, 35, 49), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class OnGrey(nn.Module):
    """Takes colours, although the first convolution that it registers takes one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.edges, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(2, 5)

    def forward(self, images: Tensor) -> Tensor:
        red, green, blue = images.split(1, 1)
        return self.fc(self.edges((red + green + blue) / 3).mean((2, 3)))


# ---- what is known of it ---------------------------------------------------------------------------------------------


def test_timm_tells_mean_std_and_size() -> None:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    assert library_input(network) == ("timm's pretrained_cfg", (0.5,) * 3, (0.5,) * 3, (224, 224))
    network = timm.create_model("resnet18", num_classes=5)
    assert library_input(network) == ("timm's pretrained_cfg", *models.IMAGENET, (224, 224))
    small = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32)
    known = library_input(small)
    assert known is not None
    assert known.size == (32, 32)


def test_torchvision_tells_mean_and_std_and_with_the_name_the_size() -> None:
    network = torchvision.models.resnet18(num_classes=5)
    assert library_input(network, "torchvision:resnet18") == (
        "torchvision's weights",
        *models.IMAGENET,
        (224, 224),
    )
    assert library_input(network) == ("torchvision's weights", *models.IMAGENET, None)
    assert library_input(network, "torchvision:inception_v3") is not None
    assert library_input(network, "torchvision:inception_v3").size == (299, 299)  # type: ignore[union-attr]


def test_of_other_networks_nothing_is_known() -> None:
    assert library_input(models.create("resnet8", num_classes=5), "resnet8") is None


@pytest.mark.parametrize(
    ("network", "channels"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)), 3),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), 1),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5)), 3),
        (timm.create_model("resnet18", num_classes=5, in_chans=1), 1),
        (OnGrey(), 3),
    ],
)
def test_channels_are_those_that_a_network_runs_on(network: nn.Module, channels: int) -> None:
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in network.state_dict().items()}
    assert input_channels(network, (8, 8)) == channels
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    assert torch.equal(before, torch.get_rng_state())


def test_grey_statistics_are_those_of_the_luma() -> None:
    (mean,) = grey_statistics((0.2, 0.4, 0.8))
    assert mean == pytest.approx(0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.8, abs=1e-5)
    assert grey_statistics((0.3, 0.3, 0.3)) == pytest.approx((0.3,))


# ---- how images become it --------------------------------------------------------------------------------------------


def test_grey_is_pillows() -> None:
    x = Preprocess((0.0,), (1.0,))(IMAGES)
    expected = [np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in IMAGES]
    assert torch.equal(x, torch.from_numpy(np.stack(expected))[:, None].float() / 255)
    assert torch.equal(Preprocess((0.4,), (0.2,))(IMAGES), (x - 0.4) / 0.2)
    assert torch.equal(Preprocess((0.4,), (0.2,))(IMAGES[:, :1]), (IMAGES[:, :1] / 255 - 0.4) / 0.2)


def test_grey_of_floats_is_not_rounded() -> None:
    x = Preprocess((0.0,), (1.0,))(IMAGES / 255)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    torch.testing.assert_close(x, (IMAGES / 255 * weights).sum(1, keepdim=True), rtol=0, atol=2e-5)


def test_without_antialiasing_every_seventh_pixel_is_taken() -> None:
    """At an odd ratio the sampling points fall on the centres of pixels."""
    plain = Preprocess((0.0,) * 3, (1.0,) * 3, size=(5, 7), antialias=False)
    assert torch.equal(plain(IMAGES), IMAGES[:, :, 3::7, 3::7] / 255)


def test_with_antialiasing_it_is_pillows_but_for_rounding() -> None:
    x = Preprocess((0.0,) * 3, (1.0,) * 3, size=(5, 7))(IMAGES)
    resize = [
        np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((7, 5), Image.Resampling.BILINEAR))
        for image in IMAGES
    ]
    expected = torch.from_numpy(np.stack(resize)).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(x, expected, rtol=0, atol=1.5 / 255)


def test_what_is_printed_tells_everything() -> None:
    assert "size=(5, 7), antialias=False" in repr(Preprocess((0.5,), (0.5,), (5, 7), antialias=False))
    assert repr(Preprocess((0.5,), (0.25,))) == "Preprocess(mean=[0.5], std=[0.25], size=None)"


# ---- outputs ---------------------------------------------------------------------------------------------------------


def test_logarithms_of_probabilities_are_logits_and_finite() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 200.0, -200.0]])
    found = log_probabilities(logits.softmax(1))
    torch.testing.assert_close(found[0], logits[0].log_softmax(0))
    assert found.isfinite().all()
    torch.testing.assert_close(found.softmax(1), logits.softmax(1))
    assert log_probabilities(torch.zeros(1, 2, dtype=torch.float16)).dtype == torch.float32
    assert log_probabilities(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64


def test_a_tapped_network_that_ends_in_a_softmax_returns_logits() -> None:
    plain = models.create("resnet8", num_classes=5).eval()
    ended = nn.Sequential(plain, nn.Softmax(1)).eval()
    images, preprocess = IMAGES[:, :, :32, :32], Preprocess((0.5,) * 3, (0.2,) * 3)
    tapped = TappedNetwork(ended, ("logits",), preprocess, input_size=(32, 32), probabilities=True)
    outputs, expected = tapped(images), plain(preprocess(images)).log_softmax(1)
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.taps["logits"], expected)
