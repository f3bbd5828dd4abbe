"""Measure speed and memory of VRM's relations against Algorithm 1 of the paper as users write it.

    python benchmarks/relations.py [--device cpu] [--threads 2] [--sizes 64x100,128x1000] [--compile] [--out FILE]

Every case is forward and backward from float32 logits. Both forms take turns within one run, so that other load on the
machine affects both. A turn lasts a tenth of a second, or one call, so that neither form is measured with the caches
and the memory that the other leaves behind. Ratios are those of medians and of minima; the machine's load is recorded
beside them. Turns go on for some seconds, and at least three times, or twice where Algorithm 1 makes one take over ten
seconds. The peak is the memory that a call adds: on a CPU (Linux) from the process's high-water mark of resident
memory, reset before the call through /proc/self/clear_refs, and on CUDA from the allocator. Results are written to
``benchmarks/results/relations-DEVICE.json``.

On Linux the allocator is set to keep freed memory from the start, as it does during training once large tensors have
come and gone. Otherwise Algorithm 1 would pay page faults for small tensors too, and look slower than it is there.

Views are ``apart`` (independent logits) or ``near``: the logits of both networks differ by 1e-6 between the views, so
edges are short and products of vertices are split. The last measurements are the mixture entropy in tiles against
untiled, and the cost of each further virtual view: the loss, and the passes of student and teacher (ResNet8x4 and
ResNet32x4).

On CUDA the whole loss with pruning, forward and backward, is also captured as a graph and replayed, as in a captured
training step, and with ``--compile`` also after ``torch.compile``. Goal at 64x100: 0.3 ms.

Goals on two CPU cores at 128x1000: without pruning, 60 times as fast between samples and 100 times between classes; the
mixture entropy no slower than untiled; collision adding at most 20 %. At 64x100: the whole loss with pruning 3 times as
fast.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from arguments import at_least
from torch import Tensor

from vrm.compilation import compile_options
from vrm.engine.cuda_graphs import WARMUP, CudaGraphRecorder, Recorder
from vrm.engine.devices import processor_name
from vrm.methods.vrm import vrm_loss
from vrm.models import create
from vrm.relations import class_distributions, match_relations, predictions, prune_edges

TEMPERATURE, KEEP = 4.0, 0.9
SIZES = ((64, 100), (256, 200), (128, 1000), (256, 1000), (128, 21841))
TURN = 0.1  # seconds of calls in a row
MOST_CLASSES = 8192  # of which there are mixture entropies
LARGEST_EXPLICIT = 1 << 28  # coordinates of edges: 1 GiB a tensor, of which autograd holds about ten
Vertices = list[Tensor]  # student real, student virtual, teacher real, teacher virtual


def algorithm_1(vertices: Vertices, keep_MN: Tensor | None) -> Tensor:
    """Return the loss from explicit edges, as in the paper."""
    student_real, student_virtual, teacher_real, teacher_virtual = vertices
    student = F.normalize(student_real[None] - student_virtual[:, None], dim=-1, eps=1e-8)
    teacher = F.normalize(teacher_real[None] - teacher_virtual[:, None], dim=-1, eps=1e-8)
    edge_MN = 0.5 * (student - teacher).square().sum(-1)
    return edge_MN.mean() if keep_MN is None else (edge_MN * keep_MN).sum() / keep_MN.sum()


def untiled_mixture_entropy(real_ND: Tensor, virtual_MD: Tensor) -> Tensor:
    """Return the entropies of all mixtures at once."""
    mean_MND = (real_ND[None] + virtual_MD[:, None]) / 2
    return -(mean_MND * mean_MND.clamp_min(1e-12).log()).sum(-1)


def explicit_mask(real_ND: Tensor, virtual_MD: Tensor) -> Tensor:
    """Return the edges up to the quantile. `Tensor.quantile` refuses more than 16 million values, so this sorts."""
    with torch.no_grad():
        entropy_MN = untiled_mixture_entropy(real_ND, virtual_MD)
        return entropy_MN <= entropy_MN.flatten().sort().values[int(KEEP * (entropy_MN.numel() - 1))]


def explicit(logits: Vertices, graph: str, pruning: str) -> Tensor:
    vertices = [F.softmax(z / TEMPERATURE, 1) for z in logits]
    if graph == "whole":
        return explicit(logits, "sample", pruning) + explicit(logits, "class", pruning)
    if graph == "class":
        vertices = [p.T for p in vertices]
    keep = None
    if pruning == "mixture":
        keep = explicit_mask(*(w / w.sum(1, keepdim=True) for w in vertices[:2]))
    return algorithm_1(vertices, keep)


def ours(logits: Vertices, graph: str, pruning: str) -> Tensor:
    keep: Any = {} if pruning == "none" else {"joint_entropy": pruning}
    share = 1.0 if pruning == "none" else KEEP
    if graph == "whole":
        return sum(vrm_loss(*logits, temperature=TEMPERATURE, keep=share, **keep), logits[0].new_zeros(()))
    real, virtual, *teacher = (predictions(z, temperature=TEMPERATURE) for z in logits)
    kept = None
    if graph == "class":
        if pruning != "none":
            kept = prune_edges(
                class_distributions(real), class_distributions(virtual), keep=KEEP, kind=pruning, dtype=torch.float32
            )
        return match_relations(*(p.T for p in (*teacher, real, virtual)), keep=kept, dtype=torch.float32)
    if pruning != "none":
        kept = prune_edges(real, virtual, keep=KEEP, kind=pruning, dtype=torch.float32)
    return match_relations(*teacher, real, virtual, keep=kept, dtype=torch.float32)


class Machine:
    """The clock and the memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of one call."""
        self.synchronise()
        start = time.perf_counter()
        call()
        self.synchronise()
        return (time.perf_counter() - start) * 1e3

    def _status(self, key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    def peak(self, call: Callable[[], object]) -> float | None:
        """Return the MiB that a call adds at its peak, or None if the system does not report it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            call()
            return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        if sys.platform != "linux":
            return None
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = self._status("VmRSS")
        call()
        return self._status("VmHWM") - before


