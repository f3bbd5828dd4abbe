"""The shares of a step's parts, and how much it starts."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import record_function

from vrm.bench import step_profile
from vrm.bench.step_profile import PARTS, profile_step, shares_of_host_time, shares_of_kernel_time


def span(name: str, start: float, end: float, parent: Any = None) -> Any:
    """An event as the profiler has them."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
        cpu_parent=parent,
    )


def test_shares_of_time_are_each_parts_own_and_add_up() -> None:
    """Nested parts, also within an operator, are taken off the part around them; what has no label is ``other``."""
    whole = span("bench/step", 0, 100)
    views, student = span("vrm/views", 5, 15, whole), span("vrm/student", 20, 80, whole)
    operator = span("aten::mm", 30, 70, student)
    spans = [whole, views, student, span("vrm/loss", 40, 60, operator), span("vrm/unheard-of", 85, 90, whole)]
    found = shares_of_host_time(spans)
    assert tuple(found) == PARTS
    expected = {"views": 0.1, "student": 0.4, "loss": 0.2, "other": 0.3}
    assert found == pytest.approx(dict.fromkeys(PARTS, 0.0) | expected)


def test_labels_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the profiler has spans of labels, also of PyTorch's own, as if they had been launched."""

    def event(name: str, where: str, start: float, end: float, *launched: tuple[str, float]) -> Any:
        found = span(name, start, end)
        found.device_type = SimpleNamespace(name=where)
        found.is_user_annotation = "::" not in name and name != "gemm"
        found.kernels = [SimpleNamespace(name=name, duration=duration) for name, duration in launched]
        return found

    own = "Optimizer.step#SGD.step"
    events = [
        event("bench/step", "CPU", 0, 9, ("bench/step", 7)),
        event("vrm/optimizer", "CPU", 1, 8, ("vrm/optimizer", 6)),
        event(own, "CPU", 2, 8, (own, 5)),
        event("aten::mm", "CPU", 3, 4, ("gemm", 4), (own, 5)),
        *(event(name, "CUDA", 3, 8) for name in ("bench/step", "vrm/optimizer", own)),
        event("gemm", "CUDA", 4, 8),
    ]
    watched = contextlib.nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(step_profile, "profile", lambda activities: watched)
    shares, launches = profile_step(lambda number: None, torch.device("cuda"), repeats=1)
    assert launches == 1
    assert shares["optimizer"] == 1


@given(st.lists(st.tuples(st.floats(0, 12), st.floats(0, 5)), max_size=10), st.floats(0, 5))
def test_shares_of_kernels_go_to_the_part_that_launched_them(
    launched: list[tuple[float, float]], unseen: float
) -> None:
    """Also those of other threads, as a backward pass has them; and those nobody launched in a part go to the rest."""
    whole = span("bench/step", 0, 12)
    student = span("vrm/student", 1, 5, whole)
    spans = [whole, student, span("vrm/loss", 3, 4, student), span("vrm/backward", 6, 10, whole)]
    busy = sum(duration for _, duration in launched) + unseen + 1e-3
    found = shares_of_kernel_time(spans, launched, busy)
    assert sum(found.values()) == pytest.approx(1)
    inside = {
        "loss": lambda t: 3 <= t <= 4,
        "student": lambda t: 1 <= t <= 5 and not 3 <= t <= 4,
        "backward": lambda t: 6 <= t <= 10,
    }
    for part, belongs in inside.items():
        expected = sum(duration for moment, duration in launched if belongs(moment))
        assert found[part] * busy == pytest.approx(expected, abs=1e-9)


def test_a_profiled_step_tells_its_parts_and_operators() -> None:
    x = torch.ones(4, 4)

    def call(number: int) -> None:
        with record_function("vrm/views"):
            time.sleep(0.02)
        with record_function("vrm/student"):
            time.sleep(0.01)
            with record_function("vrm/loss"):
                F.linear(x, x).sum()  # two operators, with others within
                time.sleep(0.04)
        time.sleep(0.01)
        x.mul(2)

    found, operators = profile_step(call, torch.device("cpu"), repeats=2)
    assert operators == 3
    assert sum(found.values()) == pytest.approx(1)
    assert found["loss"] > found["views"] > found["student"] > found["backward"] == 0
    assert found["other"] > 0.05
