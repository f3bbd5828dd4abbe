"""The input of each network: what is given counts before its card, its library and the data, and is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vrm import config, data, models
from vrm.config import ConfigError
from vrm.data import DataSet
from vrm.methods.kd import kd_loss
from vrm.models import IMAGENET, Preprocess
from vrm.runs import api as runs
from vrm.runs.assembly import Assembly, assemble
from vrm.runs.checks.teacher import check_teacher, measure_teacher, teacher_key

from .own import DIGITS, WHOLE, Net, Pixels, checked, own, settings
from .small import QUIET, small, train

NOWHERE = Path("/nonexistent-run")
HALF = [0.5, 0.5, 0.5]
INDEX = torch.arange(4)


class OfImageNet(Pixels):
    """The teacher of the digits as one that was trained with ImageNet's mean and standard deviation."""

    def forward(self, images: Tensor) -> Tensor:
        mean, std, own_mean, own_std = (
            torch.tensor(value)[:, None, None] for value in (*IMAGENET, WHOLE.mean, WHOLE.std)
        )
        return super().forward((images * std + mean - own_mean) / own_std)


def given(student: nn.Module, teacher: nn.Module, *, dataset: DataSet = DIGITS, **sections: dict[str, Any]) -> Assembly:
    """A run with settings ``of_student`` and ``of_teacher``."""
    run = settings(NOWHERE, student, teacher)
    more = {name.removeprefix("of_"): section for name, section in sections.items()}
    run = config.validate(config.merge(run.model_dump(mode="json"), more))
    return assemble(run, dataset=dataset, student=student, teacher=teacher)


def teacher_of(assembly: Assembly) -> Preprocess:
    """How images reach the teacher."""
    assert assembly.teacher is not None
    preprocess = assembly.teacher.teacher.preprocess
    assert isinstance(preprocess, Preprocess)
    return preprocess


def rows(assembly: Assembly) -> dict[str, tuple[str, str]]:
    """The rows of the start table: result and text."""
    return {check.name: (check.result, check.text) for check in checked(assembly).checks}


def enlarged(policy: str = "vit") -> DataSet:
    """Digits whose views are enlarged to 224 pixels."""
    return replace(DIGITS, view_policy=policy)


