"""Views are pure functions of (seed, epoch, sample, view), drawn from the right distributions."""

import importlib.util
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm.data.auto_augment
import timm.data.random_erasing
import timm.data.transforms
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from vrm import randomness
from vrm.data.views import transforms
from vrm.data.views.policies import POLICIES, CompiledViews, ViewPolicy, view_policy
from vrm.data.views.randaugment import apply_operations
from vrm.data.views.transforms import (
    TIMM,
    TORCHSSL,
    CentralCrop,
    Cutout,
    Draws,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomFlip,
    RandomResizedCrop,
    TimmRandAugment,
)

OPTIONS: dict[str, dict[str, Any]] = {"imagenet": {"size": 8}, "vit": {"size": 8}}
NAMES = sorted(POLICIES)


def small(name: str) -> ViewPolicy:
    return view_policy(name, **OPTIONS.get(name, {}))


def noise(count: int, *, side: int = 10) -> Tensor:
    """Image number i is the same whatever the count."""
    value = randomness.bits(0, "image", torch.arange(count)[:, None], torch.arange(3 * side * side)) >> 56 & 0xFF
    return value.to(torch.uint8).view(count, 3, side, side)


def draws(count: int, *, epoch: int | Tensor = 1, view: int = 1, seed: int = 0) -> Draws:
    return Draws.for_view(torch.arange(count), epoch=epoch, view=view, seed=seed)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_a_view_does_not_depend_on_the_batch(name: str, data: st.DataObject) -> None:
    images = noise(12)
    index = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=12))
    epoch, seed = data.draw(st.integers(0, 400)), data.draw(st.integers(0, 2**31))
    policy = small(name)
    all_views = policy(images, torch.arange(12), epoch=epoch, seed=seed, num_virtual=2)
    chosen = policy(images[index], torch.tensor(index), epoch=torch.tensor(epoch), seed=seed, num_virtual=1)
    assert len(all_views) == 3
    assert len(chosen) == 2
    for whole, part in zip(all_views, chosen, strict=False):
        assert part.dtype == torch.uint8
        assert torch.equal(whole[index], part)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"none"}))
def test_every_coordinate_changes_the_view(name: str) -> None:
    images, index, policy = noise(16), torch.arange(16), small(name)

    def views(**changes: Any) -> tuple[Tensor, ...]:
        return policy(images, changes.pop("index", index), **{"epoch": 1, "seed": 0, "num_virtual": 2, **changes})

    real, first, second = views()
    assert not torch.equal(first, second)
    assert not torch.equal(real, first)
    for changes in ({"epoch": 2}, {"seed": 1}, {"index": index + 1}):
        for before, after in zip((real, first, second), views(**changes), strict=True):
            assert not torch.equal(before, after)


def test_none_leaves_the_images_alone() -> None:
    images = noise(3)
    views = view_policy("none")(images, torch.arange(3), epoch=1, seed=0, num_virtual=1)
    assert len(views) == 2
    assert all(torch.equal(view, images) for view in views)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_control_do_not_depend_on_the_draws(name: str) -> None:
    """Tensors without data pass: nothing is read back from the device, so the step can be captured."""
    images = torch.empty(4, 3, 12, 10, dtype=torch.uint8, device="meta")
    index, epoch = torch.empty(4, dtype=torch.int64, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    views = small(name)(images, index, epoch=epoch, seed=0, num_virtual=2)
    side = (8, 8) if name in OPTIONS else (12, 10)
    assert [tuple(view.shape) for view in views] == [(4, 3, *side)] * 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 1])
def test_smallest_batches(name: str, size: int) -> None:
    views = small(name)(noise(2)[:size], torch.arange(size), epoch=1, seed=0, num_virtual=1)
    assert [len(view) for view in views] == [size, size]


