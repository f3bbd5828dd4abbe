"""Where a step spends its time: the share of each of its parts, and how many kernels or operators it starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("views", "teacher", "student", "loss", "backward", "optimizer", "guard", "measure", "other")
"""The parts of a step, in its order: the labels ``vrm/PART`` in :mod:`vrm.engine.step`, and ``other`` without label."""

STEP, PREFIX = "bench/step", "vrm/"


def profile_step(
    call: Callable[[int], None], device: torch.device, *, repeats: int
) -> tuple[dict[str, float], int | None]:
    """Return each part's share of a step, which sum to 1, and how many kernels (on the CPU: operators) a step starts.

    ``call(number)`` takes an eager step; PyTorch's profiler watches ``repeats`` of them. On CUDA the shares are of the
    time that kernels ran, each counted to the part that launched it; on the CPU they are of the whole time. Return
    ``({}, None)`` if the profiler is not allowed to see kernels.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # without a GPU it would warn that there is none
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as found:
        for number in range(repeats):
            with record_function(STEP):
                call(number)
        if cuda:
            torch.cuda.synchronize(device)
    events: Sequence[Any] = found.events() or ()
    on_host = [event for event in events if event.device_type.name == "CPU"]
    spans = [event for event in on_host if _is_label(event.name)]
    if not cuda:
        operators = [event for event in on_host if _is_operator(event)]
        outermost = [event for event in operators if not _is_operator(event.cpu_parent)]
        return shares_of_host_time(spans), round(len(outermost) / repeats)
    # labels, ours and PyTorch's own, have spans on the device too, as if they were kernels
    labels = {event.name for event in events if event.is_user_annotation}
    on_device = [event for event in events if event.device_type.name == "CUDA" and event.name not in labels]
    if not on_device:
        return {}, None
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    launched = [
        (event.time_range.start, sum(kernel.duration for kernel in event.kernels if kernel.name not in labels))
        for event in on_host
        if event.kernels and event.name not in labels
    ]
    busy = sum(event.time_range.elapsed_us() for event in on_device)
    return shares_of_kernel_time(spans, launched, busy), round(len(kernels) / repeats)


def shares_of_host_time(spans: Sequence[Any]) -> dict[str, float]:
    """Return each part's own share of the time of whole steps, from the labelled events on the host."""
    times = dict.fromkeys(PARTS, 0.0)
    whole = sum(span.time_range.elapsed_us() for span in spans if span.name == STEP)
    for span in spans:
        if span.name == STEP:
            continue
        elapsed = span.time_range.elapsed_us()
        times[_part(span.name)] += elapsed
        around = span.cpu_parent
        while around is not None and not _is_label(around.name):
            around = around.cpu_parent
        if around is not None and around.name != STEP:
            times[_part(around.name)] -= elapsed
    return _as_shares(times, whole)


def shares_of_kernel_time(
    spans: Sequence[Any], launched: Sequence[tuple[float, float]], busy: float
) -> dict[str, float]:
    """Return each part's share of ``busy``, the time of all kernels.

    ``launched`` holds when kernels were launched and how long they took. They are assigned to parts by the clock and
    not by nesting, because a backward pass launches from threads of its own.
    """
    times = dict.fromkeys(PARTS, 0.0)
    parts = sorted((span for span in spans if span.name != STEP), key=lambda span: span.time_range.start)
    for moment, duration in launched:
        around = [span for span in parts if span.time_range.start <= moment <= span.time_range.end]
        times[_part(around[-1].name) if around else "other"] += duration  # the innermost part started last
    return _as_shares(times, busy)


def _as_shares(times: dict[str, float], whole: float) -> dict[str, float]:
    """Return times as shares of ``whole``; what no part accounts for goes to ``other``."""
    times["other"] += whole - sum(times.values())
    return {part: time / whole for part, time in times.items()}


def _is_label(name: str) -> bool:
    return name == STEP or name.startswith(PREFIX)


def _is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def _part(label: str) -> str:
    name = label.removeprefix(PREFIX)
    return name if name in PARTS else "other"
