"""``vrm.distill`` on modules of one's own: it trains the student, and leaves all else as it found it."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vrm
from vrm import models
from vrm.config import Network
from vrm.data import channel_statistics, place
from vrm.models import weights_hash
from vrm.runs.errors import NonFinite, RunError
from vrm.runs.folder import read_run
from vrm.runs.networks import load_network

from .own import DIGITS, Net, Pixels


def surroundings(*modules: nn.Module) -> dict[str, Any]:
    """All of the process and of modules that is not the student's weights."""
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": [np.asarray(part).tolist() for part in np.random.get_state()],
        "python": random.getstate(),
        "benchmark": torch.backends.cudnn.benchmark,
        "convolutions": torch.backends.cudnn.allow_tf32,
        "products": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
    }
    for number, module in enumerate(modules):
        for path, part in module.named_modules():
            found[f"{number}.{path}.training"] = part.training
            found[f"{number}.{path}.hooks"] = {
                k: [*map(id, v.values())] for k, v in vars(part).items() if "_hook" in k and v
            }
        for name, parameter in module.named_parameters():
            found[f"{number}.{name}"] = parameter.requires_grad, id(parameter)
    return found


@pytest.mark.parametrize("end", ["done", "refused", "not finite"])
def test_it_leaves_the_process_as_it_found_it(tmp_path: Path, end: str) -> None:
    """Also if it ends in an error, before training or within."""
    student, teacher = Net(dropout=0.2), Pixels() if end != "refused" else Net()
    student.norm.eval()
    student.conv.bias.requires_grad_(False)
    teacher.train()
    heard: list[nn.Module] = []
    for module in (student, teacher):
        module.fc.register_forward_hook(lambda module, *_: heard.append(module))
    gradients: list[Tensor] = []

    def spoil(gradient: Tensor) -> Tensor:
        gradients.append(gradient)
        return gradient * float("nan") if end == "not finite" and len(gradients) > 4 else gradient

    student.fc.weight.register_hook(spoil)
    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = surroundings(student, teacher)
        weights = {name: tensor.clone() for name, tensor in (student.state_dict() | teacher.state_dict()).items()}
        options: dict[str, Any] = {"method": "kd", "epochs": 2, "batch_size": 8, "quiet": True, "seed": 3}
        options |= {"threads": torch.get_num_threads() + 1, "deterministic": True, "log_every": 1}
        errors = {"refused": pytest.raises(RunError), "not finite": pytest.raises(NonFinite)}
        with errors.get(end, contextlib.nullcontext()):
            vrm.distill(student=student, teacher=teacher, data=DIGITS, run=tmp_path / "run", **options)
        assert surroundings(student, teacher) == before
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    now = student.state_dict() | teacher.state_dict()
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, now[name])}
    trained = {"conv.weight", "norm.weight", "norm.bias", "fc.weight", "fc.bias"}
    assert moved <= (trained if end != "refused" else set())


def test_the_same_call_goes_on(tmp_path: Path) -> None:
    """And a finished run gives its weights to the student that is handed in."""
    options: dict[str, Any] = {"data": DIGITS, "teacher": Pixels(), "method": "kd", "batch_size": 8, "quiet": True}
    torch.manual_seed(0)
    first, again, whole = (Net(dropout=0.2) for _ in range(3))
    again.load_state_dict(first.state_dict())
    whole.load_state_dict(first.state_dict())
    expected = vrm.distill(student=whole, run=tmp_path / "whole", epochs=2, **options)
    vrm.distill(student=first, run=tmp_path / "run", epochs=2, steps=3, **options)
    for _ in range(2):
        found = vrm.distill(student=again, run=tmp_path / "run", epochs=2, **options)
        assert found["weights_sha256"] == expected["weights_sha256"]
        torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_networks_made_by_name_bring_their_published_settings_and_can_be_made_again(tmp_path: Path) -> None:
    """The pair's value of the command line applies, and the folder can be a teacher."""
    torch.manual_seed(0)
    networks = {name: models.create(name, num_classes=10) for name in ("resnet56", "resnet20")}
    data = replace(DIGITS, name="cifar100")
    result = vrm.distill(
        student=networks["resnet20"],
        teacher=networks["resnet56"],
        data=data,
        run=tmp_path / "run",
        method="dkd",
        epochs=1,
        batch_size=10,
        threads=1,
        steps=1,
        allow_weak_teacher=True,
        quiet=True,
    )
    assert result["architecture"] == "resnet20"
    record = read_run(tmp_path / "run")
    assert record.config["method"]["beta"] == 2.0
    assert record.sources["method.beta"] == "published cifar100/resnet56/resnet20"
    loaded = load_network(Network(name=f"{tmp_path / 'run'}/"), data, role="teacher")
    assert weights_hash(loaded.network) == result["weights_sha256"]


@pytest.mark.parametrize("placement", ["device", "host"])
def test_floats_train_as_the_bytes_that_they_are_of(tmp_path: Path, placement: str) -> None:
    """A normalised copy of the images is another scale of the same: the networks see the same values."""
    scores = []
    for number, scale in enumerate((None, 4.0)):
        splits = [DIGITS.train, DIGITS.test.select(torch.arange(40))]
        if scale is not None:
            splits = [replace(each, images=each.images.float() / 255 * scale - 2) for each in splits]
        data = replace(DIGITS, train=splits[0], test=splits[1], view_policy="none")
        mean, std = channel_statistics(data.train)
        data = place(replace(data, mean=mean, std=std), "cpu", placement)
        torch.manual_seed(0)
        student = Net()
        settings = {"epochs": 1, "batch_size": 10, "threads": 1}
        vrm.distill(
            student=student,
            teacher=Pixels(),
            data=data,
            run=tmp_path / f"{number}",
            method="kd",
            quiet=True,
            allow_weak_teacher=True,
            **settings,
        )
        scores.append(torch.cat([parameter.flatten() for parameter in student.parameters()]))
    assert torch.allclose(*scores, atol=1e-3)


def test_relations_of_floats_are_matched_too(tmp_path: Path) -> None:
    images = DIGITS.train.images.float() / 128 - 1
    train = replace(DIGITS.train, images=images)
    data = replace(DIGITS, train=train, test=train, view_policy="cifar")
    data = replace(data, **dict(zip(("mean", "std"), channel_statistics(train), strict=True)))
    settings = {"epochs": 1, "batch_size": 10, "threads": 1}
    model = vrm.distill(
        student=Net(),
        teacher=Pixels(),
        data=data,
        run=tmp_path / "run",
        method="vrm",
        quiet=True,
        allow_weak_teacher=True,
        **settings,
    )
    assert model["last"]["top1"] >= 0


def test_errors_name_arguments_and_not_words_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"student": Net(), "data": DIGITS, "method": "kd", "epochs": 1, "run": tmp_path / "run"}
    with pytest.raises(RunError, match=r"or give allow_weak_teacher=True$"):
        vrm.distill(teacher=Net(), device="cpu", threads=1, **given)
    assert "allow_weak_teacher=True" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r'^method="kd" needs a teacher: give a trained network$'):
        vrm.distill(teacher=None, device="cpu", **given)
    with pytest.raises(ValueError, match=r"^unknown key 'lr' .*did you mean optimizer=\{\"lr\": \.\.\}\?$"):
        vrm.distill(teacher=Pixels(), lr=0.1, **given)
    with pytest.raises(ValueError, match=r'precision="float32"$'):
        vrm.distill(teacher=Pixels(), precision="tf32", device="cpu", **given)