def keep_memory() -> None:
    """Set glibc's allocator as it adapts by itself: reuse blocks up to 32 MiB, and keep 64 MiB for later."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, mebibytes in ((-3, 32), (-1, 64)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            mallopt(parameter, mebibytes << 20)


def step(form: Callable[[Vertices, str, str], Tensor], logits: Vertices, graph: str, pruning: str) -> None:
    torch.autograd.grad(form(logits, graph, pruning), logits[:2])


def measure(machine: Machine, calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, Any]]:
    """Return median, minimum, number of times and peak memory of each call; the calls take turns."""
    result: dict[str, dict[str, Any]] = {name: {"peak_mib": machine.peak(call)} for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    least = 2 if "explicit" in calls else 3
    turns = 0
    while turns < least or (elapsed := time.perf_counter() - start) < seconds or (turns < 3 and elapsed < 20):
        turns += 1
        for name, call in calls.items():
            turn = time.perf_counter() + TURN
            times[name].append(machine.time(call))
            while time.perf_counter() < turn:
                times[name].append(machine.time(call))
    for name, found in times.items():
        result[name] |= {"median_ms": statistics.median(found), "min_ms": min(found), "repeats": len(found)}
    return result


def cases(sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    found = []
    for num_samples, num_classes in sizes:
        for graph in ("sample", "class", "whole"):
            for views, pruning in (("apart", "none"), ("apart", "mixture"), ("apart", "collision"), ("near", "none")):
                if num_classes > MOST_CLASSES and (pruning == "mixture" or graph == "whole" or views == "near"):
                    continue  # refused, the sum of the two before, and hours
                found.append({"B": num_samples, "C": num_classes, "graph": graph, "pruning": pruning, "views": views})
    return found


def logits_of(case: dict[str, Any], device: torch.device) -> Vertices:
    generator = torch.Generator().manual_seed(0)
    real_s, virtual_s, real_t, virtual_t = (
        3 * torch.randn(case["B"], case["C"], generator=generator).to(device) for _ in range(4)
    )
    if case["views"] == "near":
        virtual_s, virtual_t = real_s + 1e-6 * virtual_s, real_t + 1e-6 * virtual_t
    return [real_s.requires_grad_(), virtual_s.requires_grad_(), real_t, virtual_t]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--sizes", default=",".join(f"{b}x{c}" for b, c in SIZES))
    parser.add_argument("--seconds", type=float, default=2.0, help="least time for a case")
    parser.add_argument("--compile", action="store_true", help="on CUDA: record the compiled loss, too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.compile and not options.device.startswith("cuda"):
        parser.error("--compile is about the recordings, which there are on CUDA alone")
    keep_memory()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    machine = Machine(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    sizes = [(int(b), int(c)) for b, c in (size.split("x") for size in options.sizes.split(","))]
    rows: list[dict[str, Any]] = []
    print(f"{name}, torch {torch.__version__}, {options.threads} threads")
    heads = f"{'graph':7}{'views':6}{'pruning':10}{'Algorithm 1':>23}{'ours':>23}{'ratio':>8}{'minima':>8}"
    print(f"{'B':>4} {'C':>6} {heads}")
    for case in cases(sizes):
        logits, graph, pruning = logits_of(case, device), case["graph"], case["pruning"]
        calls: dict[str, Callable[[], object]] = {"ours": lambda z=logits, g=graph, p=pruning: step(ours, z, g, p)}
        coordinates = case["B"] * case["C"] * (case["B"] if graph == "sample" else max(case["B"], case["C"]))
        known = pruning == "collision" or case["views"] == "near" or (graph == "whole" and case["C"] >= 1000)
        if coordinates <= LARGEST_EXPLICIT and not known:
            calls["explicit"] = lambda z=logits, g=graph, p=pruning: step(explicit, z, g, p)
        if pruning == "collision":  # what it adds shows beside the loss without it
            calls["unpruned"] = lambda z=logits, g=graph: step(ours, z, g, "none")
        row = case | measure(machine, calls, options.seconds) | {"load": os.getloadavg()[0]}
        if "explicit" in row:
            row["ratio"] = row["explicit"]["median_ms"] / row["ours"]["median_ms"]
            row["ratio_of_minima"] = row["explicit"]["min_ms"] / row["ours"]["min_ms"]
        if "unpruned" in row:
            row["added"] = row["ours"]["median_ms"] / row["unpruned"]["median_ms"] - 1
            row["added_to_minima"] = row["ours"]["min_ms"] / row["unpruned"]["min_ms"] - 1
        rows.append(row)
        cells = [show(row.get(form)) for form in ("explicit", "ours")]
        ratios = f"{row['ratio']:8.1f}{row['ratio_of_minima']:8.1f}" if "ratio" in row else ""
        if "added" in row:
            ratios = f"{row['added']:+8.0%}{row['added_to_minima']:+8.0%}"
        print(
            f"{case['B']:4} {case['C']:6} {graph:7}{case['views']:6}{pruning:10}{cells[0]:>23}{cells[1]:>23}{ratios}",
            flush=True,
        )
    result = {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "load": os.getloadavg(),
        "cases": rows,
        "recorded": recorded(sizes, machine, options.seconds, CudaGraphRecorder(device), compile=options.compile)
        if device.type == "cuda"
        else [],
        "entropy": entropies(machine, sizes, options.seconds),
        "virtual_views": virtual_views(machine, options.seconds),
    }
    out = options.out or Path(__file__).parent / "results" / f"relations-{device.type}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


def recorded(
    sizes: list[tuple[int, int]], machine: Machine, seconds: float, recorder: Recorder, *, compile: bool
) -> list[dict[str, Any]]:
    """Measure the whole loss with the mixture's mask, forward and backward, as a CUDA graph, plain and compiled."""
    forms: dict[str, Callable[[Vertices, str, str], Tensor]] = {"recorded": ours}
    if compile:
        forms["compiled, recorded"] = torch.compile(ours, fullgraph=True, dynamic=False, options=compile_options())
    rows = []
    for num_samples, num_classes in sizes:
        if num_classes > MOST_CLASSES:
            continue
        logits = logits_of({"B": num_samples, "C": num_classes, "views": "apart"}, machine.device)
        row: dict[str, Any] = {"B": num_samples, "C": num_classes}
        for name, form in forms.items():
            call = partial(step, form, logits, "whole", "mixture")
            for _ in range(WARMUP):
                recorder.run(call, ())
            row |= measure(machine, {name: recorder.record(call, ())}, seconds)
        rows.append(row)
        shown = ", ".join(f"{name} {row[name]['median_ms']:.3f} ms" for name in forms)
        print(f"{num_samples:4} {num_classes:6} whole loss by a graph: {shown}", flush=True)
    return rows


