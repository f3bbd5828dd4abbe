"""DOT: Zhao, Cui, Song, Liang, "DOT: A Distillation-Oriented Trainer", ICCV 2023.

This is an optimiser with two momenta, here on top of KD. One forward pass gives the gradients of the weighted task loss
and of the weighted distillation loss. With parameters ``p``, momentum ``m``, rate ``lr`` and weight decay ``w``:

    v_task <- (m - delta) * v_task + grad_task + w * p
    v_kd   <- (m + delta) * v_kd   + grad_kd
    p      <- p - lr * (v_task + v_kd)

Weight decay enters once, with the task. A parameter that has only one of the two gradients keeps the momentum ``m`` and
is decayed, except in the first step of a parameter with a distillation gradient alone: as released. In a steady state
the gradients are amplified by ``1 / (1 - m + delta)`` and ``1 / (1 - m - delta)``: by 5.7 and 40 for the published 0.9
and 0.075, and by 10 each for delta 0.

    L = ce_weight * CE(s, y) + kd_weight * T^2 * mean_b KL(softmax(t_b / T) || softmax(s_b / T))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Needs, Progress, Term, Views
from vrm.divergences import check_temperature, cross_entropy, soft_kl


class TwoMomenta(torch.optim.Optimizer):
    """SGD with separate momenta for the gradients of the task and of distillation, as released.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate, a number or a scalar tensor.
        momentum: m, in [0, 1).
        delta: shift of the two momenta; both must stay in [0, 1).
        weight_decay: w.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | Tensor,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
    ) -> None:
        if not (0 <= momentum - delta < 1 and 0 <= momentum + delta < 1):
            raise ValueError(
                f"momentum - delta and momentum + delta must be in [0, 1), got momentum {momentum} and delta {delta}; "
                "beyond, the momentum of the distillation gradient grows without bound"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with zero momenta, from which a first step copies the gradient, as the released code does."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = {
                "task_momentum": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "distillation_momentum": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "distilled": torch.zeros((), dtype=parameter.dtype, device=parameter.device),  # 1 after the first
            }

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step with one gradient, ``.grad``: plain SGD with momentum m and weight decay."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        task = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        self.step_apart(task, [None] * len(task))
        return loss

    @torch.no_grad()
    def step_apart(self, task: Sequence[Tensor | None], distillation: Sequence[Tensor | None]) -> None:
        """Take a step.

        ``task`` and ``distillation`` hold a gradient or None for each parameter, in the order of the groups.
        """
        places = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for (group, parameter), of_task, of_distillation in zip(places, task, distillation, strict=True):
            state = self.state[parameter]
            shift = group["delta"] if of_task is not None and of_distillation is not None else 0.0
            decay = group["weight_decay"] * parameter
            if of_task is not None:
                momentum = state["task_momentum"].mul_(group["momentum"] - shift).add_(of_task + decay)
                parameter.sub_(group["lr"] * momentum)
            if of_distillation is not None:
                gradient = of_distillation if of_task is not None else of_distillation + state["distilled"] * decay
                momentum = state["distillation_momentum"].mul_(group["momentum"] + shift).add_(gradient)
                parameter.sub_(group["lr"] * momentum)
                state["distilled"].fill_(1)


def _two_momenta(
    params: Iterable[Any], *, lr: float | Tensor, momentum: float, weight_decay: float, method: DOT
) -> torch.optim.Optimizer:
    """Return the optimiser of :class:`DOT` for its ``delta``."""
    return TwoMomenta(params, lr=lr, momentum=momentum, weight_decay=weight_decay, delta=method.delta)


class DOT(Method):
    """Give the distillation gradient of KD more momentum than the task's."""

    title = "DOT: A Distillation-Oriented Trainer"
    venue = "ICCV"
    year = 2023
    family = "logit"
    published: ClassVar = {
        "cifar100": {"*": {"delta": 0.075, "temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}},
        "tinyimagenet": {"*": {"delta": 0.075, "temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}},
        "imagenet": {"*": {"delta": 0.09, "temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5}},
    }
    optimizer = staticmethod(_two_momenta)

    def __init__(
        self, delta: float = 0.075, temperature: float = 4.0, ce_weight: float = 0.1, kd_weight: float = 0.9
    ) -> None:
        """Set the options.

        Args:
            delta: how much the momentum of distillation is raised and that of the task lowered.
            temperature: softens the predictions of both networks.
            ce_weight: weight of the cross entropy.
            kd_weight: weight of the distillation term.
        """
        super().__init__()
        if not 0 <= delta < 1:
            raise ValueError(f"delta must be in [0, 1), and also below 1 - momentum and at most momentum; got {delta}")
        check_temperature(temperature)
        self.delta = delta
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight

    @property
    def needs(self) -> Needs:
        """Logits, and the gradients of the two terms separately."""
        return Needs(separate_gradients=True)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term and the distillation term."""
        s, t = student.real.logits, teacher.real.logits.detach()
        loss = soft_kl(s, t, temperature=self.temperature).mean()
        return Losses(
            ce=Term(cross_entropy(s, batch.target), self.ce_weight, "task"),
            kd=Term(self.temperature**2 * loss, self.kd_weight),
        )