def benchmark(patch: pytest.MonkeyPatch) -> ModuleType:
    """The PIL pipeline that the benchmark measures against."""
    path = Path(__file__).parents[3] / "benchmarks" / "views.py"
    patch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location("benchmark_views", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cifar_equals_the_pil_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pil = benchmark(monkeypatch)
    images, index = noise(150, side=32), torch.arange(150)
    real, *virtual = view_policy("cifar")(images, index, epoch=7, seed=3, num_virtual=2)
    for view, made in enumerate((real, *virtual)):
        plans = pil.plans(index, seed=3, epoch=7, view=view)
        for image, plan, result in zip(images, plans, made, strict=True):
            if view == 0:
                plan = {**plan, "steps": [], "cutout": (0, 0, 0)}
            expected = pil.pil_view(image.permute(1, 2, 0).contiguous().numpy(), plan)
            assert torch.equal(result, torch.tensor(expected).permute(2, 0, 1)), plan


def test_policies_describe_themselves() -> None:
    crop, flip = {"transform": "RandomCrop", "padding": 2}, {"transform": "RandomFlip", "probability": 0.5}
    assert view_policy("cifar", padding=2, num_ops=3, max_cutout=0.25).describe() == {
        "name": "cifar",
        "real": [crop, flip],
        "virtual": [
            crop,
            flip,
            {"transform": "RandAugment", "num_ops": 3},
            {"transform": "Cutout", "max_side": 0.25, "fill": [125, 123, 114]},
        ],
    }
    for name in NAMES:
        description = view_policy(name).describe()
        assert json.loads(json.dumps(description)) == description


@pytest.mark.parametrize("name", NAMES)
def test_training_and_evaluation_have_one_size(name: str) -> None:
    policy, images = small(name), noise(3, side=13)
    made = policy(images, torch.arange(3), epoch=1, seed=0, num_virtual=1)
    seen = images if policy.evaluation is None else policy.evaluation(images)
    assert {view.shape for view in made} == {seen.shape}


def test_views_of_another_size_than_evaluation_are_refused() -> None:
    crop = (RandomResizedCrop(8),)
    for evaluation in (None, CentralCrop(9)):
        with pytest.raises(ValueError, match=r"'own' are trained on at the sizes \[8\] and evaluated at .*; give both"):
            ViewPolicy("own", crop, crop, evaluation)
    with pytest.raises(ValueError, match="at the sizes of the images and evaluated at"):
        ViewPolicy("own", (), (), CentralCrop(9))


def test_evaluation_of_vit_shows_the_whole_image() -> None:
    """At 7 times the size each pixel of the original stands at the centre of its 7 x 7: nothing is cut off."""
    evaluation = view_policy("vit").evaluation
    images = noise(2, side=32)
    assert evaluation is not None
    seen = evaluation(images)
    assert torch.equal(seen[:, :, 3::7, 3::7], images)
    whole = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BILINEAR)
    assert torch.equal(seen[0], torch.from_numpy(np.asarray(whole).copy()).permute(2, 0, 1))
    assert evaluation(noise(1, side=32)[:, :, :16].contiguous()).shape == (1, 3, 224, 224)


def test_evaluation_of_imagenet_cuts_the_centre() -> None:
    evaluation = view_policy("imagenet").evaluation
    image = noise(1, side=256)
    assert evaluation is not None
    assert torch.equal(evaluation(image), image[:, :, 16:240, 16:240])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *[("cifar", change) for change in ({"padding": 2}, {"num_ops": 1}, {"max_cutout": 0.1})],
        *[("digits", change) for change in ({"padding": 3}, {"degrees": 90.0}, {"shear": 0.9})],
        *[("imagenet", change) for change in ({"size": 9}, {"num_ops": 1}, {"max_cutout": 0.1})],
        *[("vit", change) for change in ({"size": 9}, {"num_ops": 1}, {"magnitude": 2.0}, {"magnitude_std": 3.0})],
        *[("vit", change) for change in ({"erasing": 1.0}, {"mean": (0.1, 0.9, 0.1)}, {"std": (0.01, 0.01, 0.01)})],
    ],
)
def test_every_option_changes_the_views(name: str, changes: dict[str, Any]) -> None:
    images, index = noise(24), torch.arange(24)
    kwargs = {"epoch": 1, "seed": 0, "num_virtual": 1}
    changed = view_policy(name, **{**OPTIONS.get(name, {}), **changes})
    assert not torch.equal(small(name)(images, index, **kwargs)[1], changed(images, index, **kwargs)[1])
    assert changed.describe() != small(name).describe()


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_floats_get_the_views_of_their_bytes(name: str) -> None:
    images, index = noise(16), torch.arange(16)
    how = {"epoch": 1, "seed": 0, "num_virtual": 2}
    of_bytes = small(name)(images, index, **how)
    of_floats = small(name)(images.float() / 255, index, **how)
    for view, floats in zip(of_bytes, of_floats, strict=True):
        assert floats.dtype == torch.float32
        # A resized crop of floats keeps fractions of a level, and what a bicubic one overshoots.
        mean_error = (floats - view.float() / 255).abs().mean()
        assert mean_error < (0.03 if small(name).crops else 1e-6)