# ---- who decides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_what_is_given_reaches_the_network(role: str) -> None:
    contract = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "size": 12}
    assembly = given(Net(), Net(), **{f"of_{role}": contract})
    tapped = assembly.distiller.student if role == "student" else assembly.teacher.teacher  # type: ignore[union-attr]
    seen: list[Tensor] = []
    tapped.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    images = DIGITS.test.batch(INDEX)
    tapped(images)
    pixels = nn.functional.interpolate(images / 255, (12, 12), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    torch.testing.assert_close(seen[0], (pixels - mean) / std)
    text = rows(assembly)[f"{role} input"][1]
    said = {part: f'{role}_settings={{"{part}": ..}}' for part in ("size", "mean", "std")}
    assert f"resized to 12x12 for it, as {said['size']} says" in text
    assert f"mean (0.1, 0.2, 0.3) of {said['mean']} and std (0.4, 0.5, 0.6) of {said['std']}; the data have" in text


def test_one_part_may_be_given_alone() -> None:
    preprocess = teacher_of(given(Net(), Net(), of_teacher={"mean": HALF}))
    assert preprocess.mean.flatten().tolist() == HALF
    assert preprocess.std.flatten().tolist() == pytest.approx(WHOLE.std)


def test_timm_counts_before_the_data_and_what_is_given_before_timm() -> None:
    teacher = timm.create_model("test_vit", num_classes=10)
    size = teacher.pretrained_cfg["input_size"][1:]
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assembly = own(NOWHERE, Net(), teacher)
    assert teacher_of(assembly).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert teacher_of(assembly).size == size
    assert assembly.master is not None
    assert set(assembly.master.origins.values()) == {"timm's pretrained_cfg", "the data"}
    again = given(Net(), teacher, of_teacher={"std": HALF})
    assert teacher_of(again).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert teacher_of(again).std.flatten().tolist() == HALF


def test_a_student_of_a_library_keeps_the_size_of_the_data() -> None:
    convolutions = own(NOWHERE, timm.create_model("test_resnet", num_classes=10)).student.card
    assert convolutions.input_size == (8, 8)
    assert convolutions.mean == (0.5, 0.5, 0.5)
    transformer = timm.create_model("test_vit", num_classes=10)
    with pytest.raises(ConfigError, match=r"student .* failed on images of 3x8x8 .*; give student\.size=PIXELS"):
        own(NOWHERE, transformer)
    side = transformer.pretrained_cfg["input_size"][1]
    assert given(transformer, Net(), of_student={"size": side}).student.card.input_size == (side, side)


def test_a_new_student_by_name_has_the_normalisation_of_the_data() -> None:
    card = assemble(small(NOWHERE, "method=ce", "student=timm:test_resnet").run).student.card
    assert (card.mean, card.std, card.input_size) == (WHOLE.mean, WHOLE.std, (8, 8))


def test_a_card_counts_before_the_data_and_what_is_given_before_the_card(tmp_path: Path) -> None:
    words = ["model=resnet8", "data.labels_per_class=3", "epochs=1", "threads=1", "batch_size=8", f"run={tmp_path}/r"]
    words += ["model.mean=[0.1,0.2,0.3]", "model.std=[0.4,0.5,0.6]", "model.size=12"]
    found = train(config.resolve("train", "digits", words))
    card = json.loads((tmp_path / "r/model.json").read_text())
    assert (card["mean"], card["std"], card["input_size"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [12, 12])
    _, scores, _ = runs.evaluate_model("digits", [f"model={tmp_path}/r/"], console=QUIET)
    assert scores == pytest.approx({key: found["last"][key] for key in scores})
    _, scores, _ = runs.evaluate_model("digits", [f"model={tmp_path}/r/", "model.mean=[-9,-9,-9]"], console=QUIET)
    assert scores["loss"] != pytest.approx(found["last"]["loss"])
    assembly = assemble(small(NOWHERE, "method=kd", f"teacher={tmp_path}/r/", "teacher.std=[1,1,1]").run)
    assert teacher_of(assembly).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert teacher_of(assembly).std.flatten().tolist() == [1, 1, 1]
    assert "as its card says; mean (0.1, 0.2, 0.3) of its card and std (1, 1, 1) of 'teacher.std'" in (
        check_teacher(assembly, measure_teacher(assembly))[1].detail
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mean": [0.5]}, r"teacher\.mean=\[0\.5\] has 1 number, but the network takes images of 3 channels; give 3"),
        ({"std": [1, 1]}, r"teacher\.std=\[1\.0, 1\.0\] has 2 numbers, but"),
        (
            {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]},
            r"teacher\.mean=\[123\.7, 116\.3, 103\.5\] lies above 1, but .*; divide mean and std by 255$",
        ),
        ({"antialias": False}, r"teacher\.antialias=false has no effect: images of 8x8 are not resized to fewer"),
        ({"antialias": False, "size": 16}, r"teacher\.antialias=false has no effect"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given(Net(), Net(), of_teacher=wrong)


@pytest.mark.parametrize("wrong", [{"std": [1, 0, 1]}, {"mean": [float("nan"), 0, 0]}, {"size": 0}])
def test_values_without_sense_are_refused_by_their_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"teacher\.{next(iter(wrong))}"):
        given(Net(), Net(), of_teacher=wrong)


# ---- antialiasing ----------------------------------------------------------------------------------------------------


def test_images_that_were_enlarged_are_subsampled_and_others_averaged() -> None:
    back = given(Net(), Net(), dataset=enlarged(), of_teacher={"size": 8})
    assert not teacher_of(back).antialias
    assert teacher_of(back)(back.data.test.batch(INDEX)).shape == (4, 3, 8, 8)
    assert back.data.image_size == (224, 224)
    (_, text) = rows(back)["teacher input"]
    assert "224x224 images are resized to 8x8" in text
    assert "without antialiasing (the views had enlarged images of 8x8)" in text
    smaller = given(Net(), Net(), of_teacher={"size": 4})
    assert teacher_of(smaller).antialias
    assert "with antialiasing (by default)" in rows(smaller)["teacher input"][1]
    told = given(Net(), Net(), of_teacher={"size": 4, "antialias": False})
    assert not teacher_of(told).antialias
    assert teacher_key(told) != teacher_key(smaller)


def test_subsampling_gives_the_original_back() -> None:
    """At 28 times the size, an even ratio, between the two middle pixels: nearly the original."""
    assembly = given(Net(), Net(), dataset=enlarged(), of_teacher={"size": 8, "mean": [0.0] * 3, "std": [1.0] * 3})
    seen = teacher_of(assembly)(assembly.data.test.batch(INDEX))
    original = DIGITS.test.with_crop(None).batch(INDEX) / 255
    assert float((seen - original).abs().max()) < 0.02


# ---- a wrong normalisation -------------------------------------------------------------------------------------------


def test_a_teacher_that_does_better_with_another_normalisation_is_told() -> None:
    assembly = own(NOWHERE, Net(), OfImageNet())
    record = measure_teacher(assembly)
    score, how, _ = check_teacher(assembly, record)
    good = measure_teacher(own(NOWHERE, Net(), Pixels()))["scores"]["top1"]
    assert record["scores"]["top1"] < good - 10
    assert how.result == "note"
    assert "its normalisation or size is a suspect: on 200 images it reaches" in how.text
    assert "with mean and std of ImageNet instead of" in how.text
    assert "give teacher.mean=[0.485,0.456,0.406] teacher.std=[0.229,0.224,0.225]" in how.text
    if score.result == "fail":
        assert "teacher.mean=[0.485,0.456,0.406]" in score.fix
    told = given(Net(), OfImageNet(), of_teacher={"mean": IMAGENET[0], "std": IMAGENET[1]})
    again = measure_teacher(told)
    assert again["scores"]["top1"] == pytest.approx(good)
    assert again["tried"] == {}
    assert check_teacher(told, again)[1].result == "ok"


def test_a_good_teacher_is_not_suspected() -> None:
    assembly = own(NOWHERE, Net(), Pixels())
    before = teacher_of(assembly)
    record = measure_teacher(assembly, sample=100)
    assert [*record["tried"]] == ["as it is", "mean and std of ImageNet", "mean and std of 0.5", "no normalisation"]
    assert check_teacher(assembly, record)[1].result == "ok"
    assert teacher_of(assembly) is before


def test_a_teacher_of_the_size_before_the_views_is_told() -> None:
    class Eight(Pixels):
        """Takes any size, and does well at 8 x 8 alone."""

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images[:, :, :8, :8])

    assembly = own(NOWHERE, Net(), Eight(), dataset=enlarged())
    record = measure_teacher(assembly, sample=60)
    assert record["tried"]["the images' size before the views"] > record["tried"]["as it is"] + 30
    assert "teacher.size=8" in check_teacher(assembly, record)[1].text


# ---- probabilities ---------------------------------------------------------------------------------------------------


def test_a_teacher_that_ends_in_a_softmax() -> None:
    plain, ended = Pixels(), nn.Sequential(Pixels(), nn.Softmax(1))
    images = DIGITS.train.batch(INDEX)
    student = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))

    def loss(teacher: nn.Module, **outputs: str) -> Tensor:
        assembly = given(Net(), teacher, of_teacher=outputs)
        assert assembly.teacher is not None
        return kd_loss(student, assembly.teacher(images).logits)

    expected = loss(plain)
    torch.testing.assert_close(loss(ended, outputs="probabilities"), expected)
    assert abs(float(loss(ended) - expected)) > 0.1
    silent, told = own(NOWHERE, Net(), ended), given(Net(), ended, of_teacher={"outputs": "probabilities"})
    result, text = rows(silent)["teacher output"]
    assert result == "note"
    assert "look like probabilities" in text
    assert 'give teacher_settings={"outputs": "probabilities"}' in text
    assert rows(told)["teacher output"][0] == "ok"
    assert teacher_key(silent) != teacher_key(told)
    wrong = given(Net(), plain, of_teacher={"outputs": "probabilities"})
    assert rows(wrong)["teacher output"][0] == "fail"


