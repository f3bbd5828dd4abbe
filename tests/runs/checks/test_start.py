"""The checks before a run: each finds its fault, and none leaves a trace."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from tests.runs.own import DIGITS, Net, Pixels, checked, own, plan_of, rehearsal
from tests.runs.small import OPTIONS, assert_same, go_on, opened, small, train, words_of
from vrm import methods
from vrm.contract import Batch, Losses, Method, Needs, Phase, Progress, Term, Views
from vrm.data import DataSet
from vrm.divergences import cross_entropy
from vrm.engine.distribution import World
from vrm.engine.process_state import undisturbed
from vrm.models import create, save_weights
from vrm.runs import phase
from vrm.runs.assembly import Assembly, assemble
from vrm.runs.checks.data import check_batches, check_data
from vrm.runs.checks.rehearsal import Rehearsal
from vrm.runs.checks.room import check_disk, check_memory, checkpoint_bytes
from vrm.runs.checks.table import Check, CheckReport
from vrm.runs.errors import RunError
from vrm.runs.folder import read_teacher_record
from vrm.runs.trainer import Trainer

NOWHERE = Path("/nonexistent-run")
Usage = namedtuple("Usage", "total used free")


def row(report: CheckReport, name: str) -> Check:
    """The only row of this name."""
    (found,) = [check for check in report.checks if check.name == name]
    return found


def state(*networks: nn.Module) -> dict[str, Any]:
    """All that a check must leave as it was."""
    found: dict[str, Any] = {
        "rng": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "numpy": hashlib.sha256(np.random.get_state()[1].tobytes()).hexdigest(),
        "python": random.getstate(),
    }
    for i, network in enumerate(networks):
        for path, part in network.named_modules():
            found[f"{i}.{path}.training"] = part.training
            found[f"{i}.{path}.keys"] = {
                key: [*value] if isinstance(value, dict) else None for key, value in vars(part).items()
            }
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            bits = hashlib.sha256(tensor.detach().clone().numpy().tobytes()).hexdigest()
            found[f"{i}.{name}"] = bits, id(tensor), tensor.requires_grad, id(tensor.grad)
    return found


class Restless(Net):
    """Changes everything about itself in a forward pass: buffers, attributes, lists, generators."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.calls = 0
        self.history: list[int] = []
        self.plain = torch.zeros(2)

    def forward(self, images: Tensor) -> Tensor:
        self.seen.add_(1)
        self.hidden = self.hidden + 1
        self.plain += 1
        self.calls += 1
        self.history.append(len(images))
        np.random.random()
        random.random()
        return super().forward(images)


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return Pixels()


