"""The networks of a run: as other tools leave them, and what is said where they cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import vrm
from tests.runs.own import DIGITS, Net, Pixels, own
from tests.runs.small import command
from vrm import config
from vrm.config import ConfigError
from vrm.models import create, weights_hash
from vrm.models.card import FORMAT
from vrm.runs.errors import RunError
from vrm.runs.networks import LoadedNetwork, check_module, load_network, wrap_module


def teacher(weights: Path, key: str | None = None) -> config.Teacher:
    return config.Teacher(name="resnet8", weights=weights, weights_key=key)


def test_a_file_with_raw_and_averaged_weights_names_the_setting_that_chooses(tmp_path: Path) -> None:
    raw, average = create("resnet8", num_classes=10), create("resnet8", num_classes=10)
    averaged = {"n_averaged": torch.tensor(1)} | {f"module.{n}": t for n, t in average.state_dict().items()}
    torch.save({"model": raw.state_dict(), "model_ema": averaged}, tmp_path / "w.ckpt")
    with pytest.raises(ConfigError, match=r"give teacher\.weights_key=model or teacher\.weights_key=model_ema"):
        load_network(teacher(tmp_path / "w.ckpt"), DIGITS, role="teacher")
    for key, expected in (("model", raw), ("model_ema", average)):
        loaded = load_network(teacher(tmp_path / "w.ckpt", key), DIGITS, role="teacher")
        assert weights_hash(loaded.network) == weights_hash(expected)
    told = f"teacher.weights={tmp_path / 'w.ckpt'}: the entry 'model_ema'; names without 'module.'; left out n_averaged"
    assert loaded.notes == (told,)


def test_a_network_that_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.ckpt")
    with pytest.raises(ConfigError, match=r"teacher=resnet8: .*w\.ckpt does not fit ResNet"):
        load_network(teacher(tmp_path / "w.ckpt"), DIGITS, role="teacher")


def test_the_run_of_an_own_module_is_not_made_again_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"format": FORMAT} | asdict(wrap_module(Net(), DIGITS).card)))
    with pytest.raises(
        ConfigError, match=r"a tests\.runs\.own\.Net, was a module given from Python, .*models\.load_weights\(module"
    ):
        load_network(config.Teacher(name=f"{tmp_path}/"), DIGITS, role="teacher")


def relu_replaced(network: nn.Module) -> None:
    network.get_submodule("layer1.0").relu1 = nn.GELU()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda network: None, "resnet8"),
        (lambda network: setattr(network, "fc", nn.Linear(64, 10)), "resnet8"),
        (lambda network: setattr(network, "fc", nn.Linear(64, 10, bias=False)), "vrm.models.cifar.resnet.ResNet"),
        (lambda network: setattr(network, "fc", nn.Sequential(nn.Linear(64, 10))), "vrm.models.cifar.resnet.ResNet"),
        (lambda network: setattr(network, "conv1", nn.Conv2d(3, 16, 5, padding=2)), "vrm.models.cifar.resnet.ResNet"),
        (relu_replaced, "vrm.models.cifar.resnet.ResNet"),
    ],
    ids=["nothing", "other classes", "no bias", "another head", "another stem", "another activation"],
)
def test_a_network_whose_parts_were_replaced_is_carded_by_its_class(
    change: Callable[[nn.Module], None], name: str
) -> None:
    network = create("resnet8", num_classes=7)
    change(network)
    assert wrap_module(network, DIGITS).card.architecture == name


# ---- wrappers, and states that are no tensors ------------------------------------------------------------------------


class Two(nn.Module):
    """A network with a part that can be wrapped alone."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.part(images).mean((2, 3)))


def distil(student: nn.Module, teacher: nn.Module, run: Path, **more: Any) -> dict[str, Any]:
    more = {"epochs": 1, "batch_size": 8, "device": "cpu", "threads": 1, "method": "at"} | more
    return vrm.distill(
        student=student, teacher=teacher, data=DIGITS, run=run, quiet=True, allow_weak_teacher=True, **more
    )


def eager(module: Any) -> Any:
    return torch.compile(module, backend="eager")


