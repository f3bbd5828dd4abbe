"""How many runs one device should take at once: runs an hour by their number, measured, and a recommendation.

    python benchmarks/packing.py cifar100 data.root=PATH teacher=resnet32x4 teacher.weights=FILE student=resnet8x4
        method=vrm [--most 8] [--seconds 15] [--out benchmarks/results/packing.json]

The words are those of `vrm distill` (or, with model=NAME, of `vrm train`). Copies of the run are trained side by side
for some seconds, in processes of their own as `vrm sweep` has them; their steps are counted, evaluation is not. The
first visible GPU is measured, or the CPU, one thread a run.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from arguments import at_least
from rich.console import Console

from vrm.bench.step_time import processor
from vrm.config import resolve
from vrm.runs.assembly import choose_device, load_data
from vrm.runs.folder import environment
from vrm.sweeps.grid import budget
from vrm.sweeps.local import find_devices
from vrm.sweeps.packing import SECONDS, measure, recommend


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--most", type=at_least(1), help="runs at once, at most")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    options = parser.parse_intermixed_args()
    verb = "train" if any(word.startswith("model=") for word in options.words) else "distill"
    job = resolve(verb, options.recipe, options.words)
    cost = budget(job.run)
    images_a_run = len(load_data(job.run.data, Console()).train) * (cost.epochs + cost.extra)
    found, load = [], os.getloadavg()[0]
    for each in measure(job, device=find_devices([job])[0], most=options.most, seconds=options.seconds):
        found.append(each)
        print(
            f"{each.workers:3d} at once  {each.images_per_second:10,.0f} images/s  "
            f"{3600 * each.images_per_second / images_a_run:8.2f} runs/h  "
            f"{each.images_per_second / found[0].images_per_second:5.2f} times one"
            + (f"  {each.memory / 1e9:.1f} GB" if each.memory else ""),
            flush=True,
        )
    print(f"recommended: workers={recommend(found)}")
    report = {
        "words": options.words,
        "images_a_run": images_a_run,
        "seconds": options.seconds,
        "environment": environment(choose_device(job.run.device)) | {"processor": processor()},
        "load_average": [load, os.getloadavg()[0]],
        "rows": [asdict(each) | {"runs_per_hour": 3600 * each.images_per_second / images_a_run} for each in found],
        "recommended": recommend(found),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