def test_a_student_that_ends_in_a_softmax(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Net(), nn.Softmax(1))

    assert rows(own(NOWHERE, make()))["student output"][0] == "note"
    common: dict[str, Any] = {"teacher": None, "data": DIGITS, "method": "ce", "epochs": 1, "quiet": True, "threads": 1}
    outputs = {"outputs": "probabilities"}
    ended = runs.distill(student=make(), run=tmp_path / "ended", student_settings=outputs, **common)
    plain = runs.distill(student=make()[0], run=tmp_path / "plain", **common)
    assert ended["last"] == pytest.approx(plain["last"], rel=1e-4)
    assert json.loads((tmp_path / "ended/model.json").read_text())["outputs"] == "probabilities"


# ---- one channel -----------------------------------------------------------------------------------------------------


def grey_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))


@pytest.mark.parametrize(
    "make",
    [
        grey_net,
        lambda: models.create("resnet8", num_classes=10, in_channels=1),
        lambda: timm.create_model("test_resnet", num_classes=10, in_chans=1),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    ],
)
def test_networks_of_one_channel_see_grey_images(make: Any, tmp_path: Path) -> None:
    student, teacher = make(), make()
    student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    seen: list[int] = []
    found = runs.distill(
        student=student,
        teacher=teacher,
        data=DIGITS,
        run=tmp_path / "run",
        method="kd",
        epochs=1,
        allow_weak_teacher=True,
        teacher_settings={"size": 8, "mean": [0.4], "std": [0.3]},
        quiet=True,
        threads=1,
    )
    assert found["steps"] == 1
    card = json.loads((tmp_path / "run/model.json").read_text())
    assert len(card["mean"]) == len(card["std"]) == 1
    assert seen.count(1) > 2


