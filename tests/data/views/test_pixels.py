"""Every operation equals PIL: not one pixel differs, on the reference vectors and on random images of any shape."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from safetensors import safe_open
from torch import Tensor

from vrm.data.views import geometry, pixels
from vrm.data.views.randaugment import MAPS, OPERATIONS, apply_operations

GOLDENS = Path(os.environ.get("VRM_GOLDENS", Path(__file__).parents[2] / "goldens"))
FILL = (125, 123, 114)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def to_pil(image_CHW: Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def transform(image: Image.Image, numbers: tuple[float, ...], **options: object) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, numbers, **options)


def solarize_add(image: Image.Image, addend: float) -> Image.Image:
    table = [min(255, value + int(addend)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


PIL_OPERATIONS: dict[str, Callable[..., Image.Image]] = {
    "Identity": lambda image, value: image,
    "AutoContrast": lambda image, value: ImageOps.autocontrast(image),
    "Brightness": lambda image, value: ImageEnhance.Brightness(image).enhance(value),
    "Color": lambda image, value: ImageEnhance.Color(image).enhance(value),
    "Contrast": lambda image, value: ImageEnhance.Contrast(image).enhance(value),
    "Equalize": lambda image, value: ImageOps.equalize(image),
    "Invert": lambda image, value: ImageOps.invert(image),
    "Posterize": lambda image, value: ImageOps.posterize(image, int(value)),
    "Sharpness": lambda image, value: ImageEnhance.Sharpness(image).enhance(value),
    "Solarize": lambda image, value: ImageOps.solarize(image, value),
    "SolarizeAdd": solarize_add,
    "Rotate": lambda image, value, **options: image.rotate(value, **options),
    "ShearX": lambda image, value, **options: transform(image, (1, value, 0, 0, 1, 0), **options),
    "ShearY": lambda image, value, **options: transform(image, (1, 0, 0, value, 1, 0), **options),
    "TranslateX": lambda image, value, **options: transform(image, (1, 0, value * image.width, 0, 1, 0), **options),
    "TranslateY": lambda image, value, **options: transform(image, (1, 0, 0, 0, 1, value * image.height), **options),
}
RANGES = {
    "Brightness": (-0.5, 2.5),
    "Color": (-0.5, 2.5),
    "Contrast": (-0.5, 2.5),
    "Sharpness": (-0.5, 2.5),
    "Posterize": (1, 8),
    "Solarize": (0, 257),
    "SolarizeAdd": (0, 128),
    "Rotate": (-400, 400),
    "ShearX": (-1, 1),
    "ShearY": (-1, 1),
    "TranslateX": (-1.1, 1.1),
    "TranslateY": (-1.1, 1.1),
}


def one(image_CHW: Tensor, operation: str, value: float, **options: object) -> Tensor:
    argument = torch.tensor([value], dtype=torch.float64)
    return apply_operations(image_CHW[None], [operation], torch.tensor([0]), argument, **options)[0]


@st.composite
def images(draw: st.DrawFn, max_side: int = 40) -> Tensor:
    """RGB images of any shape: noise, gradients, constant, two-valued, and of a narrow range."""
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    low, high = sorted(draw(st.tuples(st.integers(0, 255), st.integers(0, 255))))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["noise", "gradient", "constant", "two values", "skewed"]))
    shape = (3, height, width)
    if kind == "noise":
        image = numbers.integers(low, high + 1, shape)
    elif kind == "gradient":
        image = np.broadcast_to(np.linspace(low, high, width), shape)
    elif kind == "constant":
        image = np.broadcast_to(numbers.integers(0, 256, (3, 1, 1)), shape)
    elif kind == "two values":
        image = np.where(numbers.random(shape) < 0.5, low, high)
    else:
        image = 255 * numbers.random(shape) ** 4
    return torch.from_numpy(image.astype(np.uint8))


def golden_cases() -> list[tuple[Path, str]]:
    found = []
    for path in sorted(GOLDENS.glob("randaugment_torchssl*.safetensors")):
        with safe_open(path, "pt") as file:
            cases = json.loads(file.metadata()["spec"])["cases"]
        found += [(path, operation) for operation in dict.fromkeys(case["op"] for case in cases)]
    return found


@pytest.mark.parametrize(("path", "operation"), golden_cases(), ids=lambda value: getattr(value, "stem", value))
def test_golden(path: Path, operation: str) -> None:
    with safe_open(path, "pt") as file:
        cases = [case for case in json.loads(file.metadata()["spec"])["cases"] if case["op"] == operation]
        assert cases
        for case in cases:
            image = file.get_tensor(case["image"]).permute(2, 0, 1)
            expected = file.get_tensor(case["out"]).permute(2, 0, 1)
            if operation == "Cutout":
                side, x, y = torch.tensor([[case["value"]], *([c] for c in case["centre"])], dtype=torch.float64)
                result = pixels.cutout(image[None], side, x, y, fill=FILL)[0]
            else:
                result = one(image, operation, case["value"])
            assert torch.equal(result, expected), case


def test_goldens_are_there() -> None:
    assert golden_cases(), f"no randaugment_torchssl*.safetensors in {GOLDENS}"


@pytest.mark.parametrize("operation", OPERATIONS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_operation_equals_pil(operation: str, data: st.DataObject) -> None:
    image = data.draw(images())
    low, high = RANGES.get(operation, (0, 1))
    value = data.draw(st.one_of(st.floats(low, high, allow_subnormal=False), st.integers(int(low), int(high))))
    expected = from_pil(PIL_OPERATIONS[operation](to_pil(image), value))
    assert torch.equal(one(image, operation, value), expected)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("operation", MAPS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_interpolated_map_equals_pil(operation: str, resample: str, data: st.DataObject) -> None:
    image = data.draw(images())
    value = data.draw(st.floats(*RANGES[operation], allow_subnormal=False))
    expected = PIL_OPERATIONS[operation](to_pil(image), value, resample=RESAMPLING[resample], fillcolor=(9, 99, 199))
    assert torch.equal(one(image, operation, value, resample=resample, fill=(9, 99, 199)), from_pil(expected))


@pytest.mark.parametrize("resample", RESAMPLING)
@given(image=images(), numbers=st.tuples(*[st.floats(-3, 3, allow_subnormal=False)] * 6))
@example(image=torch.arange(75, dtype=torch.uint8).view(3, 5, 5), numbers=(-1.0, 0.0, 5.0, 0.0, -0.5, 5.0))
@settings(max_examples=60, deadline=None)
def test_any_map_equals_pil(resample: str, image: Tensor, numbers: tuple[float, ...]) -> None:
    expected = transform(to_pil(image), numbers, resample=RESAMPLING[resample], fillcolor=(9, 99, 199))
    result = geometry.affine(
        image[None], torch.tensor([numbers], dtype=torch.float64), resample=resample, fill=(9, 99, 199)
    )
    assert torch.equal(result[0], from_pil(expected))


@given(image=images(), side=st.floats(0, 1.5), x=st.floats(0, 1, exclude_max=True), y=st.floats(0, 1, exclude_max=True))
@settings(max_examples=100, deadline=None)
def test_cutout_equals_pil(image: Tensor, side: float, x: float, y: float) -> None:
    height, width = image.shape[1:]
    x, y = x * width, y * height
    expected = to_pil(image)
    if side > 0:
        pixels_wide = side * width
        left, top = int(max(0, x - pixels_wide / 2)), int(max(0, y - pixels_wide / 2))
        box = (left, top, min(width, left + pixels_wide), min(height, top + pixels_wide))
        ImageDraw.Draw(expected).rectangle(box, FILL)
    arguments = (torch.tensor([value], dtype=torch.float64) for value in (side, x, y))
    assert torch.equal(pixels.cutout(image[None], *arguments, fill=FILL)[0], from_pil(expected))


@given(data=st.data(), image=images(), padding=st.integers(0, 5), mirrored=st.booleans())
@settings(max_examples=60, deadline=None)
def test_crop_and_flip_equal_pil(data: st.DataObject, image: Tensor, padding: int, mirrored: bool) -> None:
    top, left = data.draw(st.tuples(*[st.integers(0, 2 * padding)] * 2))
    height, width = image.shape[1:]
    expected = ImageOps.expand(to_pil(image), padding).crop((left, top, left + width, top + height))
    if mirrored:
        expected = ImageOps.mirror(expected)
    result = geometry.crop(image[None], torch.tensor([top]), torch.tensor([left]), padding=padding)
    assert torch.equal(geometry.flip(result, torch.tensor([mirrored]))[0], from_pil(expected))


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@given(data=st.data(), image=images(), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
@settings(max_examples=100, deadline=None)
def test_resized_crop_equals_pil(resample: str, data: st.DataObject, image: Tensor, size: tuple[int, int]) -> None:
    height, width = (data.draw(st.integers(1, side)) for side in image.shape[1:])
    top, left = data.draw(st.integers(0, image.shape[1] - height)), data.draw(st.integers(0, image.shape[2] - width))
    # One side at a time: which one Pillow begins with depends on its version.
    expected = to_pil(image).crop((left, top, left + width, top + height))
    for shape in ((size[1], height), (size[1], size[0])):
        expected = expected.resize(shape, RESAMPLING[resample])
    box = (torch.tensor([value]) for value in (top, left, height, width))
    result = geometry.resized_crop(image[None], *box, size=size, resample=resample)
    assert torch.equal(result[0], from_pil(expected))


@pytest.mark.parametrize("static", [False, True])
@given(seed=st.integers(0, 2**32 - 1), size=st.tuples(st.integers(0, 24), st.integers(1, 12), st.integers(1, 12)))
@settings(max_examples=40, deadline=None)
def test_mixed_batch_equals_one_by_one(static: bool, seed: int, size: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = size
    stack = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
    operations = [OPERATIONS[i] for i in torch.randperm(len(OPERATIONS), generator=generator)]
    choice = torch.randint(0, len(operations), (batch,), generator=generator)
    low, high = torch.tensor([RANGES.get(name, (0, 1)) for name in operations], dtype=torch.float64)[choice].unbind(1)
    argument = low + (high - low) * torch.rand(batch, dtype=torch.float64, generator=generator)
    before = stack.clone()
    result = apply_operations(stack, operations, choice, argument, static=static)
    assert torch.equal(stack, before)
    for i in range(batch):
        assert torch.equal(result[i], one(stack[i], operations[choice[i]], argument[i].item()))


def test_grey_images_follow_mode_l() -> None:
    image = torch.arange(48, dtype=torch.uint8).view(1, 6, 8) * 5
    for operation in OPERATIONS:
        value = {"Posterize": 3.0, "Solarize": 100.0, "SolarizeAdd": 50.0}.get(operation, 0.3)
        if operation == "SolarizeAdd":
            expected = to_pil(image.expand(3, -1, -1)).point(
                [min(255, v + 50) if v < 128 else v for v in range(256)] * 3
            )
            assert torch.equal(one(image, operation, value)[0], from_pil(expected)[0])
        else:
            expected = PIL_OPERATIONS[operation](Image.fromarray(image[0].numpy()), value)
            assert torch.equal(one(image, operation, value)[0], torch.from_numpy(np.array(expected)))


def test_refusals() -> None:
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    argument = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="unknown operations Blur; known: AutoContrast"):
        apply_operations(image, ["Blur"], torch.tensor([0]), argument)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        apply_operations(image[:, :2], ["Color"], torch.tensor([0]), argument)
    with pytest.raises(ValueError, match="resample must be one of nearest, bilinear, bicubic, got 'lanczos'"):
        geometry.affine(image, geometry.identity(argument), resample="lanczos")
    with pytest.raises(ValueError, match="too large for an affine map; sides are at most 8192"):
        geometry.affine(torch.zeros(1, 1, 1, 8193, dtype=torch.uint8), geometry.identity(argument))
