from __future__ import annotations

import pytest
import torch
from torch import nn

from vrm.bench.method_cost import measure_cost
from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Phase, Probe, Progress, Term, Views


class Costly(Method):
    """All that costs something: two views, two gradients, epochs of its own, a bank, a layer on the first stage."""

    @property
    def needs(self) -> Needs:
        taps = ("stage1",)
        return Needs(virtual_views=1, student_taps=taps, teacher_taps=taps, separate_gradients=True)

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("first", 7, terms=("logits",)), Phase(terms=("layer",)))

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        self.layer = nn.Conv2d(student.channels("stage1"), teacher.channels("stage1"), 3, padding=1, bias=False)
        self.register_buffer("bank", torch.zeros(data.num_samples, 4))

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        if progress.phase == "first":
            return Losses(logits=Term((student.real.logits - teacher.real.logits).square().mean()))
        layers = [self.layer(view.taps["stage1"]) for view in student.each()]
        return Losses(layer=Term(torch.stack(layers).mean()))


class Free(Method):
    """Labels alone."""

    needs = Needs(teacher=False)  # type: ignore[assignment]

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        return Losses(ce=Term(nn.functional.cross_entropy(student.real.logits, batch.target), role="task"))


def test_costs_on_the_reference_pair() -> None:
    found = measure_cost(Costly())
    assert (found.passes, found.backward_passes) == (2, 4)
    layer = 64 * 2 * 64 * 64 * 9 * 32 * 32  # of a batch: multiplications and additions; twice as many backward
    student_pass = 64 * 3 * 354.1e6  # as `vrm models resnet8x4` tells; its first layer passes no gradient on
    assert found.work == pytest.approx(2 * 3 * layer / student_pass, rel=0.01)
    assert str(found) == f"2 student passes, 4 backward passes, loss {100 * found.work:.0f} % of a pass"


def test_what_costs_nothing_is_left_out() -> None:
    assert str(measure_cost(Free())) == "1 student pass"
