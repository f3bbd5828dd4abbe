"""Claim: a run that reads a teacher's stored logits only pays for reading them, and none of its bits change.

    python benchmarks/teacher_cache.py [--teacher resnet32x4] [--student resnet8x4] [--methods kd vrm] [--batch 64]
        [--steps 4] [--epochs 3] [--device auto] [--precision float32] [--out benchmarks/results/teacher_cache.json]

Each method runs three times on the same images and seeds: without a cache, filling one, reading it. Printed are the
milliseconds of a step (in the fastest epoch), the ratio, the size on disk, and whether weights, optimiser and metrics
are the same byte by byte. Images are noise and weights random, as neither matters for time. The exit status is 1 if a
byte differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from arguments import at_least
from rich.console import Console

from vrm import config, models
from vrm.config import Resolved
from vrm.data import DataSet, ImageStore
from vrm.engine.devices import choose_device, processor_name
from vrm.runs.assembly import assemble
from vrm.runs.environment import collect_facts, describe_environment
from vrm.runs.folder import open_folder, read_run
from vrm.runs.resumption import decide_resumption
from vrm.runs.trainer import Trainer

NUM_CLASSES, SIDE, NUM_TEST = 100, 32, 200
MODES = ("none", "fill", "read")


def noise(num_samples: int, seed: int) -> ImageStore:
    """Return images of noise, with every class among them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (num_samples, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return ImageStore(images, torch.arange(num_samples) % NUM_CLASSES, tuple(map(str, range(NUM_CLASSES))))


def train(folder: Path, cache: Path | None, method: str, data: DataSet, options: argparse.Namespace) -> None:
    """Train one run."""
    networks = []
    for seed, name in enumerate((options.student, options.teacher)):
        torch.manual_seed(seed)
        networks.append(models.create(name, num_classes=NUM_CLASSES))
    run = config.validate(
        {
            "recipe": "python",
            "run": str(folder),
            "epochs": options.epochs,
            "batch_size": options.batch,
            "student": {"name": options.student},
            "teacher": {"name": options.teacher, "allow_weak": True, "cache": None if cache is None else str(cache)},
            "data": {"name": data.name},
            "method": {"name": method, **config.method_settings(method, {})},
            "device": options.device,
            "precision": options.precision,
            "deterministic": True,
            "threads": options.threads,
            "log_every": 10**6,  # one reading an epoch
        }
    )
    made = open_folder(folder, print)
    try:
        assembly = assemble(run, dataset=data, student=networks[0], teacher=networks[1])
        made.write_settings(Resolved(run, {}))
        facts = collect_facts(assembly)
        trainer = Trainer(assembly, facts, made, console=Console(quiet=True), quiet=True)
        trainer.train(decide_resumption(folder, run, facts))
    finally:
        made.close()


def outcome(folder: Path) -> str:
    """Return the SHA-256 of what must be the same: the last checkpoint's tensors, and every metric."""
    newest = max((folder / "checkpoints").glob("step-*"))
    digest = hashlib.sha256((newest / "tensors.safetensors").read_bytes())
    digest.update((folder / "metrics.jsonl").read_bytes())
    return digest.hexdigest()


def measure_method(method: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the three runs of one method, and compare them."""
    data = DataSet(
        "noise",
        noise(options.batch * options.steps, 0),
        noise(NUM_TEST, 1),
        (0.5, 0.5, 0.5),
        (0.25, 0.25, 0.25),
        "cifar",
    )
    cache = folder / "cache"
    found: dict[str, Any] = {"method": method}
    for mode in MODES:
        train(folder / mode, None if mode == "none" else cache, method, data, options)
        seconds = min(line["seconds"] for line in read_run(folder / mode).timings[1:])
        found[f"{mode}_ms_per_step"] = round(1000 * seconds / options.steps, 3)
    hashes = {mode: outcome(folder / mode) for mode in MODES}
    size = sum(path.stat().st_size for path in cache.glob("epoch-*"))
    ratio = round(found["none_ms_per_step"] / found["read_ms_per_step"], 3)
    return found | {"ratio": ratio, "identical": len(set(hashes.values())) == 1, "sha256": hashes, "cache_bytes": size}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--methods", nargs="+", default=["kd", "vrm"])
    parser.add_argument("--batch", type=at_least(1), default=64)
    parser.add_argument("--steps", type=at_least(1), default=4, help="steps an epoch")
    parser.add_argument("--epochs", type=at_least(2), default=3, help="two or more; the first is not counted")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "teacher_cache.json")
    options = parser.parse_args()
    rows, load = [], os.getloadavg()[0]
    for method in options.methods:
        with tempfile.TemporaryDirectory(prefix="vrm-teacher-cache-") as folder:
            row = measure_method(method, options, Path(folder))
        rows.append(row)
        print(
            f"{method:8s} {options.teacher} -> {options.student}, batch {options.batch}: "
            + ", ".join(f"{mode} {row[f'{mode}_ms_per_step']:.2f} ms" for mode in MODES)
            + f" a step; {row['ratio']:.2f} times as fast; {row['cache_bytes']:,} bytes; "
            + ("identical" if row["identical"] else "NOT IDENTICAL"),
            flush=True,
        )
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    report = {
        "settings": settings,
        "environment": describe_environment(choose_device(options.device)) | {"processor": processor_name()},
        "load_average": [load, os.getloadavg()[0]],
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not all(row["identical"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