class TestNoTrace:
    @pytest.mark.parametrize("method", sorted(set(methods.names()) - {"kdsvd"}))
    def test_of_any_method(self, method: str, tmp_path: Path) -> None:
        weights = tmp_path / "w.safetensors"
        save_weights(create("resnet8", num_classes=10), weights)
        words = words_of(method, "teacher=resnet8", f"teacher.weights={weights}", "teacher.allow_weak=true")
        assembly = assemble(small(tmp_path / "run", *words).run)
        networks = [assembly.distiller, *([assembly.teacher] if assembly.teacher else [])]
        before = state(*networks)
        report = checked(assembly)
        assert not report.failures
        assert state(*networks) == before
        assert not (tmp_path / "run").exists()

    def test_of_a_network_that_changes_all_it_can(self, pixels: Pixels) -> None:
        student = Restless()
        assembly = own(NOWHERE, student, pixels, "vrm")
        before, calls, history, plain = (
            state(assembly.distiller),
            student.calls,
            [*student.history],
            student.plain.clone(),
        )
        assert not checked(assembly).failures
        assert state(assembly.distiller) == before
        assert (student.calls, student.history) == (calls, history)
        assert torch.equal(student.plain, plain)

    def test_also_after_a_failure(self, pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
        assembly = own(NOWHERE, Restless(), pixels)

        def broken(*_: Any) -> None:
            raise ValueError("broken")

        monkeypatch.setattr(type(assembly.method), "after_step", broken)
        before = state(assembly.distiller)
        assert "broken" in checked(assembly).failures[0].text
        assert state(assembly.distiller) == before

    @given(data=st.data())
    def test_whatever_happens_inside(self, data: st.DataObject) -> None:
        network = Restless()
        network.conv.weight.grad = torch.ones_like(network.conv.weight)
        network.fc.bias.requires_grad_(False)
        network.norm.eval()
        network.tied = network.fc
        before = state(network), network.calls, [*network.history], network.plain.clone()
        actions = {
            "forward": lambda: network(torch.rand(2, 3, 4, 4)),
            "backward": lambda: network(torch.rand(2, 3, 4, 4)).sum().backward(),
            "parameter": lambda: network.fc.weight.data.normal_(),
            "nan": lambda: network.fc.weight.data.fill_(float("nan")),
            "replace": lambda: setattr(network, "seen", torch.ones(5)),
            "new buffer": lambda: network.register_buffer("more", torch.ones(1)),
            "delete": lambda: network._buffers.pop("hidden", None),
            "attribute": lambda: setattr(network, "calls", -1),
            "grad": lambda: setattr(network.fc.weight, "grad", torch.ones_like(network.fc.weight)),
            "no grad": lambda: network.zero_grad(set_to_none=True),
            "freeze": lambda: network.requires_grad_(data.draw(st.booleans())),
            "mode": lambda: network.train(data.draw(st.booleans())),
            "seed": lambda: torch.manual_seed(data.draw(st.integers(0, 9))),
            "hook": lambda: network.register_forward_hook(lambda *_: None),
        }
        with undisturbed(network):
            for name in data.draw(st.lists(st.sampled_from(sorted(actions)), max_size=6)):
                if name in ("forward", "backward") and ("hidden" not in network._buffers or len(network.seen) != 3):
                    continue
                if name == "backward" and not network.fc.weight.requires_grad:
                    continue
                actions[name]()
        assert (state(network), network.calls, network.history) == before[:3]
        assert torch.equal(network.plain, before[3])
        assert network.fc.weight.grad is None

    def test_gradients_survive(self) -> None:
        network = Net()
        network.fc.weight.grad = torch.full_like(network.fc.weight, 2.0)
        with undisturbed(network):
            network.zero_grad(set_to_none=True)
            network(torch.rand(2, 3, 4, 4)).sum().backward()
        assert network.conv.weight.grad is None
        assert torch.equal(network.fc.weight.grad, torch.full_like(network.fc.weight, 2.0))

    @pytest.mark.parametrize(
        "words", [("method=ce", "precision=bfloat16", "views=2"), ("method=crd", *OPTIONS["crd"]), ("method=vrm",)]
    )
    def test_a_run_is_bitwise_the_one_without(
        self, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if "method=ce" not in words:
            save_weights(create("resnet8", num_classes=10), tmp_path / "w.safetensors")
            words += ("teacher=resnet8", f"teacher.weights={tmp_path / 'w.safetensors'}", "teacher.allow_weak=true")
        for name in ("checked", "unchecked"):
            if name == "unchecked":
                monkeypatch.setattr(Trainer, "_check", lambda self: None)
            with opened(assemble(small(tmp_path / name, *words).run)) as trainer:
                go_on(trainer)
        assert_same(tmp_path / "checked", tmp_path / "unchecked")


class Faulty(Method):
    """Goes wrong as told, in the phase and on the batch that is told."""

    title, venue, year, family = "Faulty", "-", 2026, "logit"
    kind: ClassVar[str] = "none"
    warm: ClassVar[Any] = ("student", "method")

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.idle = nn.Parameter(torch.ones(2))

    @property
    def needs(self) -> Needs:
        return Needs(teacher=False, separate_gradients=self.kind in ("nan in one of two", "one role"))

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("warm", epochs=1, trained=self.warm), Phase("main"))

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        logits = student.real.logits
        last = len(batch.target) < 8
        loss, other = cross_entropy(logits, batch.target) * self.scale, logits.square().mean()
        if progress.phase == "main" and last:
            if self.kind == "nan":
                other = other * float("nan")
            if self.kind == "gradient":
                other = other + (logits - logits.detach()).square().sum().sqrt()  # 0 with an infinite slope
            if self.kind == "raise":
                raise ValueError("a batch of six")
        if self.kind == "detached":
            loss, other = cross_entropy(logits.detach(), batch.target) * self.scale, other.detach()
        if self.kind == "nan in one of two":
            other = other + (logits - logits.detach()).square().sum().sqrt()
        return Losses(
            ce=Term(loss, role="task"), other=Term(other, 0.1, "task" if self.kind == "one role" else "distillation")
        )


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    load = methods.load
    monkeypatch.setattr(methods, "load", lambda name: Faulty if name == "faulty" else load(name))

    def make(kind: str, **more: Any) -> Assembly:
        monkeypatch.setattr(Faulty, "kind", kind)
        return own(NOWHERE, Net(), None, "faulty", **more)

    return make


class TestOneStep:
    def test_goes_through_every_phase_on_a_full_and_on_the_last_batch(self, faulty: Any) -> None:
        rows = [check for check in rehearsal(faulty("none")).checks if check.name == "one step"]
        assert [check.result for check in rows] == ["ok", "ok"]
        for name, check in zip(("warm", "main"), rows, strict=True):
            assert f"phase {name} in float32 on batches of 8: loss" in check.detail
            assert ", 6: loss" in check.detail

    @pytest.mark.parametrize(
        ("kind", "found"),
        [
            ("nan", "not finite: loss term other"),
            ("gradient", "not finite: gradient of student.network.conv.weight"),
            ("nan in one of two", "not finite: gradient of"),
            ("one role", "no loss term with role 'distillation'"),
            ("raise", "ValueError: a batch of six (test_start.py, line"),
            ("detached", "no loss reaches the student"),
        ],
    )
    def test_finds(self, kind: str, found: str, faulty: Any) -> None:
        failures = [check.text for check in rehearsal(faulty(kind)).checks if check.result == "fail"]
        assert len(failures) == (2 if kind in ("nan in one of two", "one role") else 1)
        assert found in failures[-1]
        report = checked(faulty(kind))
        with pytest.raises(RunError) as error:
            report.require()
        assert found in str(error.value)

    @pytest.mark.parametrize("choice", ["skip", "rollback"])
    def test_what_nan_allows_is_a_note(self, choice: str, faulty: Any) -> None:
        checks = rehearsal(faulty("nan", nan=choice)).checks
        assert [check.result for check in checks if check.name == "one step"] == ["ok", "note"]
        assert f"nan={choice} goes on" in checks[1].detail

    def test_each_phase_moves_what_it_says(self, faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Faulty, "warm", ("method",))
        assembly = faulty("none")
        given = []
        build = phase.build_optimizer
        monkeypatch.setattr(phase, "build_optimizer", lambda s, p, m: given.append(len(p)) or build(s, p, m))
        rehearsal(assembly)
        assert given == [2, len([*assembly.distiller.parameters()])]

    def test_a_phase_whose_losses_do_not_reach_what_it_trains(
        self, faulty: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Faulty, "warm", ("student",))
        text = next(check.text for check in rehearsal(faulty("detached")).checks if check.result == "fail")
        assert "phase warm: ValueError: no active loss term leads to what this phase trains: student" in text

    def test_names_parameters_that_no_loss_reaches(self, faulty: Any) -> None:
        check = rehearsal(faulty("none")).checks[-1]
        assert check.result == "note"
        assert "no loss reaches method.idle, which will not move" in check.detail
        assert "250 of the student, 3 of the method" in check.detail

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_in_the_precision_of_the_run(self, precision: str, faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        kinds = set()
        convolve = nn.Conv2d.forward

        def look(self: nn.Conv2d, x: Tensor) -> Tensor:
            out = convolve(self, x)
            kinds.add(out.dtype)
            return out

        assembly = faulty("none", precision=precision)
        monkeypatch.setattr(nn.Conv2d, "forward", look)
        assert rehearsal(assembly).checks[0].result == "ok"
        assert kinds == {getattr(torch, precision)}

    def test_is_the_step_that_trains(self, faulty: Any) -> None:
        """Its parts are those of ``accumulate``, its views are made by what makes the run's."""
        assembly = faulty("none", accumulate=2, views=2)
        made, seen = [], []

        def make_views(images: Tensor, index: Tensor, **options: Any) -> tuple[Tensor, ...]:
            made.append((len(images), int(options["epoch"]), options["seed"], options["num_virtual"]))
            return assembly.policy(images, index, **options)

        student = assembly.student.network
        student.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), student.training)))
        before = state(assembly.distiller)
        text = rehearsal(replace(assembly, make_views=make_views)).checks[0].detail
        assert "phase warm in float32 on batches of 8: loss" in text
        assert made == [(size, 1, assembly.run.data_seed, 1) for size in (4, 4, 3, 3)] * 2
        assert seen == [(size, True) for size in (4, 4, 4, 4, 3, 3, 3, 3)] * 2
        assert state(assembly.distiller) == before

    def test_memory_that_runs_out(self, faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        assembly = faulty("none")

        def full(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

        monkeypatch.setattr(nn.Conv2d, "forward", full)
        assert "lower batch_size" in rehearsal(assembly).checks[0].fix

    def test_a_single_batch_smaller_than_batch_size(self, pixels: Pixels) -> None:
        report = checked(own(NOWHERE, Net(), pixels, batch_size=64))
        assert not report.failures
        assert row(report, "batches").result == "note"
        assert "30 images in batches of 64: 1 step an epoch, as there are fewer" in row(report, "batches").detail
        assert "batches of 30: loss" in row(report, "one step").detail


class TestData:
    def damaged(self, **changes: Any) -> DataSet:
        return replace(DIGITS, train=replace(DIGITS.train, **changes))

    def test_counts(self, pixels: Pixels) -> None:
        few = self.damaged(targets=torch.cat([torch.zeros(5, dtype=torch.int64), DIGITS.train.targets[5:]]))
        counts = few.train.targets.bincount(minlength=10)
        text = row(checked(own(NOWHERE, Net(), pixels, dataset=few)), "train data").detail
        smallest = int(counts.argmin())
        assert f"30 images of 8x8, 30 of them read; 10 classes, from {counts.min()} images ({smallest}) to" in text

    def test_one_class_is_refused_for_training_alone(self, pixels: Pixels) -> None:
        one = torch.full_like(DIGITS.train.targets, 4)
        check = row(checked(own(NOWHERE, Net(), pixels, dataset=self.damaged(targets=one))), "train data")
        assert (check.result, check.detail) == ("fail", "30 images, all of class '4'")
        train, test = check_data(replace(DIGITS, test=replace(DIGITS.test, targets=DIGITS.test.targets * 0)))
        assert (train.result, test.result) == ("ok", "note")

    def test_an_empty_class_is_noted(self, pixels: Pixels) -> None:
        targets = DIGITS.train.targets.clone()
        targets[targets == 4] = 5
        check = row(checked(own(NOWHERE, Net(), pixels, dataset=self.damaged(targets=targets))), "train data")
        assert check.result == "note"
        assert "no image of 1 class (4)" in check.detail

    def test_equal_classes_are_told_as_equal(self, pixels: Pixels) -> None:
        text = row(checked(own(NOWHERE, Net(), pixels)), "train data").detail
        assert text == "30 images of 8x8, 30 of them read; 10 classes, 3 images each"

    def test_a_channel_that_never_varies_is_noted(self, pixels: Pixels) -> None:
        images = DIGITS.train.images.clone()
        images[:, 2] = 7
        data = replace(self.damaged(images=images), std=(0.3, 0.3, 1.0))
        train, test = check_data(data)
        assert train.result == "note"
        assert "; the blue channel never varies: its standard deviation is taken as 1" in train.detail
        assert test.result == "ok"

    def test_floats_are_noted(self, pixels: Pixels) -> None:
        (train, _) = check_data(self.damaged(images=DIGITS.train.images.float() / 300))
        assert train.result == "note"
        assert "floats, which networks see as they are" in train.detail

    def test_blank_images_are_noted(self, pixels: Pixels) -> None:
        blank = self.damaged(images=torch.zeros_like(DIGITS.train.images))
        check = row(checked(own(NOWHERE, Net(), pixels, dataset=blank)), "train data")
        assert check.result == "note"
        assert "of one colour" in check.detail

    def test_a_label_out_of_range_fails(self, pixels: Pixels) -> None:
        assembly = own(NOWHERE, Net(), pixels)
        wrong = self.damaged(images=DIGITS.train.images)
        wrong.train.targets.data = wrong.train.targets.clone()
        object.__setattr__(wrong.train, "targets", torch.full_like(wrong.train.targets, 10))
        (check,) = [c for c in check_data(wrong) if c.result == "fail"]
        assert "image 0 has label 10, but there are 10 classes" in check.detail
        assert not [c for c in check_data(assembly.data) if c.result == "fail"]

    def test_an_image_that_cannot_be_read_fails(self, monkeypatch: pytest.MonkeyPatch, pixels: Pixels) -> None:
        def unreadable(*_: Any) -> None:
            raise OSError("train/cat/1.png is cut off")

        monkeypatch.setattr(type(DIGITS.train), "batch", unreadable)
        check = check_data(DIGITS)[0]
        assert check.result == "fail"
        assert "cat/1.png is cut off" in check.detail


class TestDisk:
    def free(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - count, count))

    def test_too_little_room_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pixels: Pixels) -> None:
        assembly = own(tmp_path / "run", Net(), pixels)
        student = sum(t.numel() * t.element_size() for t in assembly.student.network.state_dict().values())
        momenta = sum(p.numel() * 4 for p in assembly.student.network.parameters())
        needed = 3 * (2 * student + momenta) + 2 * student
        self.free(monkeypatch, needed - 1)
        check = row(checked(assembly), "disk")
        assert check.result == "fail"
        assert "lower checkpoint.keep" in check.fix
        self.free(monkeypatch, needed)
        assert row(checked(assembly), "disk").result == "ok"

    def test_what_the_run_wrote_before_counts_as_room(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pixels: Pixels
    ) -> None:
        assembly = own(tmp_path / "run", Net(), pixels)
        self.free(monkeypatch, 0)
        assert check_disk(assembly, plan_of(assembly), tmp_path / "run", 0).result == "fail"
        (tmp_path / "run" / "checkpoints" / "step-000000001").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / "step-000000001" / "tensors.safetensors").write_bytes(bytes(10**6))
        assert check_disk(assembly, plan_of(assembly), tmp_path / "run", 0).result == "ok"

    def test_the_teachers_cache_counts(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pixels: Pixels) -> None:
        assembly = own(tmp_path / "run", Net(), pixels, "vrm")
        run = assembly.run.model_copy(
            update={"teacher": assembly.run.teacher.model_copy(update={"cache": tmp_path / "c"})}
        )
        cached = 30 * 2 * 2 * 10 * 4  # images, epochs, views, classes, bytes
        self.free(monkeypatch, 10**9)
        alone, both = (
            check_disk(a, plan_of(a), tmp_path / "run", 0).detail for a in (assembly, replace(assembly, run=run))
        )
        assert "cache" not in alone
        assert f"{cached / 1000:.3g} kB for the teacher's cache" in both

    def test_says_what_checkpoints_really_take(self, tmp_path: Path) -> None:
        resolved = small(tmp_path / "run", "method=ce")
        assembly = assemble(resolved.run)
        one, student = checkpoint_bytes(assembly, rehearsal(assembly).optimizer_bytes)
        train(resolved)
        for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
            size = sum(file.stat().st_size for file in folder.iterdir())
            assert size == pytest.approx(one, rel=0.05)
        assert (tmp_path / "run" / "model.safetensors").stat().st_size == pytest.approx(student, rel=0.05)


