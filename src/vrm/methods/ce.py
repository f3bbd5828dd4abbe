"""Cross entropy alone: the student without a teacher, the baseline of every comparison.

    L = CE(z, y)

With ``views=2`` the student sees the virtual view too, ``L = (CE(z_r, y) + CE(z_v, y)) / 2``. This costs the student as
much as a two-view method, without its teacher.
"""

from __future__ import annotations

from vrm.contract import Batch, Losses, Method, Needs, Progress, Term, Views
from vrm.divergences import cross_entropy


class CrossEntropy(Method):
    """Train on labels alone."""

    title = "Cross entropy (no teacher)"
    venue = "-"
    year = 1989
    family = "logit"

    @property
    def needs(self) -> Needs:
        """No teacher."""
        return Needs(teacher=False)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return the task term."""
        return Losses(ce=Term(cross_entropy(student.real.logits, batch.target), role="task"))
