"""Undo a step that met NaN or infinity, and note which it was; the loss scale; averaged weights. All on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

LARGEST = 1e18
"""A gradient beyond it counts as infinite: momenta, AdamW's squares or weights would soon overflow."""


def largest_value(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest absolute value in ``tensors``, a scalar on their device; NaN if they hold one."""
    return nn.utils.get_total_norm(tensors, float("inf"))


class Guard:
    """Takes back a step whose loss, gradients or buffers are not finite.

    An optimiser that knows ``found_inf``, as PyTorch's fused ones do, leaves parameters and momenta alone in such a
    step. The other tensors that a step changes (batch-norm statistics, banks; with other optimisers parameters and
    momenta too) are copied before it, and after it the old or the new values are chosen on the device.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Watch everything that a step of ``optimizer`` on ``module`` can change."""
        self.optimizer = optimizer
        self.skips = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        live = [*module.buffers()]
        if not self.skips:
            live += [p.detach() for p in module.parameters() if p.requires_grad]
            live += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        # As integers of the same width, the choice between old and new is plain arithmetic: exact for any bits, and a
        # single kernel for all tensors of a type (torch.where has no foreach form).
        self.live = _by_type([_as_integers(tensor) for tensor in live])
        self.saved = [[w.clone() for w in group] for group in self.live]
        # Statistics can overflow in a step whose loss is finite. Buffers that hold infinities already, such as masks,
        # do so on purpose and are not judged.
        floating = [b for b in module.buffers() if b.is_floating_point() and b.numel()]
        self.judged = [b for b in floating if bool(torch.isfinite(b).all())]

    def save(self) -> None:
        """Copy the state before the step."""
        for saved, live in zip(self.saved, self.live, strict=True):
            torch._foreach_copy_(saved, live)

    def judge(self, loss: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        """Return whether the loss, the gradients and the buffers after the step are finite, a boolean scalar."""
        # of one type, as others would be converted one by one
        return (largest_value([loss.float(), *self.judged]) < math.inf) & (largest_value(gradients) <= LARGEST)

    def announce(self, finite: Tensor) -> None:
        """Let the optimiser, before it updates, skip a step that is not ``finite`` (a boolean scalar)."""
        if self.skips:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]

    def commit(self, finite: Tensor) -> None:
        """Keep the new state if ``finite`` holds, else restore the old one: ``old + (new - old) * finite``."""
        for saved, live in zip(self.saved, self.live, strict=True):
            torch._foreach_sub_(live, saved)
            torch._foreach_mul_(live, finite.to(live[0].dtype))
            torch._foreach_add_(live, saved)


def _by_type(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors by type: an operation on all tensors of a group is a single kernel."""
    return [[x for x in tensors if x.dtype == dtype] for dtype in dict.fromkeys(x.dtype for x in tensors)]


def _as_integers(tensor: Tensor) -> Tensor:
    """Return a view of the memory as integers, whose arithmetic wraps around: ``old + (new - old)`` is exact."""
    return tensor.view(INTEGERS[tensor.element_size()]) if tensor.dtype not in INTEGERS.values() else tensor


class Incident:
    """The first non-finite step since the last reading: its number, its samples and its loss terms."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        """Start without an incident."""
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.index = torch.full((batch_size,), -1, dtype=torch.int64, device=device)
        self.terms: dict[str, Tensor] = {}

    def note(self, bad: Tensor, step: Tensor, index_B: Tensor, names: Sequence[str], value_N: Tensor) -> None:
        """Keep this step and its terms (float64) if it is the first that is ``bad``."""
        first = bad & (self.step < 0)
        self.step.copy_(torch.where(first, step, self.step))
        index = F.pad(index_B, (0, len(self.index) - len(index_B)), value=-1)
        self.index.copy_(torch.where(first, index, self.index))
        for name in names:
            if name not in self.terms:
                self.terms[name] = torch.zeros((), dtype=torch.float64, device=value_N.device)
        kept = [self.terms[name] for name in names]
        torch._foreach_copy_(kept, list(torch.where(first, value_N, torch.stack(kept)).unbind()))

    def read(self) -> tuple[int, list[int], dict[str, float]]:
        """Return step (from 0), sample indices and loss terms, and reset. Wait for the device."""
        found = int(self.step), [i for i in self.index.tolist() if i >= 0], {n: float(v) for n, v in self.terms.items()}
        self.step.fill_(-1)
        return found


@dataclass
class LossScale:
    """Keeps float16 gradients in range: it is halved when they overflow and doubled after a streak without overflow.

    The rule and its numbers are those of :class:`torch.amp.GradScaler`, which would wait for the device.
    """

    value: Tensor
    streak: Tensor

    GROWTH_INTERVAL = 2000

    @classmethod
    def at_start(cls, device: torch.device) -> LossScale:
        """Return the first scale, 2^16."""
        return cls(torch.full((), 2.0**16, device=device), torch.zeros((), dtype=torch.int64, device=device))

    def update(self, finite: Tensor) -> None:
        """Adapt the scale after a step whose gradients were ``finite`` or not."""
        grown = self.streak + 1 == self.GROWTH_INTERVAL
        self.value.mul_(torch.where(finite, torch.where(grown, 2.0, 1.0), 0.5))
        self.streak.copy_(torch.where(finite & ~grown, self.streak + 1, 0))


class Average:
    """An exponential moving average of a network's parameters; its buffers are copied."""

    def __init__(self, network: nn.Module, average: nn.Module, decay: float) -> None:
        """Keep the average in ``average``, a copy of ``network`` in eval mode; ``decay`` lies in (0, 1)."""
        self.network = network
        self.average = average.eval().requires_grad_(False)
        self.decay = decay
        self.live = [p.detach() for p in network.parameters()]
        self.mean = [p.detach() for p in self.average.parameters()]
        groups = (_by_type(list(each.buffers())) for each in (self.average, network))
        self.buffers = list(zip(*groups, strict=True))

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Move towards the network, unless the step was taken back (``finite`` is false)."""
        share = finite * (1 - self.decay)  # a tensor in a product: foreach_lerp would read a number from the device
        change = torch._foreach_sub(self.live, self.mean)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(self.mean, change)  # a frozen parameter stays the same to the last bit
        for means, lives in self.buffers:
            torch._foreach_copy_(means, lives)
