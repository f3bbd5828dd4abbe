"""DOT: Zhao, Cui, Song, Liang, "DOT: A Distillation-Oriented Trainer", ICCV 2023.

An optimiser with two momenta, here on top of KD. With the gradients of the weighted task loss and of the weighted
distillation loss from one forward pass, parameters ``p``, momentum ``m``, rate ``lr``, weight decay ``w``:

    v_task <- (m - delta) * v_task + grad_task + w * p
    v_kd   <- (m + delta) * v_kd   + grad_kd
    p      <- p - lr * (v_task + v_kd)

Weight decay enters once, with the task. A parameter with but one of the gradients keeps the momentum ``m`` and is
decayed, save for the first step of one with a distillation gradient alone: as released, and followed. In a steady
state the gradients are amplified by ``1 / (1 - m + delta)`` and ``1 / (1 - m - delta)``: 5.7 and 40 for the published
0.9 and 0.075, 10 each for delta 0.

    L = ce_weight * CE(s, y) + kd_weight * T^2 * mean_b KL(softmax(t_b / T) || softmax(s_b / T))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vrm.contract import Batch, Losses, Method, Needs, Progress, Term, Views
from vrm.divergences import cross_entropy, soft_kl


class TwoMomenta(torch.optim.Optimizer):
    """SGD with a momentum of its own for the task's and for the distillation's gradient. As released.

    Args:
        params: parameters, or parameter groups.
        lr: learning rate, a number or a scalar tensor.
        momentum: m, in [0, 1).
        delta: shift of both momenta, such that both stay in [0, 1).
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
        """Add a group with zero momenta. A first step from there copies the gradient, as the released one does."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = {
                "task_momentum": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "distillation_momentum": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "distilled": torch.zeros((), dtype=parameter.dtype, device=parameter.device),  # 1 after such a gradient
            }

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step with but one gradient, ``.grad``: plain SGD with momentum m and weight decay."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        task = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        self.step_apart(task, [None] * len(task))
        return loss

    @torch.no_grad()
    def step_apart(self, task: Sequence[Tensor | None], distillation: Sequence[Tensor | None]) -> None:
        """One step. ``task`` and ``distillation``: a gradient or ``None`` for each parameter, in the groups' order."""
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
    """The optimiser of :class:`DOT`, for its ``delta``."""
    return TwoMomenta(params, lr=lr, momentum=momentum, weight_decay=weight_decay, delta=method.delta)


class DOT(Method):
    """KD whose distillation gradient gathers more momentum than the task's."""

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
        """``delta`` shifts the momenta; ``temperature`` softens both networks; the weights multiply the two terms."""
        super().__init__()
        if not 0 <= delta < 1:
            raise ValueError(f"delta must be in [0, 1), below 1 - momentum and at most momentum, got {delta}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.delta = delta
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight

    @property
    def needs(self) -> Needs:
        """Logits, and the gradients of the two terms apart."""
        return Needs(separate_gradients=True)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Task term and distillation term."""
        s, t = student.real.logits, teacher.real.logits.detach()
        loss = soft_kl(s, t, temperature=self.temperature).mean()
        return Losses(
            ce=Term(cross_entropy(s, batch.target), self.ce_weight, "task"),
            kd=Term(self.temperature**2 * loss, self.kd_weight),
        )