def with_part(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def change(network: nn.Module) -> nn.Module:
        network.part = wrap(network.part)
        return network

    return change


def compiled_in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    network.part.forward = eager(network.part.forward)
    return network


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": eager,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled in parallel": lambda network: nn.DataParallel(eager(network)),
    "parallel, compiled": lambda network: eager(nn.DataParallel(network)),
    "part compiled": with_part(eager),
    "part parallel": with_part(nn.DataParallel),
    "in place": compiled_in_place,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_network_inside_wrappers_is_trained_and_saved_under_its_own_names(tmp_path: Path, name: str) -> None:
    def networks() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return Two(), Two(6)

    student, teacher = networks()
    expected = distil(student, teacher, tmp_path / "plain")
    student, teacher = (WRAPPERS[name](network) for network in networks())
    for network in (student.eval(), teacher.eval()):
        network(torch.randn(8, 3, 8, 8))  # what is compiled has a graph before hooks are added
    modules = [*student.modules(), *teacher.modules()]
    before = [(module, dict(vars(module)), dict(module._modules)) for module in modules]
    found = distil(student, teacher, tmp_path / "wrapped")
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert load_file(tmp_path / "wrapped/model.safetensors").keys() == Two().state_dict().keys()
    for module, attributes, children in before:
        assert module._modules == children
        assert vars(module).keys() == attributes.keys()
        assert vars(module).get("_compiled_call_impl") is attributes.get("_compiled_call_impl")
        assert vars(module).get("forward") is attributes.get("forward")


class Counted(Net):
    """Counts its training batches in a state that is no tensor."""

    count = 0

    def forward(self, images: Tensor) -> Tensor:
        self.count += self.training
        return super().forward(images)

    def get_extra_state(self) -> Any:
        return {"count": self.count, "first": (1.0, torch.arange(2))}

    def set_extra_state(self, state: Any) -> None:
        assert state["first"][1].tolist() == [0, 1]
        self.count = state["count"]


def test_a_state_that_is_no_tensor_goes_through_interruption_and_file(tmp_path: Path) -> None:
    state = Counted().state_dict()

    def student() -> Counted:
        network = Counted()
        network.load_state_dict(state)
        return network

    teacher, whole, first, second = Net(width=4), student(), student(), student()
    distil(whole, teacher, tmp_path / "whole", method="kd", epochs=2)
    distil(first, teacher, tmp_path / "parts", method="kd", epochs=2, steps=3)
    distil(second, teacher, tmp_path / "parts", method="kd", epochs=2)
    steps = 2 * -(-len(DIGITS.train) // 8)
    assert (first.count, second.count, whole.count) == (3, steps, steps)
    again = Counted()
    vrm.models.load_weights(again, tmp_path / "parts")
    assert again.count == steps


def test_a_state_that_no_file_can_hold_is_refused_for_the_student(tmp_path: Path) -> None:
    class Odd(Net):
        def get_extra_state(self) -> Any:
            return object()

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(ConfigError, match=r"student .*Odd: '_extra_state' in the state of the network holds a object"):
        distil(Odd(), Net(), tmp_path / "run", method="kd")


def quantised(network: nn.Module) -> nn.Module:
    changed: nn.Module = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, torch.qint8)
    return changed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_network_teaches_on_a_cpu_and_is_no_student(tmp_path: Path) -> None:
    teacher = quantised(Two(6))
    before = weights_hash(teacher)
    for method in ("kd", "at"):
        distil(Two(), teacher, tmp_path / method, method=method)
    distil(Two(), quantised(Pixels()), tmp_path / "pixels", method="kd")
    assert weights_hash(teacher) == before
    with pytest.raises(
        ConfigError, match=r"student .*Two: 'fc\._packed.*' is quantised: it can teach, but not be trained"
    ):
        distil(quantised(Two()), Two(6), tmp_path / "student")
    with pytest.raises(ConfigError, match=r"teacher .*'fc' is quantised, and runs on a CPU alone; give device=cpu"):
        check_module(LoadedNetwork(teacher, wrap_module(teacher, DIGITS).card), "teacher", torch.device("cuda"))


# ---- what a network returns, and raises ------------------------------------------------------------------------------


class Both(Two):
    """Returns its logits beside something of the same kind."""

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return {"features": logits[:, :7], "classes": logits}


def test_logits_in_a_dictionary_are_trained_and_taught(tmp_path: Path) -> None:
    found = []
    for kind in (Two, Both):
        torch.manual_seed(0)
        found.append(distil(kind(), kind(6), tmp_path / kind.__name__))
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"]
    told = [f"{role}: the logits are the entry 'classes' of the dict that the network returns" for role in ROLES]
    assert list(own(tmp_path / "own", Both(), Both(6)).notes) == told


ROLES = ("student", "teacher")


class Failing(Two):
    """Fails on images, or only where it is trained."""

    def __init__(self, error: Exception, *, training: bool) -> None:
        super().__init__()
        self.error, self.when = error, training

    def forward(self, images: Tensor) -> Tensor:
        if self.training or not self.when:
            raise self.error
        return super().forward(images)


ERRORS = [AssertionError("Input height (8) doesn't match"), KeyError("x"), TypeError("t"), IndexError("i")]


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_network_raises_is_said_in_a_sentence(tmp_path: Path, error: Exception) -> None:
    words = re.escape(f"failed on images of 3x8x8 (a batch of 2): {type(error).__name__}: {error}")
    for role, pair in (
        ("student", (Failing(error, training=False), Two(6))),
        ("teacher", (Two(), Failing(error, training=False))),
    ):
        with pytest.raises(
            ConfigError,
            match=f"{role} .*Failing {words}; its forward must take a batch of images of 3 channels alone",
        ):
            distil(*pair, tmp_path / "probe")
    words = re.escape(f"Failing failed on images of 3x8x8 (a batch of 8): {type(error).__name__}: {error}")
    with pytest.raises(RunError, match=words):
        distil(Failing(error, training=True), Two(6), tmp_path / "step")


def test_a_network_that_fails_ends_the_command_with_a_sentence(tmp_path: Path) -> None:
    words = ["train", "digits", "model=timm:vit_tiny_patch16_224", "epochs=1", "device=cpu", f"run={tmp_path / 'run'}"]
    ended = command(*words)
    _, told = ended.communicate(timeout=300)
    assert ended.returncode == 2
    assert "vrm: student timm:vit_tiny_patch16_224 failed on images of 3x8x8 (a batch of 2): AssertionError: " in told
    assert "Traceback" not in told


class NoEight(Two):
    """Fails on the eight images that the checks look at."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == 8:
            raise RuntimeError("no eight")
        return super().forward(images)


@pytest.mark.parametrize("role", ROLES)
def test_a_network_that_fails_in_the_checks_leaves_the_folder_free(tmp_path: Path, role: str) -> None:
    pair = {"student": Two(), "teacher": Two(6)} | {role: NoEight()}
    words = rf"{role} NoEight failed on images of 3x8x8 \(a batch of 8\): RuntimeError: no eight; give another {role}"
    with pytest.raises(RunError, match=words):
        distil(**pair, run=tmp_path / "run", method="kd")
    assert distil(Two(), Two(6), tmp_path / "run", method="kd", seed=5)["last"]["epoch"] == 1