class TestReport:
    REPORT = CheckReport(
        "kd in runs/a",
        (
            Check("data", "ok", "30 [images]"),
            Check("teacher", "fail", "is weak", "give another"),
            Check("x", "note", "y"),
        ),
        1.25,
    )

    def test_lines_where_there_is_no_terminal(self) -> None:
        console = Console(file=io.StringIO(), width=40)
        self.REPORT.show(console)
        assert console.file.getvalue().splitlines() == [
            "kd in runs/a: checked in 1.2 s",
            "  data            ok    30 [images]",
            "  teacher         fail  is weak; give another",
            "  x               note  y",
        ]

    def test_a_table_on_a_terminal(self) -> None:
        console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
        self.REPORT.show(console)
        for text in ("kd in runs/a", "check", "result", "30 [images]", "fail", "give another"):
            assert text in console.file.getvalue()
        with pytest.raises(RunError, match=r"^is weak; give another$"):
            self.REPORT.require()
        replace(self.REPORT, checks=self.REPORT.checks[::2]).require()

    def test_a_failure_elsewhere_is_a_failure_here(self, pixels: Pixels) -> None:
        class Two(World):
            """This process and one in which something failed."""

            def gather(self, value: Any) -> Any:
                return [value, ["out of memory"]]

        two = Two()
        report = checked(own(NOWHERE, Net(), pixels), world=two)
        assert [check.text for check in report.failures] == ["process 1: out of memory"]


