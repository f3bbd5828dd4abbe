"""How many runs a device should take at once, by measurement: 1, 2, 4, .. of them side by side, for seconds each.

Processes take turns on a GPU, which pays as long as each leaves it idle between its kernels; under NVIDIA's
Multi-Process Service, where it runs, they compute at the same time.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrm.config import ConfigError, Resolved
from vrm.runs.trainer import Preempted
from vrm.sweeps.local import HEADROOM, Device, RunFailed, Signals, Worker, processors

SECONDS = 15.0
"""How long each number of runs is measured, once all of them are under way."""

WORTH = 0.05
"""More runs at once must raise the throughput of all together by this share; else fewer are as good."""

MOST_ON_A_GPU = 16

WARM = 2
"""Readings of the log (some steps each) after which a run is under way: data loaded, step recorded."""


@dataclass(frozen=True)
class Throughput:
    """What ``workers`` runs did together: images a second, and the bytes in use on the GPU (0 on the CPU)."""

    workers: int
    images_per_second: float
    memory: int


def measure(
    job: Resolved, *, device: Device, most: int | None = None, seconds: float = SECONDS
) -> Iterator[Throughput]:
    """Train copies of ``job`` side by side, in a temporary folder, for some seconds of steps each; evaluation excepted.

    Goes on while more runs are worth it and have room: up to ``most``, by default as many as there are processors, on a
    GPU 16. ``ConfigError`` for a run that ends before it can be measured.
    """
    most = most or (processors() if device is None else MOST_ON_A_GPU)
    with tempfile.TemporaryDirectory(prefix="vrm-packing-") as name:
        before: Throughput | None = None
        workers = 1
        while workers <= most:
            found = _side_by_side(job, device, workers, Path(name), seconds)
            if found is None:
                return
            throughput, total = found
            yield throughput
            if before is not None and throughput.images_per_second < (1 + WORTH) * before.images_per_second:
                return
            if device is not None and 2 * throughput.memory > (1 - HEADROOM) * total:
                return
            before, workers = throughput, most if workers < most < 2 * workers else 2 * workers


def recommend(found: Sequence[Throughput]) -> int:
    """The fewest runs at once with (nearly) the best throughput."""
    best = max(each.images_per_second for each in found)
    return next(each.workers for each in found if (1 + WORTH) * each.images_per_second >= best)


def _side_by_side(
    job: Resolved, device: Device, count: int, folder: Path, seconds: float
) -> tuple[Throughput, int] | None:
    """The throughput of ``count`` runs and the device's memory; ``None`` if they do not fit."""
    signals = Signals()
    with signals.caught():
        return _measured(job, device, count, folder, seconds, signals)


def _measured(
    job: Resolved, device: Device, count: int, folder: Path, seconds: float, signals: Signals
) -> tuple[Throughput, int] | None:
    workers = [
        Worker.start(_probe(job, device, folder / f"{count}-{i}", folder), device, beside_others=False)
        for i in range(count)
    ]
    readings: list[list[dict[str, Any]]] = [[] for _ in workers]
    skipped: list[int] | None = None
    results: list[dict[str, Any]] = []
    end = float("inf")
    try:
        while True:
            time.sleep(0.1)
            if signals.count:
                raise Preempted("stopped while measuring; the same command begins anew")
            ended = any(worker.process.poll() is not None for worker in workers)
            for lines, worker in zip(readings, workers, strict=True):
                lines += worker.read("timings.jsonl")
            if skipped is None and all(len(lines) > WARM for lines in readings):
                skipped, end = [len(lines) for lines in readings], time.monotonic() + seconds
            new = [len(lines) - skip for lines, skip in zip(readings, skipped or [], strict=False)]
            if ended or (time.monotonic() > end and min(new) > WARM):
                break
    finally:
        failed = [worker for worker in workers if worker.process.poll() not in (None, 0)]
        for worker in workers:
            worker.stop()
        kept = next(
            (worker.path / "teacher.json" for worker in workers if (worker.path / "teacher.json").is_file()), None
        )
        results = [worker.result() for worker in workers]
        if kept is not None:
            shutil.copy(kept, folder / "teacher.json")
    for worker, result in zip(workers, results, strict=True):
        if worker in failed:
            if result["kind"] == "memory" and count > 1:
                return None
            raise RunFailed(result["message"])
    if skipped is None or min(new) < 1:
        raise ConfigError(f"{job.run.run.name} ends before its speed can be measured; give workers=NUMBER")
    speed = 0.0
    for lines, skip in zip(readings, skipped, strict=True):
        steps = lines[-1]["step"] - lines[skip - 1]["step"]
        speed += steps * job.run.batch_size / sum(line["seconds"] for line in lines[skip:])
    memory, total = (max(result[name] for result in results) for name in ("memory", "total"))
    return Throughput(count, speed, memory), total


def _probe(job: Resolved, device: Device, path: Path, shared: Path) -> Resolved:
    """``job`` in a folder of its own, with many readings and no checkpoint, and with the teacher's accuracy known."""
    if (shared / "teacher.json").is_file():
        path.mkdir()
        shutil.copy(shared / "teacher.json", path)
    changes = {
        "run": path,
        "log_every": 5 if device is None else 50,
        "checkpoint": job.run.checkpoint.model_copy(update={"every": 10**9}),
    }
    return Resolved(job.run.model_copy(update=changes), job.sources)
