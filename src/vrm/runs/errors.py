"""How a run can end other than by finishing. Each message says what happened and what to do."""

from __future__ import annotations


class RunError(ValueError):
    """A run, or a run folder, that cannot be used as asked."""

    exit_code = 2


class NonFinite(RuntimeError):
    """Training met NaN or infinity; the weights are those of the last finite step."""

    exit_code = 1


class Preempted(Exception):
    """The run was told to stop by a signal; it wrote a checkpoint and can be resumed."""

    exit_code = 75