def virtual_views(machine: Machine, seconds: float) -> list[dict[str, Any]]:
    """Measure the loss with 1, 2 and 4 virtual views at 64x100, and the passes that each view takes."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (create(name, num_classes=100).to(machine.device) for name in ("resnet8x4", "resnet32x4"))
    teacher.eval().requires_grad_(False)
    images = torch.randn(64, 3, 32, 32, generator=generator).to(machine.device)
    logits = [3 * torch.randn(64, 100, generator=generator).to(machine.device) for _ in range(10)]
    (real_s, real_t), virtual_s, virtual_t = logits[:2], logits[2:6], logits[6:]
    leaves = [z.requires_grad_() for z in (real_s, *virtual_s)]

    def loss(num_views: int) -> None:
        total = torch.zeros((), device=machine.device)
        for s, t in zip(virtual_s[:num_views], virtual_t[:num_views], strict=True):
            total = total + sum(vrm_loss(real_s, s, real_t, t, temperature=TEMPERATURE, keep=KEEP)) / num_views
        torch.autograd.grad(total, leaves[: num_views + 1])

    calls: dict[str, Callable[[], object]] = {
        "loss, 1 virtual view": lambda: loss(1),
        "loss, 2 virtual views": lambda: loss(2),
        "loss, 4 virtual views": lambda: loss(4),
        "student, a view": lambda: torch.autograd.grad(student(images).sum(), list(student.parameters())),
        "teacher, a view": lambda: teacher(images),
    }
    rows = [{"what": name} | found for name, found in measure(machine, calls, 2 * seconds).items()]
    for row in rows:
        print(f"{row['what']:22} {row['median_ms']:9.2f} ms", flush=True)
    return rows


def entropies(machine: Machine, sizes: list[tuple[int, int]], seconds: float) -> list[dict[str, Any]]:
    """Measure the mixture entropy of class vertices in tiles against untiled."""
    rows = []
    for num_samples, num_classes in sizes:
        if num_classes * num_classes * num_samples > LARGEST_EXPLICIT:
            continue
        p, q = torch.rand(2, num_classes, num_samples, device=machine.device).softmax(-1)
        calls: dict[str, Callable[[], object]] = {
            "tiled": lambda p=p, q=q: prune_edges(p, q, keep=KEEP, dtype=torch.float32),
            "untiled": lambda p=p, q=q: explicit_mask(p, q),
        }
        row = {"B": num_samples, "C": num_classes} | measure(machine, calls, seconds)
        rows.append(row)
        shown = f"tiled {show(row['tiled'])}, untiled {show(row['untiled'])}"
        print(f"{num_samples:4} {num_classes:6} mask of classes by mixture entropy: {shown}", flush=True)
    return rows


def show(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    memory = "" if found["peak_mib"] is None else f" {found['peak_mib']:7.0f} MiB"
    return f"{found['median_ms']:.2f} ms{memory}"


if __name__ == "__main__":
    main()
