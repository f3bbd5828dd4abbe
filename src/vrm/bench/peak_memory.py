"""The peak memory of a step on the CPU, measured in a process of its own (Linux)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from vrm import config
from vrm.bench.inputs import load_images, place_images
from vrm.bench.step_time import prepare_subject
from vrm.bench.subjects import Settings, Subject

CHILD = "from vrm.bench.peak_memory import report_peak_memory; report_peak_memory()"
"""What the process of its own executes."""


def measure_peak_memory(subject: Subject, settings: Settings) -> tuple[int | None, str]:
    """Return the most bytes that networks and steps take in a fresh process, or None and why they are unknown."""
    if sys.platform != "linux":
        return None, "peak memory is measured on Linux, and on CUDA"
    task = {
        "run": subject.run.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json", include={"samples", "classes"}),
        "method": subject.method,
        "change": subject.change,
        "phase": subject.phase,
    }
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    if done.returncode:
        return None, f"not measured: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}"
    return int(done.stdout.split()[-1]), ""


def report_peak_memory() -> None:
    """Build the subject described on standard input, take its steps, and print the growth of resident memory."""
    task = json.loads(sys.stdin.read())
    run, settings = config.validate(task.pop("run")), Settings.model_validate(task.pop("settings"))
    dataset, _ = place_images(load_images(run.data, settings, Console(quiet=True)), run)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = _resident_bytes("VmRSS")
    prepare_subject(Subject(run=run, **task), dataset, profiled=0)
    print(_resident_bytes("VmHWM") - before)


def _resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
