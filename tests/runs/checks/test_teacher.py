"""Teacher and student: what fits, what is refused by name, and what never moves."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import vrm
from tests.runs.own import DIGITS, Net, Pixels, checked, own, settings
from tests.runs.small import OPTIONS, go_on, make_teacher, opened, small, train
from vrm import models, tasks
from vrm.config import ConfigError
from vrm.contract import Needs
from vrm.data import DataSet, ImageStore
from vrm.engine.evaluation import evaluate
from vrm.models import Card
from vrm.models.teacher import common_memory
from vrm.runs import api as runs
from vrm.runs.assembly import Assembly, assemble, check_parts, smallest_part
from vrm.runs.checks import start
from vrm.runs.checks import teacher as module
from vrm.runs.checks.table import Check
from vrm.runs.checks.teacher import measure_teacher, teacher_key
from vrm.runs.errors import RunError
from vrm.wording import counted

NOWHERE = Path("/nonexistent-run")
TASK = tasks.load(DIGITS.task)


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return Pixels()


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained teacher."""
    return make_teacher(tmp_path_factory.mktemp("teacher") / "run")


def recard(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a teacher's folder with another card."""
    to.mkdir()
    shutil.copy(folder / "model.safetensors", to)
    card = json.loads((folder / "model.json").read_text()) | changes
    (to / "model.json").write_text(json.dumps(card))
    return to


def from_folder(folder: Path, *words: str) -> Assembly:
    return assemble(small(NOWHERE, "method=kd", f"teacher={folder}/", *words).run)


def with_card(assembly: Assembly, **changes: Any) -> Assembly:
    """The run with another card of its teacher."""
    assert assembly.master is not None
    return replace(assembly, master=replace(assembly.master, card=replace(assembly.master.card, **changes)))


def digest(network: nn.Module) -> str:
    """Of all parameters and buffers, also those that no state dict holds."""
    found = hashlib.sha256()
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        found.update(name.encode() + tensor.detach().numpy().tobytes())
    return found.hexdigest()


def check_teacher(assembly: Assembly, sample: int | None = None) -> tuple[dict[str, Any], tuple[Check, ...]]:
    """What is measured, and the rows that are shown of it: score, input, output."""
    record = measure_teacher(assembly, sample=sample)
    return record, module.check_teacher(assembly, record)


def training(assembly: Assembly, each: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Train an assembly to the end; ``each`` is called before every step."""
    with opened(assembly) as trainer:
        original = trainer._set_rate

        def before(*arguments: Any) -> None:
            original(*arguments)
            each(trainer.state.step)

        trainer._set_rate = before
        return go_on(trainer)


def updated(assembly: Assembly) -> set[int]:
    """Train an assembly; the ids of all parameters that an optimiser stepped."""
    seen: set[int] = set()
    original = torch.optim.SGD.step

    def look(self: torch.optim.SGD, *rest: Any) -> Any:
        seen.update(id(p) for group in self.param_groups for p in group["params"])
        return original(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", look)
        training(assembly)
    return seen


class Halved(nn.Module):
    """Returns two tensors."""

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits, -logits


class TestFit:
    """T1, D4: classes, order, input and accuracy of a teacher, by card or by running it."""

    def test_another_number_of_classes_on_the_card(self, taught: Path, tmp_path: Path) -> None:
        classes = tuple("01234567")
        models.save_weights(models.create("resnet8", num_classes=8), tmp_path / "w.safetensors")
        folder = recard(taught, tmp_path / "t", num_classes=8, classes=classes)
        shutil.copy(tmp_path / "w.safetensors", folder / "model.safetensors")
        with pytest.raises(ConfigError, match="teacher resnet8 has 8 classes, but digits has 10"):
            from_folder(folder)

    def test_another_number_of_classes_in_the_weights(self, tmp_path: Path) -> None:
        models.save_weights(models.create("resnet8", num_classes=8), tmp_path / "w.safetensors")
        words = ["method=kd", "teacher=resnet8", f"teacher.weights={tmp_path / 'w.safetensors'}"]
        with pytest.raises(ConfigError, match="was trained for 8 classes, this network has 10"):
            assemble(small(NOWHERE, *words).run)

    @pytest.mark.parametrize(("role", "method"), [("student", "ce"), ("student", "kd"), ("teacher", "kd")])
    def test_the_logits_of_own_modules_are_counted(self, role: str, method: str, pixels: Pixels) -> None:
        student, teacher = (Net(11), pixels) if role == "student" else (Net(), Net(11))
        with pytest.raises(ConfigError, match=f"{role} .*Net has 11 classes, but digits has 10"):
            own(NOWHERE, student, teacher if method == "kd" else None)

    def test_a_card_with_the_classes_in_another_order(self, taught: Path, tmp_path: Path) -> None:
        folder = recard(taught, tmp_path / "t", classes=list("1023456789"))
        with pytest.raises(ConfigError, match="another order: its class 0 is '1', that of the data '0'"):
            from_folder(folder)

    def test_a_card_with_other_names_is_noted(self, taught: Path, tmp_path: Path) -> None:
        folder = recard(taught, tmp_path / "t", classes=[f"digit {i}" for i in range(10)])
        checks = checked(from_folder(folder)).checks
        (check,) = [check for check in checks if check.name == "networks"]
        assert check.result == "note"
        assert "class 0 is 'digit 0' to the teacher, '0' in the data" in check.detail

    def test_its_input_size_is_kept_and_said(self, taught: Path, tmp_path: Path) -> None:
        folder = recard(taught, tmp_path / "t", input_size=[12, 12])
        assembly = from_folder(folder, "teacher.allow_weak=true")
        assert assembly.teacher is not None
        seen = []
        assembly.teacher.teacher.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
        _, (_, check, _) = check_teacher(assembly)
        assert set(seen) == {(12, 12)}
        assert "8x8 images are resized to 12x12 for it, as its card says" in check.detail

    def test_its_normalisation_is_that_of_its_card(self, taught: Path, tmp_path: Path) -> None:
        folder = recard(taught, tmp_path / "t", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
        assembly = from_folder(folder, "teacher.allow_weak=true")
        assert assembly.teacher is not None
        preprocess = assembly.teacher.teacher.preprocess
        assert preprocess is not None
        assert torch.equal(preprocess.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
        assert preprocess.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
        student = assembly.distiller.student.preprocess
        assert student is not None
        assert student.mean.flatten().tolist() == pytest.approx(assembly.data.mean)
        _, (_, check, _) = check_teacher(assembly)
        assert "mean (0.1, 0.2, 0.3) and std (0.4, 0.5, 0.6) of its card; the data have (0.3054," in check.detail

    @pytest.mark.parametrize("file", ["", "model.safetensors", "best.safetensors"])
    def test_weights_in_a_run_folder_bring_its_card(self, file: str, taught: Path, tmp_path: Path) -> None:
        folder = recard(taught, tmp_path / "t", mean=[0.1, 0.2, 0.3], input_size=[12, 12], scores={"top1": 99.5})
        shutil.copy(taught / "best.safetensors", folder)
        assembly = assemble(small(NOWHERE, "method=kd", "teacher=resnet8", f"teacher.weights={folder / file}").run)
        record, (accuracy, check, _) = check_teacher(assembly)
        assert "8x8 images are resized to 12x12 for it, as its card says; mean (0.1, 0.2, 0.3)" in check.detail
        assert record["recorded"] == (None if file == "best.safetensors" else {"top1": 99.5})
        assert ("99.50 % was recorded with its weights" in accuracy.detail) is (file != "best.safetensors")

    def test_weights_from_a_file_take_the_normalisation_of_the_data(self, taught: Path, tmp_path: Path) -> None:
        file = shutil.copy(taught / "model.safetensors", tmp_path)
        assembly = assemble(small(NOWHERE, "method=kd", "teacher=resnet8", f"teacher.weights={file}").run)
        record, (accuracy, check, _) = check_teacher(assembly)
        assert check.detail.startswith("8x8 images; mean (0.3054,")
        assert check.detail.endswith(" of the data")
        assert accuracy.result == "ok"
        assert record["scores"]["top1"] == json.loads((taught / "model.json").read_text())["last"]["top1"]

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("role", ["student", "teacher"])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda net: net.half(), r"'conv\.weight' is torch\.float16, but weights are kept in .*call float\(\)"),
            (lambda net: net.double(), r"'conv\.weight' is torch\.float64, but"),
            (lambda net: net.register_buffer("x", torch.zeros(1).expand(3)) or net, r"'x' share memory .*clone\(\)"),
            (
                lambda net: net.register_module("x", nn.LazyLinear(3)) or net,
                r"'x\.weight' has no shape yet|uninitialized",
            ),
            (lambda net: torch.jit.trace(net, torch.zeros(2, 3, 8, 8)), "is a ScriptModule, whose features"),
            (
                lambda net: nn.Sequential(net, Halved()),
                r"Sequential returns a tuple, not a tensor of logits \(B, C\); its tensors are 0 .*: name the",
            ),
        ],
    )
    def test_own_modules_of_another_kind(
        self, role: str, change: Callable[[nn.Module], nn.Module], message: str, pixels: Pixels
    ) -> None:
        other = change(Net())
        with pytest.raises(ConfigError, match=f"{role} .*{message}"):
            own(NOWHERE, *((other, pixels) if role == "student" else (Net(), other)))

    def test_an_own_module_that_cannot_take_the_images(self) -> None:
        class Large(Net):
            def forward(self, images: Tensor) -> Tensor:
                return self.fc(images.flatten(1))

        with pytest.raises(
            ConfigError,
            match=r"teacher .*Large failed on images of 3x8x8 \(a batch of 2\): .*mat1.*; its forward must take a "
            "batch of images of 3 channels alone",
        ):
            own(NOWHERE, Net(), Large())

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_classes": "many"},
            {"num_classes": 0, "classes": []},
            {"num_classes": 9},
            {"classes": 3},
            {"input_size": [8]},
            {"input_size": [0, 8]},
            {"mean": [0.5, 0.5]},
            {"std": ["a", "b", "c"]},
            {"architecture": 3},
            {"options": []},
            {"scores": {"top1": "high"}},
        ],
    )
    def test_a_damaged_card_is_told(self, changes: dict[str, Any], taught: Path, tmp_path: Path) -> None:
        folder = recard(taught, tmp_path / "t", **changes)
        with pytest.raises(ValueError, match=r"model\.json is damaged"):
            Card.read(folder)


class TestAccuracy:
    """T1: measured at the start, held against what was recorded on the same data."""

    def test_as_recorded(self, taught: Path) -> None:
        assembly = from_folder(taught)
        record, (check, _, steady) = check_teacher(assembly)
        assert (check.result, steady.result) == ("ok", "ok")
        assert record["scores"] == record["recorded"]
        assert f"{record['scores']['top1']:.2f} % recorded" in check.detail

    @pytest.mark.parametrize(("shift", "result"), [(0.9, "ok"), (1.1, "fail")])
    def test_the_margin_is_one_point(self, shift: float, result: str, taught: Path, tmp_path: Path) -> None:
        top1 = json.loads((taught / "model.json").read_text())["scores"]["top1"] + shift
        folder = recard(taught, tmp_path / "t", scores={"top1": top1})
        _, (check, _, _) = check_teacher(from_folder(folder))
        assert check.result == result
        _, (allowed, _, _) = check_teacher(from_folder(folder, "teacher.allow_weak=true"))
        assert allowed.result == {"fail": "note", "ok": "ok"}[result]

    def test_a_wrong_normalisation_is_found_and_named(self, taught: Path, tmp_path: Path) -> None:
        folder = recard(taught, tmp_path / "t", mean=[5.0, 5.0, 5.0])
        _, (check, _, _) = check_teacher(from_folder(folder))
        assert check.result == "fail"
        assert "its mean (5, 5, 5), the data's (0.3054" in check.fix
        assert "teacher.allow_weak=true" in check.fix

    def test_what_was_recorded_on_other_data_is_not_compared(self, taught: Path, tmp_path: Path) -> None:
        folder = recard(taught, tmp_path / "t", scores={"top1": 100.0}, data="mnist")
        _, (check, _, _) = check_teacher(from_folder(folder))
        assert check.result == "ok"
        assert "100.00 % recorded on mnist, which is not compared" in check.detail

    def test_a_hopeless_own_module_stops(self, pixels: Pixels) -> None:
        _, (good, _, _) = check_teacher(own(NOWHERE, Net(), pixels))
        assert good.result == "ok"
        _, (bad, _, _) = check_teacher(own(NOWHERE, Net(), Net()))
        assert bad.result == "fail"
        assert "hardly above chance (10.00 %)" in bad.detail

    def test_a_sample_has_a_wider_margin(self, pixels: Pixels) -> None:
        assembly = own(NOWHERE, Net(), pixels)
        whole = evaluate(assembly.teacher, assembly.data.test, assembly.task)["top1"]
        recorded = with_card(assembly, scores={"top1": whole + 3})
        _, (all_images, _, _) = check_teacher(recorded)
        _, (some, _, _) = check_teacher(recorded, sample=60)
        assert all_images.result == "fail"
        assert some.result == "ok"
        assert "on 60 of 359 test images" in some.detail

    def test_a_known_record_is_not_measured_again(self, taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assembly = from_folder(taught)
        record, _ = check_teacher(assembly)
        monkeypatch.setattr(start, "measure_teacher", lambda *a, **k: pytest.fail("measured again"))
        report = checked(assembly, known=record, keep=lambda record: pytest.fail("kept again"))
        assert report.teacher == record
        assert not report.failures

    @pytest.mark.parametrize("other", ["weights", "images", "normalisation", "input size"])
    def test_but_it_is_if_anything_differs(self, other: str, taught: Path) -> None:
        assembly = from_folder(taught)
        known = measure_teacher(assembly) | {"scores": {"top1": 99.0, "top5": 99.0, "loss": 0.0}}
        assert checked(assembly, known=known).teacher == known
        if other == "weights":
            assembly.teacher.teacher.network.fc.bias.data[0] += 1e-6
        elif other == "images":
            test = assembly.data.test.select(torch.arange(300))
            assembly = replace(assembly, data=replace(assembly.data, test=test))
        elif other == "normalisation":
            assembly = with_card(assembly, mean=(0.3, 0.3, 0.3))
        else:
            assembly = with_card(assembly, input_size=(9, 9))
        kept: list[dict[str, Any]] = []
        found = checked(assembly, known=known, keep=kept.append).teacher
        assert found is not None
        assert found["scores"]["top1"] != 99.0
        assert found["key"] == teacher_key(assembly) != known["key"]
        assert kept == [found]

    def test_one_that_draws_at_random_is_refused(self, pixels: Pixels) -> None:
        class Dropping(Pixels):
            def forward(self, images: Tensor) -> Tensor:
                return self.fc(F.dropout(self.flat(images), 0.1))

        _, (_, _, steady) = check_teacher(own(NOWHERE, Net(), Dropping()))
        assert steady.result == "fail"
        assert "F.dropout(x, training=self.training)" in steady.fix

    def test_one_that_gives_nan_is_refused(self, pixels: Pixels) -> None:
        broken = copy.deepcopy(pixels)
        broken.fc.bias.data[3] = float("nan")
        _, (_, _, steady) = check_teacher(own(NOWHERE, Net(), broken))
        assert (steady.result, steady.detail) == ("fail", "the teacher's logits are not finite")


class Lively(Pixels):
    """A good teacher with batch norm and dropout, which train mode would spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(192)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.dropout(self.norm(self.flat(images))))


class TestFrozen:
    """T2, T3: eval mode whatever is called, and nothing of the teacher in optimiser or files."""

    @pytest.mark.parametrize("when", ["before", "at every step"])
    @pytest.mark.parametrize("part", ["", "norm", "dropout"])
    def test_train_mode_from_outside_changes_nothing(self, when: str, part: str, tmp_path: Path) -> None:
        teacher = Lively()
        before = digest(teacher)
        inside = teacher.get_submodule(part)

        def wake(step: int) -> None:
            if when == "at every step":
                inside.train()

        if when == "before":
            inside.train()
        outcomes = []
        for name, each in (("disturbed", wake), ("left", lambda step: None)):
            torch.manual_seed(0)
            assembly = own(tmp_path / name, Net(), teacher)
            training(assembly, each)
            assert digest(teacher) == before
            outcomes.append(load_file(tmp_path / name / "model.safetensors"))
        disturbed, left = outcomes
        assert all(torch.equal(disturbed[name], left[name]) for name in left)

    def test_a_network_whose_train_does_as_it_likes(self, pixels: Pixels) -> None:
        class Stubborn(Lively):
            def train(self, mode: bool = True) -> Any:
                for part in self.modules():
                    part.training = True
                return self

        teacher = Stubborn()
        assembly = own(NOWHERE, Net(), teacher)
        before = digest(teacher)
        images = assembly.data.test.images[:4]
        assert assembly.teacher is not None
        first = assembly.teacher(images).logits
        teacher.train()
        assert torch.equal(assembly.teacher(images).logits, first)
        assert digest(teacher) == before

    def test_batch_statistics_for_a_method_that_needs_them(self, tmp_path: Path, pixels: Pixels) -> None:
        """They change what is taught; accuracy is measured, and the teacher stays, as without them."""
        results, students = [], []
        for needs in (Needs(), Needs(teacher_batch_statistics=True)):
            teacher = Lively()
            teacher.norm.running_mean.fill_(0.1)
            before = digest(teacher)
            path = tmp_path / str(len(results))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(importlib.import_module("vrm.methods.kd").KD, "needs", needs)
                torch.manual_seed(0)
                training(own(path, Net(), teacher))
                if needs.teacher_batch_statistics:
                    with pytest.raises(ConfigError, match="kd needs at least 2 samples a batch, but 9 samples in"):
                        own(NOWHERE, Net(norm=False), teacher, dataset=shrunk(9))
            assert digest(teacher) == before
            results.append((path / "teacher.json").read_text())
            students.append(load_file(path / "model.safetensors"))
        assert results[0] == results[1]
        assert not all(torch.equal(tensor, students[1][name]) for name, tensor in students[0].items())

    @pytest.mark.parametrize("method", ["kd", "vid", "ofd", "crd", "reviewkd"])
    def test_no_file_holds_a_tensor_of_the_teacher(self, method: str, taught: Path, tmp_path: Path) -> None:
        words = [f"method={method}", f"teacher={taught}/", "student=resnet14", "steps=3", *OPTIONS.get(method, ())]
        train(small(tmp_path / "run", *words))
        teacher = [t for t in load_file(taught / "model.safetensors").values() if len(t.unique()) > 2]
        files = [*(tmp_path / "run").rglob("*.safetensors")]
        assert {file.name for file in files} == {"tensors.safetensors", "model.safetensors", "best.safetensors"}
        for file in files:
            for name, tensor in load_file(file).items():
                same = [t for t in teacher if t.shape == tensor.shape and torch.equal(t, tensor.to(t.dtype))]
                assert not same, f"{name} of {file.name}"
                assert "teacher" not in name or name.startswith("method.")

    def test_the_optimiser_holds_none_of_its_parameters(self, pixels: Pixels, tmp_path: Path) -> None:
        assembly = own(tmp_path / "run", Net(), pixels)
        seen = updated(assembly)
        assert seen == {id(p) for p in assembly.student.network.parameters()}
        assert not seen & {id(p) for p in pixels.parameters()}


class TestNames:
    """T4: a wrong tap name gets the nearest."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("method=fitnet", "method.student_tap=stag2"), r"student resnet8: .* no tap 'stag2'; .*stage2"),
            (("method=fitnet", "method.teacher_tap=stage9"), r"resnet8 has no tap 'stage9'; .*stage"),
            (
                ("method=vid", "method.student_taps=[layer1.0.cnv1]", "method.teacher_taps=[stage1]"),
                r"student resnet8: .*no tap 'layer1\.0\.cnv1'; did you mean 'layer1\.0\.conv1",
            ),
            (
                ("method=vid", "method.student_taps=[stage1]", "method.teacher_taps=[layer1.0.conf1]"),
                r"teacher resnet8: .*no tap 'layer1\.0\.conf1'; did you mean 'layer1\.0\.conv1",
            ),
        ],
    )
    def test_nearest(self, words: tuple[str, ...], message: str, taught: Path) -> None:
        with pytest.raises(ConfigError, match=message):
            assemble(small(NOWHERE, f"teacher={taught}/", *words).run)


def biases(one: slice, other: slice) -> Callable[[Pixels, Pixels], None]:
    """Let the biases of two networks be views into one storage."""

    def share(student: Pixels, teacher: Pixels) -> None:
        flat = torch.randn(20)
        student.fc.bias, teacher.fc.bias = nn.Parameter(flat[one]), nn.Parameter(flat[other])

    return share


def buffer(*, persistent: bool) -> Callable[[Pixels, Pixels], None]:
    """Give two networks the same buffer."""

    def share(student: Pixels, teacher: Pixels) -> None:
        for network in (student, teacher):
            network.register_buffer("constant", shared, persistent=persistent)

    shared = torch.randn(3)
    return share


SHARED: dict[str, tuple[Callable[[Pixels, Pixels], Any], str]] = {
    "nothing": (lambda student, teacher: None, ""),
    "a storage, apart": (biases(slice(10), slice(10, 20)), ""),
    "a part of a storage": (biases(slice(10), slice(9, 19)), "are the same memory"),
    "a module": (lambda s, t: setattr(s, "flat", t.flat), "the student's 'flat' is the teacher's 'flat'"),
    "a parameter": (
        lambda s, t: setattr(s.fc, "bias", t.fc.bias),
        r"'fc\.bias' and the teacher's 'fc\.bias' are the same memory",
    ),
    "memory": (lambda s, t: setattr(s.fc, "bias", nn.Parameter(t.fc.bias.data)), "are the same memory"),
    "a buffer": (buffer(persistent=True), "'constant' .* are the same memory"),
    "a buffer that is not kept": (buffer(persistent=False), "'constant' .* are the same memory"),
}


class TestSeparate:
    """T5: nothing is shared between student and teacher."""

    @pytest.mark.parametrize("what", SHARED)
    def test_what_they_share_is_named(self, what: str, pixels: Pixels) -> None:
        share, message = SHARED[what]
        student, teacher = Pixels(), copy.deepcopy(pixels)
        share(student, teacher)
        with pytest.raises(ConfigError, match=message) if message else contextlib.nullcontext():
            own(NOWHERE, student, teacher)

    def test_the_same_object(self, pixels: Pixels) -> None:
        with pytest.raises(ConfigError, match="are the same network, or share a module"):
            own(NOWHERE, pixels, pixels)

    @given(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5), st.integers(1, 3)), max_size=8),
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5), st.integers(1, 3)), max_size=8),
    )
    @example([(0, 5, 3), (2, 1, 1)], [(8, 1, 1)])  # behind a short view within a long one
    def test_common_memory_is_what_bytes_say(self, one: Any, other: Any) -> None:
        flat = torch.zeros(50, dtype=torch.int16)
        views = [
            [(f"{start}", flat[start : start + size * step : step]) for start, size, step in side]
            for side in (one, other)
        ]
        spans = [
            [set(range(start, start + (size - 1) * step + 1)) if size else set() for start, size, step in side]
            for side in (one, other)
        ]
        assert (common_memory(*views) is not None) == any(a & b for a in spans[0] for b in spans[1])
        pairs = [(a, b) for i, a in enumerate(spans[0]) for b in spans[0][:i]]
        assert (common_memory(views[0]) is not None) == any(a & b for a, b in pairs)


class TestStudent:
    """T6: frozen parameters stay bit-equal, shared ones are one, and there must be something to train."""

    @pytest.mark.parametrize("method", ["kd", "ab"])
    def test_frozen_parameters_stay(self, method: str, taught: Path, tmp_path: Path) -> None:
        student = models.create("resnet8", num_classes=10)
        student.conv1.requires_grad_(False)
        student.layer1.requires_grad_(False)
        before = {name: p.detach().clone() for name, p in student.named_parameters()}
        words = [f"method={method}", f"teacher={taught}/", *OPTIONS.get(method, ())]
        assembly = assemble(small(tmp_path / "run", *words).run, student=student)
        seen = updated(assembly)
        for name, parameter in student.named_parameters():
            frozen = name.startswith(("conv1", "layer1"))
            assert parameter.requires_grad is not frozen
            assert (id(parameter) in seen) is not frozen
            assert torch.equal(parameter, before[name]) is frozen, name
        moved = {name: int(buffer) for name, buffer in student.named_buffers() if name.endswith("tracked")}
        assert {name for name, count in moved.items() if not count} == {n for n in moved if n.startswith("layer1")}

    @pytest.mark.parametrize("whole", [True, False], ids=["in train mode", "in eval mode"])
    @pytest.mark.parametrize(
        ("affine", "freeze"),
        [
            (True, lambda student: student.stem.requires_grad_(False)),
            (False, lambda student: student.stem.requires_grad_(False)),
            (True, lambda student: student.stem[1].requires_grad_(False)),
        ],
        ids=["a part", "a part whose norm has no parameters", "a norm alone"],
    )
    def test_norms_of_frozen_parts_keep_their_statistics(
        self, affine: bool, freeze: Callable[[nn.Module], Any], whole: bool, pixels: Pixels, tmp_path: Path
    ) -> None:
        """Bitwise, also over a stop and a resume; the others move, and modes are put back."""
        student = self.Stem(affine=affine).train(whole)
        freeze(student)
        modes = [part.training for part in student.modules()]
        before = copy.deepcopy(student.state_dict())
        options = {"student": student, "teacher": pixels, "data": DIGITS, "method": "kd", "quiet": True}
        options |= {"run": tmp_path / "run", "epochs": 2, "batch_size": 8, "threads": 1}
        vrm.distill(**options, steps=3)
        vrm.distill(**options)
        after = student.state_dict()
        assert after["norm.num_batches_tracked"] == 8
        assert not torch.equal(before["norm.running_mean"], after["norm.running_mean"])
        assert not torch.equal(before["norm.weight"], after["norm.weight"])
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(before[f"stem.1.{name}"], after[f"stem.1.{name}"])
        assert [part.training for part in student.modules()] == modes

    def test_norms_without_parameters_move_in_a_part_that_learns(self, pixels: Pixels, tmp_path: Path) -> None:
        student = self.Stem(affine=False)
        student.norm.requires_grad_(False)
        training(own(tmp_path / "run", student, pixels))
        assert (student.stem[1].num_batches_tracked, student.norm.num_batches_tracked) == (8, 0)

    def test_the_start_says_whose_statistics_stay(self, pixels: Pixels, tmp_path: Path) -> None:
        student = self.Stem(affine=True)
        student.stem.requires_grad_(False)
        student.norm.eval()
        check = next(c for c in checked(own(tmp_path / "run", student, pixels)).checks if c.name == "parameters")
        frozen = 3 * 3 + 3 + 2 * 3
        assert f"frozen: {frozen} of the student; the running statistics of 2 norms in it stay" in check.detail

    class Stem(Net):
        """A network with a stem of its own: convolution and batch norm."""

        def __init__(self, *, affine: bool) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=affine))

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(self.stem(images))

    def test_batch_norms_that_were_set_to_eval_stay(self, pixels: Pixels, tmp_path: Path) -> None:
        student = self.Stem(affine=True)
        student.stem[1].eval()
        before = copy.deepcopy(student.state_dict())
        training(own(tmp_path / "run", student, pixels))
        after = student.state_dict()
        assert not torch.equal(before["norm.running_mean"], after["norm.running_mean"])
        assert torch.equal(before["stem.1.running_mean"], after["stem.1.running_mean"])
        assert not torch.equal(before["stem.1.weight"], after["stem.1.weight"])
        assert not student.stem[1].training
        assert student.norm.training

    def test_a_student_in_eval_mode_as_a_whole_is_trained(self, pixels: Pixels, tmp_path: Path) -> None:
        student = Net().eval()
        before = student.norm.running_mean.clone()
        training(own(tmp_path / "run", student, pixels))
        assert not torch.equal(student.norm.running_mean, before)

    def test_shared_parameters_are_one_and_stay_one(self, pixels: Pixels, tmp_path: Path) -> None:
        class Tied(Pixels):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.down = nn.Linear(192, 192, bias=False), nn.Linear(192, 192, bias=False)
                self.down.weight = self.up.weight

            def forward(self, images: Tensor) -> Tensor:
                return self.fc(self.down(self.up(self.flat(images)).relu()))

        student = Tied()
        assembly = own(tmp_path / "run", student, pixels, optimizer={"lr": 1e-4})
        check = next(c for c in checked(assembly).checks if c.name == "parameters")
        count = 192 * 192 + 192 * 10 + 10
        assert f"trained: {count:,} of the student" in check.detail
        result = training(assembly)
        assert result["parameters"] == count
        assert student.down.weight is student.up.weight
        kept = load_file(tmp_path / "run" / "model.safetensors")
        assert torch.equal(kept["up.weight"], kept["down.weight"])
        assert torch.equal(kept["up.weight"], student.up.weight)

    def test_parameters_that_only_share_memory_are_refused(self, pixels: Pixels) -> None:
        student = Pixels()
        student.more = nn.Linear(192, 10)
        student.more.weight = nn.Parameter(student.fc.weight.data)
        with pytest.raises(ConfigError, match=r"'fc\.weight' and 'more\.weight' lie in the same memory but are two"):
            own(NOWHERE, student, pixels)

    def test_one_that_learned_other_classes_before_tells_of_those_it_learns(self, taught: Path, tmp_path: Path) -> None:
        folder = recard(taught, tmp_path / "t", classes=list("abcdefghij"), data="letters", mean=[0.1, 0.2, 0.3])
        train(small(tmp_path / "run", "method=ce", f"student={folder}/", "steps=1"))
        card = Card.read(tmp_path / "run")
        assert (card.classes, card.data) == (tuple("0123456789"), "digits")
        assert card.mean == (0.1, 0.2, 0.3)

    def test_nothing_to_train_is_refused(self, pixels: Pixels) -> None:
        with pytest.raises(ConfigError, match=r"has no parameter to train: all 6 are frozen"):
            own(NOWHERE, Net().requires_grad_(False), pixels)

    def test_a_phase_without_parameters_is_refused(self, taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from vrm.contract import Phase
        from vrm.methods.kd import KD

        monkeypatch.setattr(KD, "phases", (Phase("own", trained=("method",)),))
        with pytest.raises(ConfigError, match="phase 'own' trains method, which has no parameter to train"):
            from_folder(taught)


def shrunk(count: int, num_classes: int = 10) -> DataSet:
    """The first ``count`` digits of the first classes."""

    def cut(store: ImageStore, most: int | None) -> ImageStore:
        chosen = torch.nonzero(store.targets < num_classes).flatten()[:most]
        return replace(store.select(chosen), classes=store.classes[:num_classes])

    return replace(DIGITS, train=cut(DIGITS.train, count), test=cut(DIGITS.test, None))


class TestBatches:
    """T7, D5: too few classes, too small batches, batches of one with and without batch norm."""

    def test_data_smaller_than_a_batch(self, tmp_path: Path) -> None:
        assembly = own(tmp_path / "run", Net(), None, dataset=shrunk(5), batch_size=64)
        result = training(assembly)
        assert result["steps"] == 2  # an epoch is one step

    @pytest.mark.parametrize(("count", "batch_size"), [(9, 8), (1, 8), (3, 1)])
    def test_a_batch_of_one_is_refused_with_batch_norm_alone(self, count: int, batch_size: int, tmp_path: Path) -> None:
        message = f"{counted(count, 'sample')} in batches of {batch_size} leave a last batch of one, on"
        with pytest.raises(ConfigError, match=message):
            own(NOWHERE, Net(), None, dataset=shrunk(count), batch_size=batch_size)
        if count > 1:  # one image is of one class, of which nothing can be learned
            assembly = own(tmp_path / "run", Net(norm=False), None, dataset=shrunk(count), batch_size=batch_size)
            assert training(assembly)["steps"] == 2 * -(-count // batch_size)

    def test_and_with_batch_norm_in_eval_mode(self, tmp_path: Path) -> None:
        student = Net()
        student.norm.eval()
        training(own(tmp_path / "run", student, None, dataset=shrunk(9)))

    def test_but_not_if_the_student_is_in_eval_mode_as_a_whole(self) -> None:
        with pytest.raises(ConfigError, match="leave a last batch of one, on which batch norm is undefined"):
            own(NOWHERE, Net().eval(), None, dataset=shrunk(9))

    def test_batch_norm_of_the_method_counts(self, taught: Path) -> None:
        run = small(NOWHERE, "method=fitnet", f"teacher={taught}/").run
        student = models.create("vgg8", num_classes=10)
        for part in student.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        assemble(run, student=student, dataset=shrunk(10))
        with pytest.raises(ConfigError, match=r"batch norm is undefined \(method\.regressor"):
            assemble(run, student=student, dataset=shrunk(9))

    @pytest.mark.parametrize("method", ["rkd", "cc"])
    def test_too_few_samples_for_the_method(self, method: str, pixels: Pixels) -> None:
        student = Net(norm=False)
        with pytest.raises(ConfigError, match=f"method={method} needs at least . samples a batch, but 9 samples in"):
            own(NOWHERE, student, pixels, method, dataset=shrunk(9))

    def test_too_few_classes_for_the_method(self, pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
        from vrm.methods.dkd import DKD

        monkeypatch.setattr(DKD, "needs", Needs(min_classes=3))
        teacher = Net(2)
        with pytest.raises(ConfigError, match="method=dkd needs at least 3 classes, but digits has 2"):
            own(NOWHERE, Net(2), teacher, "dkd", dataset=shrunk(10, 2))

    @given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4))
    def test_smallest_part_is_that_of_the_parts(self, count: int, size: int, accumulate: int, processes: int) -> None:
        run = settings(NOWHERE, Net(), None, "ce", batch_size=size, accumulate=accumulate)
        batches = torch.arange(count).split(size)
        parts = [
            len(p) for batch in batches for rank in range(processes) for p in batch[rank::processes].chunk(accumulate)
        ]
        assert smallest_part(run, count, processes=processes) == min(parts)

    def test_processes_divide_a_batch(self) -> None:
        assembly = own(NOWHERE, Net(), None)
        check_parts(assembly.run, assembly.distiller, 30)
        with pytest.raises(ConfigError, match="over 6 processes leave a last batch of one"):
            check_parts(assembly.run, assembly.distiller, 30, processes=6)


def test_a_weak_teacher_stops_the_start_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="hardly above chance"):
        runs.distill(student=Net(), teacher=Net(), data=DIGITS, run=tmp_path / "run", method="kd", epochs=1, quiet=True)
    found = runs.distill(
        student=Net(),
        teacher=Net(),
        data=DIGITS,
        run=tmp_path / "allowed",
        method="kd",
        epochs=1,
        allow_weak_teacher=True,
        quiet=True,
    )
    assert found["steps"] == 1