def test_floats_keep_their_values_and_their_range() -> None:
    images, index = torch.randn(64, 3, 8, 8), torch.arange(64)
    real, virtual = small("cifar")(images, index, epoch=1, seed=0, num_virtual=1)
    assert set(real.unique().tolist()) <= {0.0, *images.unique().tolist()}, "moved, padded with zeros, nothing else"
    assert not torch.equal(real, images)
    low, high = images.amin((1, 2, 3)).clamp(max=0), images.amax((1, 2, 3)).clamp(min=1)
    assert (virtual.amin((1, 2, 3)) >= low - 1e-5).all()
    assert (virtual.amax((1, 2, 3)) <= high + 1e-5).all()
    assert (virtual.amin((1, 2, 3)) < -0.5).float().mean() > 0.9


def test_floats_are_resized_as_floats() -> None:
    images = torch.rand(4, 3, 20, 14)
    crop = transforms.CentralCrop(7)
    bytes_of_them = (images * 255).round().to(torch.uint8)
    small_floats = crop(images)
    assert (small_floats - crop(bytes_of_them).float() / 255).abs().max() < 1.6 / 255
    constant = crop(torch.full((1, 3, 20, 14), -1.7))
    assert constant == pytest.approx(-1.7, abs=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown view policy 'cifra'; did you mean 'cifar'"):
        view_policy("cifra")
    with pytest.raises(ValueError, match="view policy 'cifar' has no option 'num_op'; did you mean 'num_ops'"):
        view_policy("cifar", num_op=3)
    with pytest.raises(ValueError, match="uint8 or float32 images"):
        view_policy("none")(torch.zeros(2, 3, 4, 4).double(), torch.arange(2), epoch=1, seed=0, num_virtual=1)
    with pytest.raises(ValueError, match="one index for each of the 2 images"):
        view_policy("none")(noise(2), torch.arange(3), epoch=1, seed=0, num_virtual=1)
    with pytest.raises(ValueError, match="does not fit images of 1 channels"):
        Cutout()(noise(2)[:, :1], draws(2))


# Distributions. Bounds are quantiles at 0.999 (0.99999 where many are tested); the seed fixes every draw.


def chi_square(counts: Tensor, probability: Tensor | float) -> float:
    expected = counts.sum() * probability
    return float(((counts - expected) ** 2 / expected).sum())


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    """Kolmogorov and Smirnov's test."""
    ordered = ((values.double() - low) / (high - low)).sort().values
    assert ordered[0] >= 0
    assert ordered[-1] < 1
    rank = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    distance = torch.maximum((rank[1:] - ordered).max(), (ordered - rank[:-1]).max())
    assert distance * math.sqrt(len(ordered)) < 2.47


class Recorder:
    """Stands in for a function of pixels and keeps its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, images: Tensor, *arguments: Any, **_: Any) -> Tensor:
        self.calls.append(arguments)
        return images


COUNT = 40_000
TINY = torch.zeros(COUNT, 3, 1, 1, dtype=torch.uint8)


def test_randaugment_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "apply_operations", recorder := Recorder())
    RandAugment(num_ops=2)(TINY, draws(COUNT))
    (names, first, argument), (_, second, other) = recorder.calls
    assert names == list(TORCHSSL)
    assert len(names) == 14
    pairs = torch.bincount(first * 14 + second, minlength=196)
    assert chi_square(pairs, 1 / 196) < 262.0  # operations uniform and independent: 195 degrees of freedom
    for choice, values in ((first, argument), (second, other)):
        for number, (low, high) in enumerate(TORCHSSL.values()):
            assert_uniform(values[choice == number], low, high)


def test_crop_and_flip_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms.geometry, "crop", crop := Recorder())
    monkeypatch.setattr(transforms.geometry, "flip", flip := Recorder())
    for view in (0, 1):
        for step in (RandomCrop(4), RandomFlip()):
            step(TINY, draws(COUNT, view=view))
    (top, left), (other_top, _) = crop.calls
    assert chi_square(torch.bincount(top * 9 + left, minlength=81), 1 / 81) < 124.9  # 80 degrees of freedom
    assert chi_square(torch.bincount(top * 9 + other_top, minlength=81), 1 / 81) < 124.9  # views are independent
    (flipped,), (other,) = flip.calls
    assert chi_square(torch.bincount(flipped.int() * 2 + other.int(), minlength=4), 1 / 4) < 16.3  # 3 degrees


def test_cutout_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms.pixels, "cutout", recorder := Recorder())
    Cutout(0.5)(torch.zeros(COUNT, 3, 2, 5, dtype=torch.uint8), draws(COUNT))
    side, x, y = recorder.calls[0]
    assert_uniform(side, 0, 0.5)
    assert_uniform(x, 0, 5)
    assert_uniform(y, 0, 2)


def test_affine_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms.geometry, "affine", recorder := Recorder())
    RandomAffine(degrees=15, shear=0.2)(TINY, draws(COUNT))
    a, b, c, d, e, f = recorder.calls[0][0].unbind(1)
    angle = torch.atan2(-d, a)
    assert_uniform(angle.rad2deg(), -15, 15)
    assert_uniform((b - angle.sin()) / angle.cos(), -0.2, 0.2)
    centre = 0.5
    torch.testing.assert_close(a * centre + b * centre + c, torch.full_like(a, centre))
    torch.testing.assert_close(d * centre + e * centre + f, torch.full_like(a, centre))


def test_timm_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "apply_operations", recorder := Recorder())
    TimmRandAugment()(TINY, draws(COUNT))
    (names, first, argument), (_, second, _) = recorder.calls
    assert names == [*TIMM, "Identity"]
    share = torch.tensor([1 / 30] * 15 + [1 / 2], dtype=torch.float64)
    pairs = torch.bincount(first * 16 + second, minlength=256)
    assert chi_square(pairs, torch.outer(share, share).flatten()) < 330.6  # 255 degrees of freedom
    degrees = argument[first == TIMM.index("Rotate")]
    level = degrees.abs() / 3
    clipped = float((level == 10).double().mean())
    assert abs(clipped - 0.02275) < 3.3 * math.sqrt(0.02275 / len(level))  # P(normal > 2)
    assert abs(float(level.mean()) - 8.996) < 3.3 * 0.5 / math.sqrt(len(level))
    assert abs(float((degrees > 0).double().mean()) - 0.5) < 3.3 * 0.5 / math.sqrt(len(level))


# timm and torchvision as oracles: their own code, fed with our numbers.


def fed(numbers: list[float]) -> SimpleNamespace:
    """A ``random`` module that hands out these uniform numbers."""
    supply = iter(numbers)
    return SimpleNamespace(
        random=lambda: next(supply),
        uniform=lambda low, high: low + (high - low) * next(supply),
        randint=lambda low, high: low + int((high - low + 1) * next(supply)),
    )


@pytest.mark.parametrize("operation", TIMM)
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_timm_operations(operation: str, resample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    magnitudes, images = [0.0, 3.3, 8.6, 9.0, 9.99], noise(5, side=13)
    increasing = timm.data.auto_augment._RAND_INCREASING_TRANSFORMS
    theirs = {name.removesuffix("Increasing").removesuffix("Rel"): name for name in increasing}
    assert sorted(theirs) == sorted(TIMM)
    for negated in (False, True):
        level = torch.tensor(magnitudes, dtype=torch.float64)
        argument = transforms.timm_arguments(level, torch.full((5,), negated))[TIMM.index(operation)]
        made = apply_operations(
            images, [operation], torch.zeros(5, dtype=torch.int64), argument, resample=resample, fill=(124, 116, 104)
        )
        for magnitude, image, result in zip(magnitudes, images, made, strict=True):
            monkeypatch.setattr(timm.data.auto_augment, "random", fed([0.75 if negated else 0.25]))
            hparams = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling[resample.upper()]}
            step = timm.data.auto_augment.AugmentOp(theirs[operation], prob=1.0, magnitude=magnitude, hparams=hparams)
            expected = step(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
            assert torch.equal(result, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_timm_random_interpolation_takes_both() -> None:
    images = noise(64)
    made = {kind: TimmRandAugment(resample=kind, num_ops=1)(images, draws(64)) for kind in ("bilinear", "bicubic")}
    mixed = TimmRandAugment(resample="random", num_ops=1)(images, draws(64))
    same = {kind: (mixed == view).flatten(1).all(1) for kind, view in made.items()}
    assert (same["bilinear"] | same["bicubic"]).all()
    assert (same["bilinear"] & ~same["bicubic"]).any()
    assert (same["bicubic"] & ~same["bilinear"]).any()


@pytest.mark.parametrize("shape", [(32, 32), (9, 40), (3, 3)])
def test_erased_boxes_are_timms(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    count = 200
    images = torch.full((count, 3, *shape), 255, dtype=torch.uint8)
    step = RandomErasing(probability=0.5, mode="const", mean=(0.0, 0.0, 0.0))
    made = step(images, draws(count))
    numbers = draws(count).uniform("erasing", 23).T.tolist()
    theirs = timm.data.random_erasing.RandomErasing(probability=0.5, mode="const", device="cpu")
    erased = 0
    for image, result, (applied, top, left, *attempts) in zip(images, made, numbers, strict=True):
        supply = [applied]
        for area, aspect in zip(attempts[:10], attempts[10:], strict=True):
            # The corner is drawn after the attempt that fits.
            height = (area := (0.02 + (1 / 3 - 0.02) * area) * shape[0] * shape[1]) * (
                ratio := math.exp(math.log(0.3) * (1 - 2 * aspect))
            )
            supply += [(area / shape[0] / shape[1] - 0.02) / (1 / 3 - 0.02), aspect]
            if round(math.sqrt(height)) < shape[0] and round(math.sqrt(area / ratio)) < shape[1]:
                break
        monkeypatch.setattr(timm.data.random_erasing, "random", fed([*supply, top, left]))
        expected = theirs(image.float())
        erased += int(not torch.equal(expected, image.float()))
        assert torch.equal(result.float(), expected)
    assert erased > 30


def test_erased_content() -> None:
    count = 400
    images = torch.full((count, 3, 16, 16), 255, dtype=torch.uint8)
    for mode in ("const", "rand", "pixel"):
        step = RandomErasing(probability=0.25, mode=mode, mean=(0.3, 0.4, 0.5), std=(0.02, 0.04, 0.06))
        made = step(images, draws(count))
        top, left, height, width = step.box(images, draws(count))
        row, column = torch.arange(16)[:, None], torch.arange(16)
        rows = (row >= top.view(-1, 1, 1)) & (row < (top + height).view(-1, 1, 1))
        columns = (column >= left.view(-1, 1, 1)) & (column < (left + width).view(-1, 1, 1))
        inside = (rows & columns)[:, None].expand_as(made)
        assert (made[~inside] == 255).all()
        assert abs(float((height > 0).double().mean()) - 0.25) < 3.3 * math.sqrt(0.25 * 0.75 / count)
        boxes = [made[i][inside[i]].view(3, -1).double() for i in range(count) if height[i] * width[i] > 1]
        colours = torch.cat([box[:, :1] for box in boxes], dim=1)
        if mode == "const":
            assert (colours == torch.tensor([76.0, 102.0, 128.0])[:, None]).all()
        else:
            expected = torch.tensor([[0.3, 0.4, 0.5], [0.02, 0.04, 0.06]], dtype=torch.float64) * 255
            error = expected[1] / math.sqrt(colours.shape[1])
            assert ((colours.mean(1) - expected[0]).abs() < 3.5 * error).all()
            assert ((colours.std(1) - expected[1]).abs() < 3.5 * error).all()
        assert all((box == box[:, :1]).all() for box in boxes) == (mode != "pixel")


@pytest.mark.parametrize("shape", [(32, 32), (20, 45), (2, 60), (60, 2)])
def test_resized_boxes_are_timms(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    count = 200
    step = RandomResizedCrop(8)
    boxes = torch.stack(step.box(*shape, draws(count)), dim=1).tolist()
    numbers = draws(count).uniform("resized crop", 22).T.tolist()
    picture = Image.new("RGB", shape[::-1])
    for box, (top, left, *attempts) in zip(boxes, numbers, strict=True):
        supply = []
        for area, aspect in zip(attempts[:10], attempts[10:], strict=True):
            target = (0.08 + 0.92 * area) * shape[0] * shape[1]
            ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect)
            supply += [area, aspect]
            if round(math.sqrt(target * ratio)) <= shape[1] and round(math.sqrt(target / ratio)) <= shape[0]:
                break
        monkeypatch.setattr(timm.data.transforms, "random", fed([*supply, top, left]))
        get_params = timm.data.transforms.RandomResizedCropAndInterpolation.get_params
        assert list(get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3))) == box


def test_global_generators_stay_untouched() -> None:
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for name in NAMES:
        small(name)(noise(4), torch.arange(4), epoch=1, seed=0, num_virtual=1)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert (numpy_state == np.random.get_state()[1]).all()


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_makes_the_same_views(name: str) -> None:
    images, index = noise(200, side=32), torch.arange(200)
    options: dict[str, Any] = {"epoch": 7, "seed": 3, "num_virtual": 2}
    expected = small(name)(images, index, **options)
    made = small(name)(images.cuda(), index.cuda(), **{**options, "epoch": torch.tensor(7, device="cuda")})
    for here, there in zip(expected, made, strict=True):
        assert torch.equal(here, there.cpu())


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_makes_the_same_views_compiled(name: str) -> None:
    images, index, epoch = noise(200, side=32).cuda(), torch.arange(200).cuda(), torch.tensor(7).cuda()
    made = CompiledViews(small(name))(images, index, epoch=epoch, seed=3, num_virtual=2)
    expected = small(name)(images.cpu(), index.cpu(), epoch=7, seed=3, num_virtual=2)
    for here, there in zip(expected, made, strict=True):
        assert torch.equal(here, there.cpu())


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What is compiled is traced and executed, operation by operation as on a GPU; the graphs."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda made, *, options, **how: compile(made, backend=keep, **how))
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize("name", NAMES)
def test_views_compile_to_one_graph_without_numbers_of_the_host(name: str, tracing: list[torch.fx.GraphModule]) -> None:
    policy, images, index = small(name), noise(6), torch.arange(6) + 4
    views = CompiledViews(policy)
    for epoch in (1, 2):
        made = views(images, index, epoch=torch.tensor(epoch), seed=3, num_virtual=2)
        for view, expected in zip(made, policy(images, index, epoch=epoch, seed=3, num_virtual=2), strict=True):
            assert torch.equal(view, expected)
    views(images[:5], index[:5], epoch=torch.tensor(1), seed=3, num_virtual=2)
    assert len(views.checked) == len(tracing) == 2, "one for each size of batch"
    # A tensor made of Python's numbers would be sent to the GPU in every step: such are kept there.
    assert not any(node.target is torch.tensor for graph in tracing for node in graph.graph.nodes)


def test_views_that_are_cropped_already_compile(tracing: list[torch.fx.GraphModule]) -> None:
    policy, images, index = small("imagenet"), [noise(4, side=8), noise(4, side=8)], torch.arange(4)
    made = CompiledViews(policy)(images, index, epoch=torch.tensor(1), seed=0, num_virtual=1)
    for view, expected in zip(made, policy(images, index, epoch=1, seed=0, num_virtual=1), strict=True):
        assert torch.equal(view, expected)


def test_compiled_views_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a single byte, in an epoch to come."""

    def wrong(make: Callable[..., tuple[Tensor, ...]], **how: Any) -> Callable[..., tuple[Tensor, ...]]:
        def made(*images: Any, epoch: Tensor, **rest: Any) -> tuple[Tensor, ...]:
            real, virtual = make(*images, epoch=epoch, **rest)
            virtual[-1, -1, -1, -1] += (epoch == 20).byte()
            return real, virtual

        return made

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(RuntimeError, match=r"compiled views 'cifar' differ from the policy's in 1 bytes of 32 epochs"):
        CompiledViews(small("cifar"))(noise(3), torch.arange(3), epoch=torch.tensor(1), seed=0, num_virtual=1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_virtual", [0, 2])
def test_numbers_made_at_once_are_those_of_each_view(policy: str, num_virtual: int) -> None:
    made, index = view_policy(policy), torch.arange(5) * 31 - 60
    steps = [made.real, *[(*made.virtual, *made.virtual[:1])] * num_virtual]  # one that comes twice draws the same
    for view, found in enumerate(Draws.for_views(index, epoch=torch.tensor(7), seed=3, steps=steps)):
        alone = Draws.for_view(index, epoch=7, view=view, seed=3)
        assert torch.equal(found.key, alone.key)
        assert set(found.drawn) == {transform.uniforms[0] for transform in steps[view]}
        for purpose, count in (transform.uniforms for transform in steps[view]):
            assert torch.equal(found.drawn[purpose], alone.uniform(purpose, count))
            assert torch.equal(found.uniform(purpose, 1), alone.uniform(purpose, 1))