def test_memory_is_held_against_the_device(pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = own(NOWHERE, Net(), pixels)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 2 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    tried = Rehearsal((), optimizer_bytes=10**8, peak_bytes=8 * 10**8)
    assert check_memory(assembly, tried).result == "ok"
    assert check_memory(assembly, replace(tried, peak_bytes=10**9)).result == "fail"


RECORD = {"key": "a", "task": "classification", "scores": {"top1": 1.0, "loss": 3.0}, "images": 9}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"key": "a"}',
        *(
            json.dumps({**RECORD, **changes})
            for changes in (
                {"key": 1},
                {"images": None},
                {"scores": {"loss": 1.0}},
                {"scores": {"top1": float("nan")}},
                {"task": "x"},
                {"task": None},
            )
        ),
    ],
)
def test_a_damaged_record_of_the_teacher_is_measured_again(content: str, tmp_path: Path) -> None:
    assert read_teacher_record(tmp_path) is None
    (tmp_path / "teacher.json").write_text(content)
    assert read_teacher_record(tmp_path) is None
    (tmp_path / "teacher.json").write_text(json.dumps(RECORD))
    assert read_teacher_record(tmp_path) == RECORD


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("steps=10000", "steps=10000 has no effect, as the whole run has "),
        ("timeout=1800", "timeout=1800 has no effect, as the run is one process"),
        ("timeout=600", ""),
    ],
)
def test_a_setting_that_this_run_does_not_feel_is_noted(tmp_path: Path, word: str, told: str) -> None:
    assembly = assemble(small(tmp_path / "run", "method=ce", word).run)
    batches = check_batches(assembly, plan_of(assembly))
    assert (batches.result, told in batches.text) == ("note" if told else "ok", True)