def test_grey_has_the_statistics_of_the_data_and_says_so() -> None:
    assembly = own(NOWHERE, grey_net(), grey_net())
    card = assembly.student.card
    assert card.mean == pytest.approx((WHOLE.mean[0],))
    assert card.std == pytest.approx((WHOLE.std[0],))
    assert "8x8 images; made grey; mean (0.3054) and std (" in rows(assembly)["student input"][1]
    pixels = teacher_of(assembly)(WHOLE.train.batch(torch.arange(1000)))
    assert abs(float(pixels.mean())) < 0.05
    assert abs(float(pixels.std()) - 1) < 0.05


def test_one_channel_from_the_command_line(tmp_path: Path) -> None:
    found = train(small(tmp_path / "r", "method=ce", "student.options.in_channels=1", "epochs=1"))
    _, scores, _ = runs.evaluate_model("digits", [f"model={tmp_path}/r/"], console=QUIET)
    assert scores == pytest.approx({key: found["last"][key] for key in scores})
    with pytest.raises(ConfigError, match=r"student\.options\.in_channels=4: images have 3 channels, and made grey 1"):
        assemble(small(NOWHERE, "method=ce", "student.options.in_channels=4").run)


# ---- another view policy ---------------------------------------------------------------------------------------------


def test_another_view_policy_brings_its_evaluation(tmp_path: Path) -> None:
    sizes: dict[bool, set[Any]] = {True: set(), False: set()}
    student = Net()
    student.register_forward_pre_hook(lambda _, inputs: sizes[torch.is_grad_enabled()].add(inputs[0].shape[2:]))
    some = replace(DIGITS, train=DIGITS.train.select(torch.arange(8)), test=DIGITS.test.select(torch.arange(4)))
    runs.distill(
        student=student,
        teacher=None,
        data=some,
        run=tmp_path / "run",
        method="ce",
        epochs=1,
        data_settings={"views": "vit"},
        quiet=True,
        threads=1,
    )
    assert sizes == {True: {(224, 224)}, False: {(224, 224)}}
    assert data.load("digits", views="vit").image_size == (224, 224)
    with pytest.raises(ConfigError, match=r'"views": "vot".*unknown view policy .vot.'):
        runs.distill(
            student=Net(),
            teacher=None,
            data=some,
            run=tmp_path / "other",
            method="ce",
            data_settings={"views": "vot"},
            quiet=True,
        )


def test_settings_of_a_teacher_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher_settings=.* has no effect without a teacher"):
        runs.distill(
            student=Net(), teacher=None, data=DIGITS, run=tmp_path, method="ce", teacher_settings={"mean": HALF}
        )
