"""When what happens: the phases of a run laid out over its epochs and steps, computed once and carried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vrm.config import Run
from vrm.contract import Phase

SMALLEST_SAMPLE = 256
"""Test images on which a run that is stopped early measures its networks at least."""


@dataclass(frozen=True)
class Stretch:
    """A phase placed in the run: ``first`` is its first epoch (from 1, over the whole run), ``epochs`` how many."""

    phase: Phase
    first: int
    epochs: int


def lay_out(phases: Sequence[Phase], epochs: int) -> tuple[Stretch, ...]:
    """Lay phases one after the other; the one without a number of epochs gets the run's own ``epochs``.

    Raise ``ValueError`` unless exactly one phase leaves its number of epochs to the run.
    """
    if sum(phase.epochs is None for phase in phases) != 1:
        raise ValueError("exactly one phase must leave its number of epochs to the run (epochs=None)")
    stretches: list[Stretch] = []
    first = 1
    for phase in phases:
        stretches.append(Stretch(phase, first, phase.epochs or epochs))
        first += stretches[-1].epochs
    return tuple(stretches)


@dataclass(frozen=True)
class Plan:
    """The course of a run. Epochs count from 1 over the whole run, steps from 0.

    ``num_steps`` are those of all epochs; ``last_step`` is where the run ends, earlier where ``steps`` asks for it.
    """

    stretches: tuple[Stretch, ...]
    num_samples: int
    batch_size: int
    last_step: int

    @staticmethod
    def of(run: Run, phases: Sequence[Phase], num_samples: int) -> Plan:
        """Plan a run over so many training images. Raise ``ValueError`` as :func:`lay_out` does."""
        whole = Plan(lay_out(phases, run.epochs), num_samples, run.batch_size, 0)
        last_step = min(whole.num_steps, run.steps or whole.num_steps)
        return Plan(whole.stretches, num_samples, run.batch_size, last_step)

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in an epoch, a smaller last one included."""
        return -(-self.num_samples // self.batch_size)

    @property
    def num_epochs(self) -> int:
        """The epochs of all phases."""
        return sum(stretch.epochs for stretch in self.stretches)

    @property
    def extra_epochs(self) -> int:
        """The epochs that phases add to the run's own."""
        return sum(stretch.phase.epochs or 0 for stretch in self.stretches)

    @property
    def num_steps(self) -> int:
        """The steps of all epochs."""
        return self.num_epochs * self.steps_per_epoch

    @property
    def epochs_touched(self) -> int:
        """The epochs that are begun before ``last_step``."""
        return -(-self.last_step // self.steps_per_epoch)

    def epoch_at(self, step: int) -> int:
        """Return the epoch to which a step belongs."""
        return step // self.steps_per_epoch + 1

    def stretch_at(self, epoch: int) -> Stretch:
        """Return the stretch to which an epoch belongs; after the end, the last one."""
        return next((s for s in self.stretches if s.first <= epoch < s.first + s.epochs), self.stretches[-1])

    def phase_before(self, step: int) -> Phase:
        """Return the phase in which the last step before ``step`` was taken."""
        return self.stretch_at(self.epoch_at(max(step - 1, 0))).phase

    def ends_epoch(self, step: int) -> bool:
        """Return whether an epoch, or the run, ends when ``step`` steps are done."""
        return step % self.steps_per_epoch == 0 or step == self.last_step

    def test_sample(self, num_test: int) -> int | None:
        """Return on how many of the test images networks are measured; None for all of them.

        A run that ``steps`` stops early is tried on no more images than it trains on, but on ``SMALLEST_SAMPLE``.
        """
        count = max(SMALLEST_SAMPLE, self.images_after(self.last_step))
        return count if self.last_step < self.num_steps and count < num_test else None

    def images_after(self, step: int) -> int:
        """Return how many training images ``step`` steps have visited."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.num_samples + min(steps * self.batch_size, self.num_samples)
