"""The optimiser of a run, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vrm import config
from vrm.contract import Method, Phase


def build_optimizer(
    settings: config.Optimizer, parameters: Iterable[nn.Parameter], method: Method
) -> torch.optim.Optimizer:
    """Return the run's optimiser, or the method's own.

    The learning rate is a scalar on the device, and all state exists from the start. Raise ``ConfigError`` for settings
    that the method's optimiser refuses.
    """
    chosen = list(parameters)
    lr = torch.tensor(settings.lr, device=chosen[0].device)
    optimizer: torch.optim.Optimizer
    if method.optimizer is not None:
        try:
            optimizer = type(method).optimizer(  # type: ignore[misc]
                chosen, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay, method=method
            )
        except ValueError as error:
            raise config.ConfigError(
                f"optimizer.momentum={settings.momentum:g}, optimizer.weight_decay={settings.weight_decay:g}: the "
                f"method's own optimizer refuses them: {error}"
            ) from None
    elif settings.name == "sgd":
        optimizer = torch.optim.SGD(
            chosen,
            lr=lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    else:
        optimizer = torch.optim.AdamW(
            chosen,
            lr=lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
            capturable=True,  # only declares that a CUDA graph may record it
        )
    _create_state(optimizer)
    return optimizer


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimiser create its buffers, by a step at rate zero, and clear them: a first step assumes zero momenta.

    So the guard can restore them after a non-finite first step, and a recorded step finds them in place.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"].zero_()
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"].fill_(rate)


def learning_rate(
    settings: config.Schedule, base: float, phase: Phase, *, epoch: int, step: int, epochs: int, steps_per_epoch: int
) -> float:
    """Return the learning rate of a step; ``epoch`` counts from 1 and ``step`` from 0 within a phase of ``epochs``.

    With a step schedule the rate drops *after* each milestone, as in the literature: epoch 150 still has the old rate.
    """
    if phase.schedule == "constant":
        return base
    warmup = settings.warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * (step + 1) / warmup
    if settings.name == "step":
        return base * settings.gamma ** sum(epoch > milestone for milestone in settings.milestones)
    share = (step - warmup) / max(epochs * steps_per_epoch - warmup, 1)
    return settings.min_lr + (base - settings.min_lr) * (1 + math.cos(math.pi * share)) / 2
