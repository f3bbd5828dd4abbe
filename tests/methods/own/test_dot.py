"""DOT: its case, and what the contract suite does not test."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm.config import ConfigError, Optimizer
from vrm.contract import Method, Outputs
from vrm.engine.optimizers import build_optimizer
from vrm.methods.dot import DOT, TwoMomenta
from vrm.methods.kd import kd_loss

from ..harness import Case, Golden, Outcome
from ..objective import Objective


def reproduce(golden: Golden) -> Outcome:
    """DOT: steps of the optimiser with given gradients; a parameter without one of them has none in the file."""
    settings, outcome = golden.hyperparameters, {}
    parameters = {name: torch.nn.Parameter(golden[f"init.{name}"].clone()) for name in settings["params"]}
    optimizer = TwoMomenta(
        parameters.values(),
        lr=settings["lr"][0],
        **{name: settings[name] for name in ("momentum", "delta", "weight_decay")},
    )
    for step, lr in enumerate(settings["lr"]):
        optimizer.param_groups[0]["lr"] = lr
        apart = [[golden.tensors.get(f"in.step{step}.grad_{k}.{name}") for name in parameters] for k in ("task", "kd")]
        optimizer.step_apart(*apart)
        outcome |= {f"after.step{step}.{name}": parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        outcome[f"after.final.task_buffer.{name}"] = state["task_momentum"]
        outcome[f"after.final.kd_buffer.{name}"] = state["distillation_momentum"]
    return outcome


CASE = Case(
    "dot",
    golden=reproduce,
    alternatives={"delta": ({}, {"delta": 0.05})},
    legal=({"delta": 0.0}, {"delta": 0.99}, {"temperature": 0.5}),
    illegal=({"delta": -0.1}, {"delta": 1.0}, {"temperature": 0.0}, {"temperature": -1.0}),
    invariances=("sample_order", "logit_shift"),
)


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((3, 2), (4,))]


@pytest.mark.parametrize("apart", [True, False])
def test_without_shift_it_is_sgd(apart: bool) -> None:
    """Of the summed gradients; and with one gradient alone whatever the shift."""
    ours, theirs = weights(), weights()
    optimizer = TwoMomenta(ours, lr=torch.tensor(0.1), momentum=0.9, delta=0.0 if apart else 0.05, weight_decay=0.01)
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(4):
        task, distillation = gradients(step), gradients(10 + step)
        for p, q, a, b in zip(ours, theirs, task, distillation, strict=True):
            p.grad, q.grad = a, a + b if apart else a.clone()
        if apart:
            optimizer.step_apart(task, distillation)
        else:
            optimizer.step()
        sgd.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_goes_on_from_its_state() -> None:
    ours = weights()
    optimizer = TwoMomenta(ours, lr=0.1, weight_decay=0.01)
    optimizer.step_apart(gradients(0), [gradients(1)[0], None])
    again = copy.deepcopy(ours)
    other = TwoMomenta(again, lr=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        each.step_apart([None, gradients(2)[1]], gradients(3))
    assert all(torch.equal(p, q) for p, q in zip(ours, again, strict=True))


@pytest.mark.parametrize(
    ("momentum", "delta", "stable"),
    [
        *((momentum, delta, True) for momentum, delta in [(0.25, 0.25), (0.25, -0.25), (0.0, 0.0), (0.5, 0.4375)]),
        *((momentum, delta, False) for momentum, delta in [(0.9, 0.1), (0.05, 0.075), (0.9, -0.1), (0.05, -0.075)]),
    ],
)
def test_momenta_are_from_zero_to_below_one(momentum: float, delta: float, stable: bool) -> None:
    with nullcontext() if stable else pytest.raises(ValueError, match="must be in"):
        (group,) = TwoMomenta(weights(), lr=0.1, momentum=momentum, delta=delta).param_groups
        assert (group["momentum"], group["delta"]) == (momentum, delta)


def test_method_brings_its_optimiser() -> None:
    assert DOT().needs.separate_gradients
    optimizer = DOT.optimizer(weights(), lr=0.1, momentum=0.8, weight_decay=0.5, method=DOT(delta=0.05))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["delta"]) == (0.1, 0.8, 0.5, 0.05)


def test_defaults_are_the_published_ones() -> None:
    (group,) = TwoMomenta(weights(), lr=0.1).param_groups
    assert (group["momentum"], group["delta"], group["weight_decay"]) == (0.9, 0.075, 0.0)


def test_closure_has_gradients() -> None:
    parameters = weights()
    before = parameters[0].detach().clone()

    def closure() -> float:
        loss = parameters[0].sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert TwoMomenta(parameters, lr=0.5).step(closure) == before.sum().item()
    torch.testing.assert_close(parameters[0].detach(), before - 0.5)


def test_objective() -> None:
    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        return 0.5 * F.cross_entropy(s.logits, target) + 7 * kd_loss(s.logits, t.logits, temperature=2.5)

    Objective(CASE, {"ce_weight": 0.5, "kd_weight": 7.0, "temperature": 2.5}).check(expected)


def test_a_momentum_that_its_optimizer_refuses_is_named() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ConfigError, match=r"^optimizer\.momentum=0, .*momentum - delta and momentum \+ delta must be"):
        build_optimizer(Optimizer(momentum=0.0), parameters, DOT())
