"""Timing one step: what is timed, that it is the step of training, its bare networks, its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.runs.own import Net, Pixels, own
from tests.runs.small import go_on, opened
from vrm.bench import step_time
from vrm.bench.inputs import load_images, place_images
from vrm.bench.peak_memory import measure_peak_memory
from vrm.bench.step_time import (
    BareNetworks,
    BareTimings,
    Timings,
    build_step_of_phase,
    prepare_subject,
    time_calls,
    whole_batches,
)
from vrm.bench.subjects import Subject, resolve_run
from vrm.config import Run, resolve
from vrm.engine.cuda_graphs import WARMUP
from vrm.runs.assembly import assemble

from .small import QUIET, TINY, settings


def test_the_clock_tells_milliseconds_of_each_call() -> None:
    pauses = iter((0.02, 0.04, 0.02))
    found = time_calls(lambda: time.sleep(next(pauses)), torch.device("cpu"), times=3)
    assert len(found) == 3
    assert found[0] >= 20
    assert found[1] >= 40
    assert max(found) < 400


def run_of(*words: str) -> Run:
    """Settings of a run."""
    return resolve_run("digits", ["pair=resnet8/resnet8", *words], "kd")


def test_turns_leave_out_what_warms_up_and_count_their_calls() -> None:
    numbers: list[int] = []
    timings = Timings(numbers.append, run_of())
    for _ in range(3):
        timings.add_round(torch.device("cpu"), steps=2, warmup=1)
    assert numbers == [0, 1, 2] * 3
    assert [len(each) for each in timings.rounds] == [2, 2, 2]
    assert len(timings.all) == 6


rounds = st.lists(st.lists(st.floats(0.1, 100), min_size=1, max_size=5), min_size=1, max_size=5)


@given(rounds, st.floats(0.1, 50))
def test_a_ratio_is_blind_to_drift(found: list[list[float]], factor: float) -> None:
    """Each round may be as slow as it likes, if it is so for both."""
    run = run_of()
    one = Timings(lambda number: None, run, found)
    other = Timings(lambda number: None, run, [[factor * value for value in values] for values in found])
    assert other.over(one) == pytest.approx(factor)
    assert one.over(other) == pytest.approx(1 / factor)
    assert one.over(one) == 1
    assert one.over(None) is None


@pytest.mark.parametrize(("views", "passes"), [(1, 1), (2, 2)])
def test_bare_networks_make_the_steps_passes_and_nothing_else(
    examples: None, tmp_path: Path, views: int, passes: int
) -> None:
    assembly = own(tmp_path, Net(), Pixels(), method="example", views=views)
    student, teacher = assembly.student.network, assembly.teacher.teacher.network  # type: ignore[union-attr]
    step = build_step_of_phase(assembly, 1)
    batch = whole_batches(assembly, 1)[0]
    images = step.views(*batch)
    assert len(images) == passes
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, network in (("student", student), ("teacher", teacher)):
        network.register_forward_pre_hook(lambda module, inputs, name=name: seen[name].append(inputs[0]))
    BareNetworks(assembly, images, step.autocast)()
    bare = {name: list(tensors) for name, tensors in seen.items()}
    assert all(p.grad is None for p in student.parameters())
    for tensors in seen.values():
        tensors.clear()
    step(*batch)
    assert {name: len(tensors) for name, tensors in seen.items()} == {"student": passes, "teacher": passes}
    for name, tensors in seen.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, bare[name], strict=True))


def test_bare_networks_follow_the_phase(examples: None, tmp_path: Path) -> None:
    for position, trains in ((0, False), (1, True)):
        assembly = own(tmp_path, Net(), Pixels(), method="example")
        step = build_step_of_phase(assembly, position)
        bare = BareNetworks(assembly, step.views(*whole_batches(assembly, 1)[0]), step.autocast)
        assert bool(bare.parameters) is trains
        assert ("student" in step.phase.trained) is trains
        bare()


def test_a_step_is_the_one_that_training_takes(examples: None, tmp_path: Path) -> None:
    """Its weights after a batch are those that the loop has after its first step."""
    words = ["student=resnet8", "method=alone", "data.labels_per_class=2", "batch_size=8", "threads=1"]
    run = resolve("distill", "digits", [*words, "steps=1", "schedule.warmup_epochs=0", f"run={tmp_path / 'r'}"]).run
    assembly = assemble(run)
    step = build_step_of_phase(assembly)
    step(*whole_batches(assembly, 1)[0])
    trained = assemble(run)
    with opened(trained) as trainer:
        go_on(trainer)
    one, other = (each.student.network.state_dict() for each in (assembly, trained))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_steps_are_recorded_where_training_records_them(examples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recorder that notes what it is given, in the place of CUDA graphs."""
    kept: list[Callable[..., None]] = []
    replayed: list[int] = []

    class Tape:
        def __init__(self, device: torch.device) -> None:
            kept.clear()

        def run(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
            function(*inputs)

        def record(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
            kept.append(function)

            def replay() -> None:
                replayed.append(1)
                function(*inputs)

            return replay

    monkeypatch.setattr(step_time, "CudaGraphRecorder", Tape)
    monkeypatch.setattr(step_time, "why_eager", lambda assembly: None)
    run = resolve_run("digits", TINY, "alone")
    dataset, _ = place_images(load_images(run.data, settings(), QUIET), run)
    bares: BareTimings = {}
    found = prepare_subject(Subject("alone", run), dataset, bare_timings=bares)
    assert found.eager_because is None
    assert [type(function).__name__ for function in kept] == ["Step", "BareNetworks"]
    assert len(replayed) == 2, f"the call that records, behind {WARMUP} that do not"
    found.timings.add_round(torch.device("cpu"), steps=3, warmup=1)
    assert len(replayed) == 6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is told by Linux")
def test_memory_is_that_of_a_process_of_its_own() -> None:
    words = ("pair=resnet8/resnet8", "data.labels_per_class=20", "threads=1")
    found = {}
    for batch in (16, 160):
        run = resolve_run("digits", [*words, f"batch_size={batch}", "data.size=32"], "ce")
        found[batch], note = measure_peak_memory(Subject("ce", run), settings())
        assert note == ""
    activations = 144 * 32 * 32 * 16 * 4  # of one convolution alone
    assert found[160] - found[16] > activations  # type: ignore[operator]
    assert 0 < found[16] < 2**30  # type: ignore[operator]


def test_memory_that_cannot_be_told_is_explained() -> None:
    run = resolve_run("digits", TINY, "ce")
    lost = run.model_copy(update={"student": run.student.model_copy(update={"name": "resnet9"})})
    found, note = measure_peak_memory(Subject("ce", lost), settings())
    assert found is None
    assert "unknown network 'resnet9'" in note
