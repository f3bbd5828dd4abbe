"""Numbers that are not finite, half precision, averages, batches in parts: nothing is poisoned, nothing is off."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.runs.own import Net, Pixels, own
from tests.runs.small import (
    OPTIONS,
    QUIET,
    assert_same,
    final_state,
    go_on,
    interrupt,
    metrics,
    opened,
    small,
    train,
    words_of,
)
from vrm import methods
from vrm.bench.step_time import build_step_of_phase, whole_batches
from vrm.config import ConfigError
from vrm.engine.guard import Average, Guard, LossScale
from vrm.engine.meter import Measured
from vrm.engine.step import Step
from vrm.models import TappedNetwork
from vrm.runs import api as runs
from vrm.runs.assembly import assemble
from vrm.runs.errors import NonFinite


class Poison:
    """Puts a bad value into one step, at one place."""

    def __init__(self, step: int, place: str, value: float = float("nan"), *, times: int = 1) -> None:
        self.step, self.place, self.value, self.left = step, place, value, times
        self.now = False
        self.states: list[dict[str, Tensor]] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        call, forward, learn = Step.__call__, TappedNetwork.forward, Step._add_gradients
        poison = self

        def step(self: Step, index: Tensor, *images: Tensor) -> None:
            poison.now = int(self.progress.step) == poison.step and poison.left > 0
            poison.left -= poison.now
            poison.states.append({name: value.clone() for name, value in state_of(self).items()})
            call(self, index, *images)
            poison.now = False

        def activation(self: TappedNetwork, images: Tensor) -> Any:
            if not (poison.now and self.training and poison.place in ("input", "activation", "statistics")):
                return forward(self, images)
            inner = self.network if poison.place == "input" else self.network.get_submodule("bn1")
            handle = inner.register_forward_pre_hook(lambda module, inputs: (inputs[0] * poison.value,))
            try:
                return forward(self, images)
            finally:
                handle.remove()

        def loss(self: Step, *arguments: Any, **options: Any) -> Measured:
            if poison.now and poison.place == "loss":
                total = methods.load("kd").forward

                def bad(method: Any, *inputs: Any) -> Any:
                    losses = total(method, *inputs)
                    losses["kd"] = type(losses["kd"])(losses["kd"].value * poison.value, losses["kd"].weight)
                    return losses

                with pytest.MonkeyPatch.context() as inner:
                    inner.setattr(type(self.distiller.method), "forward", bad)
                    return learn(self, *arguments, **options)
            if poison.now and poison.place == "gradient":
                weight = self.distiller.student.network.get_parameter("conv1.weight")
                handle = weight.register_hook(lambda gradient: gradient * poison.value)
                try:
                    return learn(self, *arguments, **options)
                finally:
                    handle.remove()
            return learn(self, *arguments, **options)

        patch.setattr(Step, "__call__", step)
        patch.setattr(TappedNetwork, "forward", activation)
        patch.setattr(Step, "_add_gradients", loss)


def state_of(step: Step) -> dict[str, Tensor]:
    """Everything that a bad step must leave alone."""
    found: dict[str, Tensor] = dict(step.distiller.state_dict())
    momenta = [v for state in step.optimizer.state.values() for v in state.values()]
    found |= {f"momentum {i}": v for i, v in enumerate(momenta)}
    if step.average is not None:
        found |= {f"average {n}": t for n, t in step.average.average.state_dict().items()}
    return found


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        *((place, value, ["method=kd"])
          for place in ("input", "activation", "loss", "gradient") for value in (float("nan"), float("inf"))),
        # where the loss is finite
        ("statistics", 1e25, ["method=kd"]),  # a variance that overflows, normalised to zeros
        ("statistics", 1e25, ["method=dot"]),
        ("gradient", 1e30, ["method=kd"]),  # finite, but momenta and weights would not be for long
        ("gradient", 1e21, ["method=kd", "optimizer=adamw", "optimizer.lr=0.001"]),  # its square is infinite for good
        ("activation", float("nan"), ["method=crd", *OPTIONS["crd"]]),  # the memory of a method
        ("gradient", float("inf"), ["method=dot"]),  # two momenta, and an optimiser that knows no found_inf
    ],
)  # fmt: skip
def test_a_bad_step_changes_nothing_and_is_told(
    teacher: Path, tmp_path: Path, place: str, value: float, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(5, place, value)
    poison.install(monkeypatch)
    train(small(tmp_path / "run", f"teacher={teacher}/", "nan=skip", "ema=0.9", *words))
    before, after = poison.states[5], poison.states[6]
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not all(torch.equal(poison.states[4][name], before[name]) for name in before)
    final = {n: t for n, t in final_state(tmp_path / "run").items() if not n.startswith("incident.")}
    assert all(torch.isfinite(t).all() for t in final.values() if t.is_floating_point())
    assert [line["value"] for line in metrics(tmp_path / "run") if line["name"] == "nonfinite_steps"] == [1.0]
    assert all(line["value"] == line["value"] for line in metrics(tmp_path / "run"))
    told = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert told["step"] == 5
    assert len(told["samples"]) == 8
    assert told["checkpoint"].endswith("step-000000004")
    finite = place in ("gradient", "statistics")
    assert isinstance(told["values"]["loss"], float) is finite


def test_stopping_names_step_samples_terms_and_checkpoint(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(5, "loss", times=3).install(monkeypatch)
    with pytest.raises(NonFinite, match=r"first at step 5 \(loss nan, loss/ce .*samples .*step-000000004.*nan=skip"):
        train(small(tmp_path / "run", "method=kd", f"teacher={teacher}/"))
    runs.resume(tmp_path / "run", ["nan=skip"], console=QUIET, quiet=True)  # as the message advises
    train(small(tmp_path / "whole", "method=kd", f"teacher={teacher}/", "nan=skip"))
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_an_evaluation_that_is_no_number_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Blind(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * (1 if self.training or len(images) == 2 else float("nan"))

    with opened(own(tmp_path / "run", Blind()), console=Console(width=300)) as trainer:
        result = go_on(trainer)
    assert "epoch 1: test loss nan, the student's logits on test images are not finite" in capsys.readouterr().out
    assert result["last"]["top1"] == result["last"]["top5"] == 0


def test_what_no_loss_shows_is_told_so(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(5, "statistics", 1e25).install(monkeypatch)
    with pytest.raises(NonFinite, match=r"first at step 5 \(loss \d[^()]*: in gradients or statistics; samples"):
        train(small(tmp_path / "run", "method=kd", f"teacher={teacher}/"))


def test_rolling_back_repeats_the_stretch_with_half_the_rate(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["method=kd", f"teacher={teacher}/", "schedule.name=step", "nan=rollback"]
    Poison(5, "activation").install(monkeypatch)
    train(small(tmp_path / "run", *words))
    rates = {line["step"]: line["value"] for line in metrics(tmp_path / "run") if line["name"] == "lr"}
    assert rates == pytest.approx({2: 0.05, 4: 0.05, 6: 0.025, 8: 0.025})
    assert not [line for line in metrics(tmp_path / "run") if line["name"] == "nonfinite_steps"]
    monkeypatch.undo()

    # a run that was stopped after it had rolled back keeps its rate
    Poison(5, "activation").install(monkeypatch)
    interrupt(small(tmp_path / "stopped", *words), 7)
    runs.resume(tmp_path / "stopped", console=QUIET, quiet=True)
    assert_same(tmp_path / "run", tmp_path / "stopped")


def test_rolling_back_gives_up_in_the_end(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(1, "loss", times=100).install(monkeypatch)
    with pytest.raises(NonFinite, match="still gives NaN"):
        train(small(tmp_path / "run", "method=kd", f"teacher={teacher}/", "nan=rollback"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1.1e18, -1.1e18])
def test_a_step_is_judged_by_loss_gradients_and_buffers(bad: float) -> None:
    module = nn.BatchNorm1d(3)
    module.register_buffer("mask", torch.tensor([0.0, -torch.inf]))  # infinite on purpose
    module.register_buffer("small", torch.zeros(2, dtype=torch.float16))
    module.register_buffer("empty", torch.zeros(0))
    guard = Guard(module, torch.optim.SGD(module.parameters(), lr=0.1, fused=True))
    gradients = [torch.full((3,), 9e17), torch.tensor([-9e17]), torch.zeros(())]
    assert bool(guard.judge(torch.tensor(3e38), gradients))
    for gradient in gradients:
        spoilt = gradient.clone().flatten()
        spoilt[-1] = bad
        assert not bool(guard.judge(torch.zeros(()), [*gradients, spoilt]))
    if not torch.isfinite(torch.tensor(bad)):
        assert not bool(guard.judge(torch.tensor(bad), gradients))
        for name in ("running_var", "small"):
            module.get_buffer(name)[1] = bad
            assert not bool(guard.judge(torch.zeros(()), gradients))
            module.get_buffer(name)[1] = 1.0
    assert bool(guard.judge(torch.zeros(()), gradients))


def test_the_loss_scale_follows_torchs_rule() -> None:
    ours = LossScale.at_start(torch.device("cpu"))
    theirs = torch.amp.GradScaler("cpu", growth_interval=LossScale.GROWTH_INTERVAL)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for step in range(2100):
        finite = step not in (3, 4, 50, 2080)
        theirs.scale(torch.ones(()))
        parameter.grad = torch.tensor([1.0 if finite else float("inf")])
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(finite))
        assert float(ours.value) == theirs.get_scale()


def test_float16_recovers_from_an_overflow(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    high = LossScale(torch.full((), 2.0**32), torch.zeros((), dtype=torch.int64))
    monkeypatch.setattr(LossScale, "at_start", lambda device: deepcopy(high))
    words = ["method=kd", f"teacher={teacher}/", "precision=float16", "epochs=8", "nan=stop"]
    train(small(tmp_path / "whole", *words))
    lines = metrics(tmp_path / "whole")
    scales = [line["value"] for line in lines if line["name"] == "loss_scale"]
    assert scales[0] < 2.0**32
    assert scales[-1] == scales[-2], "it found a scale that fits"
    assert sum(line["value"] for line in lines if line["name"] == "overflows") == pytest.approx(
        32 - torch.tensor(scales[-1]).log2()
    )
    assert not [line for line in lines if line["name"] == "nonfinite_steps"]
    losses = [line["value"] for line in lines if line["name"] == "loss" and line["split"] == "train"]
    assert losses[0] == losses[0] != losses[-1]
    interrupt(small(tmp_path / "stopped", *words), 11)
    runs.resume(tmp_path / "stopped", console=QUIET, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_the_average_is_that_of_torch_and_is_resumed(teacher: Path, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    other = deepcopy(network)
    ours = Average(network, other, 0.9)
    theirs = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=False
    )
    theirs.update_parameters(network)
    for _ in range(4):
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        network(torch.randn(5, 3))
        ours.update(torch.tensor(True))
        theirs.update_parameters(network)
    for a, b in zip(ours.average.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(ours.average.buffers(), network.buffers(), strict=True):
        assert torch.equal(a, b)

    words = ["method=kd", f"teacher={teacher}/", "ema=0.5"]
    train(small(tmp_path / "whole", *words))
    interrupt(small(tmp_path / "stopped", *words), 3)
    result = runs.resume(tmp_path / "stopped", console=QUIET, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    a, b = (load_file(tmp_path / name / "ema.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "ema_top1" in result["last"]


def gradients(words: list[str], folder: Path, accumulate: int) -> dict[str, Tensor]:
    """Those of a first batch, with the student in eval mode."""
    assembly = assemble(small(folder, *words, f"accumulate={accumulate}").run)
    step = build_step_of_phase(assembly)
    assembly.distiller.eval()
    step.forward_backward(*whole_batches(assembly, 1)[0])
    return {name: p.grad for name, p in assembly.distiller.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", methods.names())
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(teacher: Path, tmp_path: Path, method: str) -> None:
    """Where no loss couples samples, and no batch norm does."""
    needs = methods.load(method)().needs
    if needs.couples_samples or needs.separate_gradients:
        return
    words = words_of(method, f"teacher={teacher}/")
    words += ["batch_size=10", "steps=1", *["method.teacher_batch_statistics=false"] * needs.teacher_batch_statistics]
    whole, parts = (gradients(words, tmp_path / str(k), k) for k in (1, 5))
    assert whole.keys() == parts.keys()
    assert whole
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=2e-4, atol=2e-5 * float(value.abs().max()) + 1e-8)


@pytest.mark.parametrize("method", ["kd", "dot"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_batch_in_parts_is_one_trajectory(method: str, optimizer: str, tmp_path: Path) -> None:
    """To rounding in float64, over twelve steps, with parts of unequal size."""
    found = []
    for accumulate in (1, 3):
        torch.manual_seed(0)
        student = Net(norm=False)
        settings = {
            "optimizer": {"name": optimizer, "lr": 0.02},
            "accumulate": accumulate,
            "batch_size": 8,
            "epochs": 3,
        }
        assembly = own(tmp_path / str(accumulate), student, Pixels(), method, **settings)
        assembly.distiller.double()
        assembly.teacher.double()  # type: ignore[union-attr]
        with opened(assembly) as trainer:
            go_on(trainer)
        found.append(student.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-12, atol=1e-13)


def test_what_parts_do_not_keep_is_said(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["method=vrm", f"teacher={teacher}/", "batch_size=10", "accumulate=2", "steps=1"]
    runs.start(small(tmp_path / "run", *words), console=Console(width=400))
    out = capsys.readouterr().out
    assert "in 2 parts: gradients are not those of whole batches (the method relates samples, batch norm" in out


def test_parts_that_are_too_small_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="accumulate"):
        train(small(tmp_path / "run", "method=kd", f"teacher={teacher}/", "accumulate=8"))
