"""The training step: finite guard, no waiting for the device, phases, roles, schedules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runs.small import QUIET, assert_same, go_on, interrupt, metrics, opened, small, train
from vrm import methods
from vrm.config import Optimizer, Schedule, resolve
from vrm.contract import NO_TEACHER, Batch, Losses, Method, Needs, Phase, Progress, Term, Views
from vrm.divergences import cross_entropy
from vrm.engine.optimizers import build_optimizer, learning_rate
from vrm.randomness import uniform
from vrm.runs import api as runs
from vrm.runs.assembly import assemble
from vrm.runs.trainer import Trainer


class Example(Method):
    """Two phases, a bank over the samples, draws of its own, a projector, and NaN where asked."""

    title, venue, year, family = "Example", "-", 2026, "feature"

    def __init__(self, poison: int = -1) -> None:
        super().__init__()
        self.poison = poison
        self.register_buffer("bank", torch.zeros(30, 10))
        self.register_buffer("poisoned", torch.zeros(()))
        self.scale = torch.nn.Parameter(torch.ones(()))

    @property
    def needs(self) -> Needs:
        return Needs(teacher=False, index=True, draws=True, virtual_views=2, student_taps=("stages", "last:pre"))

    @property
    def phases(self) -> tuple[Phase, ...]:
        warm = Phase("warm", epochs=1, trained=("method",), terms=("bank",), schedule="constant")
        return (warm, Phase("main", terms=("ce", "bank")))

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        assert set(student.real.taps) == {"stage1", "stage2", "stage3", "stage3:pre"}
        assert len(student.virtual) == 2
        draw = uniform(progress.seed, "example", progress.step, batch.index).float()[:, None]
        bad = torch.where(progress.step == self.poison, float("nan"), 0.0)
        distance = (self.scale * student.virtual[1].logits - self.bank[batch.index] - draw).square().mean()
        return Losses(
            ce=Term(cross_entropy(student.real.logits, batch.target), role="task"), bank=Term(distance + bad, 0.1)
        )

    @torch.no_grad()
    def after_step(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> None:
        self.bank[batch.index] = student.real.logits
        self.poisoned += torch.where(progress.step == self.poison, float("nan"), 1.0)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    load = methods.load
    monkeypatch.setattr(methods, "load", lambda name: Example if name == "example" else load(name))


@pytest.mark.usefixtures("example")
class TestExample:
    def test_phases_train_what_they_say(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = small(tmp_path / "run", "method=example").run
        assembly = assemble(run)
        before = {name: p.clone() for name, p in assembly.student.network.named_parameters()}
        seen: list[tuple[str, float, bool]] = []
        original = Trainer._set_rate

        def look(self: Trainer, step: Any, stretch: Any, epoch: int) -> None:
            original(self, step, stretch, epoch)
            same = all(torch.equal(p, before[n]) for n, p in assembly.student.network.named_parameters())
            seen.append((stretch.phase.name, float(step.optimizer.param_groups[0]["lr"]), same))

        monkeypatch.setattr(Trainer, "_set_rate", look)
        with opened(assembly) as trainer:
            result = go_on(trainer)
        warm = [entry for entry in seen if entry[0] == "warm"]
        assert len(warm) == 4  # thirty samples in batches of eight, the last smaller one kept
        assert len(seen) == 12
        assert all(rate == pytest.approx(0.05) and same for _, rate, same in warm)
        assert not seen[-1][2]
        assert seen[-1][1] < 0.05
        assert result["extra_epochs"] == 1
        assert result["student_views"] == 3
        assert result["student_passes"] == 3 * 3 * 30

    @pytest.mark.parametrize("stop", [2, 4, 5, 9])
    def test_resumes_bitwise_in_every_phase(self, tmp_path: Path, stop: int) -> None:
        train(small(tmp_path / "whole", "method=example"))
        interrupt(small(tmp_path / "stopped", "method=example"), stop)
        runs.resume(tmp_path / "stopped", console=QUIET, quiet=True)
        assert_same(tmp_path / "whole", tmp_path / "stopped")

    @pytest.mark.parametrize("poison", [0, 11])
    def test_a_nonfinite_step_is_taken_back_whole(
        self, tmp_path: Path, poison: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = small(tmp_path / "run", "method=example", f"method.poison={poison}", "nan=skip").run
        assembly = assemble(run)
        states: list[dict[str, Tensor]] = []
        original = Trainer._set_rate

        def snapshot(self: Trainer, step: Any, *rest: Any) -> None:
            original(self, step, *rest)
            momenta = {f"{i}{k}": v.clone() for i, s in enumerate(step.optimizer.state.values()) for k, v in s.items()}
            states.append({n: t.clone() for n, t in assembly.distiller.state_dict().items()} | momenta)

        monkeypatch.setattr(Trainer, "_set_rate", snapshot)
        with opened(assembly) as trainer:
            go_on(trainer)
        final = dict(assembly.distiller.state_dict())
        states.append(final)
        before, after = states[poison], states[poison + 1]
        assert all(torch.equal(before[n], after[n]) for n in before.keys() & after.keys() if not n[0].isdigit())
        assert all(torch.isfinite(t).all() for t in final.values())
        counted = [line for line in metrics(run.run) if line["name"] == "nonfinite_steps"]
        assert [line["value"] for line in counted] == [1.0]
        assert all(line["value"] == line["value"] for line in metrics(run.run))


def test_rates_of_the_literature() -> None:
    schedule = Schedule.model_validate({"milestones": (150, 180, 210)})

    def rate(epoch: int, settings: Schedule = schedule, steps: int = 10) -> float:
        return learning_rate(
            settings, 0.05, Phase(), epoch=epoch, step=(epoch - 1) * steps, epochs=240, steps_per_epoch=steps
        )

    assert [round(rate(e), 8) for e in (1, 150, 151, 180, 181, 210, 211, 240)] == [
        0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005, 0.00005, 0.00005
    ]  # fmt: skip
    cosine = Schedule.model_validate({"name": "cosine", "min_lr": 0.001, "warmup_epochs": 20})
    assert rate(1, cosine) == pytest.approx(0.05 / 200)
    assert rate(21, cosine) == pytest.approx(0.05)
    assert rate(131, cosine) == pytest.approx((0.05 + 0.001) / 2)
    assert rate(241, cosine) == pytest.approx(0.001)


def test_optimisers_begin_as_if_they_had_no_state() -> None:
    for name in ("sgd", "adamw"):
        parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2)]
        settings = Optimizer.model_validate({"name": name, "weight_decay": 0.1, "lr": 0.1})
        ours = build_optimizer(settings, parameters[:1], Example())
        theirs: torch.optim.Optimizer
        if name == "sgd":
            theirs = torch.optim.SGD(parameters[1:], lr=0.1, momentum=0.9, weight_decay=0.1)
        else:
            theirs = torch.optim.AdamW(parameters[1:], lr=0.1, weight_decay=0.1)
        for step in range(4):
            for parameter in parameters:
                parameter.grad = torch.cos(torch.arange(7.0) + step)
            ours.step()
            theirs.step()
        assert torch.allclose(parameters[0], parameters[1], rtol=1e-6)


def test_two_views_average_a_single_view_loss(tmp_path: Path) -> None:
    one = resolve("distill", "digits", ["method=ce", "student=resnet8", "views=2", f"run={tmp_path}"]).run
    assembly = assemble(one)
    images = assembly.policy(
        assembly.data.train.images[:8], torch.arange(8), epoch=1, seed=0, num_virtual=assembly.distiller.num_virtual
    )
    assert len(images) == 2
    batch = Batch(torch.arange(8), assembly.data.train.targets[:8])
    progress = Progress(torch.tensor(1), torch.tensor(0), 1, 1)
    losses, student = assembly.distiller(images, NO_TEACHER, batch, progress)
    expected = [cross_entropy(outputs.logits, batch.target) for outputs in student.each()]
    assert torch.allclose(losses["ce"].value, torch.stack(expected).mean())
    assert not torch.equal(expected[0], expected[1])


def test_tensorboard_receives_every_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small(tmp_path / "run", "method=ce", "tensorboard=true"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {(tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    logged = metrics(tmp_path / "run")
    assert {(f"{m['split']}/{m['name']}", m["step"]) for m in logged} == {(tag, step) for tag, step, _ in found}
    assert not (tmp_path / "plain").exists()
    train(small(tmp_path / "plain", "method=ce"))
    assert not (tmp_path / "plain" / "tensorboard").exists()
