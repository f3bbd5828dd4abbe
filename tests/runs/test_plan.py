"""A plan agrees with counting every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrm.config import resolve
from vrm.contract import Phase
from vrm.runs.plan import Plan, lay_out


def simulate(phases: list[Phase], epochs: int, num_samples: int, batch_size: int) -> list[tuple[int, Phase, int, bool]]:
    """Each step's epoch, its phase, the images visited with it, and whether it is the last of its epoch."""
    steps, epoch, images = [], 0, 0
    for phase in phases:
        for _ in range(phase.epochs or epochs):
            epoch += 1
            left = num_samples
            while left:
                taken = min(batch_size, left)
                images, left = images + taken, left - taken
                steps.append((epoch, phase, images, left == 0))
    return steps


@given(st.data())
def test_a_plan_is_what_a_simulation_counts(data: st.DataObject) -> None:
    before = data.draw(st.lists(st.integers(1, 3), max_size=2))
    behind = data.draw(st.lists(st.integers(1, 3), max_size=1))
    epochs, num_samples, batch_size = (data.draw(st.integers(1, most)) for most in (4, 20, 8))
    steps = data.draw(st.none() | st.integers(1, 100))
    words = ["student=resnet8", "method=ce", f"epochs={epochs}", f"batch_size={batch_size}", "run=nowhere"]
    run = resolve("distill", "digits", words + [f"steps={steps}"] * (steps is not None)).run
    lengths = [*before, None, *behind]
    phases = [Phase(f"phase {number}", epochs=length) for number, length in enumerate(lengths)]
    plan = Plan.of(run, phases, num_samples)

    simulated = simulate(phases, epochs, num_samples, batch_size)
    last = min(len(simulated), steps or len(simulated))
    assert plan.last_step == last
    assert plan.num_steps == len(simulated)
    assert plan.num_epochs == simulated[-1][0]
    assert plan.extra_epochs == sum(before) + sum(behind)
    assert plan.epochs_touched == simulated[last - 1][0]
    assert plan.images_after(0) == 0
    for step, (epoch, phase, images, at_end) in enumerate(simulated):
        assert plan.epoch_at(step) == epoch
        stretch = plan.stretch_at(epoch)
        assert stretch.phase is phase
        assert stretch.first <= epoch < stretch.first + stretch.epochs
        assert plan.phase_before(step + 1) is phase
        assert plan.images_after(step + 1) == images
        assert plan.ends_epoch(step + 1) == (at_end or step + 1 == last)


@pytest.mark.parametrize(
    ("steps", "num_test", "expected"),
    [
        (2, 10_000, 256),
        (2, 257, 256),
        (2, 256, None),
        (5, 10_000, 320),
        (32, 10_000, 2000),
        (157, 10_000, 9856),
        (157, 9856, None),
        (160, 10**6, None),
        (None, 10**6, None),
    ],
)
def test_a_run_that_is_stopped_early_is_measured_on_what_it_trains_on(
    steps: int | None, num_test: int, expected: int | None
) -> None:
    """Five epochs of 2,000 images in 32 batches: 160 steps."""
    words = ["student=resnet8", "method=ce", "epochs=5", "batch_size=64", "run=nowhere"]
    run = resolve("distill", "digits", words + [f"steps={steps}"] * (steps is not None)).run
    assert Plan.of(run, [Phase("main")], 2000).test_sample(num_test) == expected


@pytest.mark.parametrize("lengths", [(), (1,), (None, None), (None, 1, None)])
def test_exactly_one_phase_leaves_its_epochs_to_the_run(lengths: tuple[int | None, ...]) -> None:
    with pytest.raises(ValueError, match="exactly one phase must leave its number of epochs to the run"):
        lay_out([Phase("a", epochs=length) for length in lengths], 3)
