"""A short study on the real CIFAR-100: resnet56 teaches resnet8 for a few epochs, four settings at equal epochs.

    python benchmarks/cifar100_short.py ROOT WEIGHTS [epochs] [num_seeds]

ROOT holds CIFAR-100, WEIGHTS is a trained resnet56. Each run uses one thread; one runs for each processor. Run folders
lie in runs/cifar100-short and are taken up again where they were; their records (everything but the weights) and the
table go to benchmarks/results/cifar100-resnet56-resnet8.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich.console import Console

from vrm.config import resolve
from vrm.report import summarise, table, verdict, write_report
from vrm.sweeps.local import run_all

RUNS = Path("runs/cifar100-short")
RESULTS = Path(__file__).parent / "results" / "cifar100-resnet56-resnet8"
SETTINGS = {  # the longest first, so that the processors finish together
    "VRM": ["method=vrm"],
    "KD": ["method=kd"],
    "alone, two views": ["method=ce", "views=2"],
    "alone": ["method=ce"],
}
RECORDS = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "timings.jsonl",
    "teacher.json",
    "taps.json",
    "model.json",
)


def main(root: str, weights: str, epochs: int = 2, num_seeds: int = 1) -> None:
    """Run what has not run yet, and write the table."""
    teacher = ["teacher=resnet56", f"teacher.weights={weights}"]
    shared = ["student=resnet8", f"data.root={root}", f"epochs={epochs}", "schedule=cosine", "threads=1"]
    jobs, labels = [], {}
    for seed in range(num_seeds):
        for label, words in SETTINGS.items():
            run = RUNS / f"{label.lower().replace(', ', '-').replace(' ', '-')}-{seed}"
            own = words if "method=ce" in words else [*words, *teacher]
            jobs.append(
                resolve("distill", "cifar100", [*shared, *own, "checkpoint.every=200", f"seed={seed}", f"run={run}"])
            )
            labels[run] = label
    records = run_all(jobs, console=Console())
    rows = summarise(records, label=lambda record: labels[record.path])
    RESULTS.mkdir(parents=True, exist_ok=True)
    console = Console(record=True, width=110)
    console.print(table(rows))
    for line in verdict(rows):
        console.print(line, highlight=False)
    (RESULTS / "table.txt").write_text(console.export_text(), encoding="utf-8")
    title = f"CIFAR-100, {epochs} epochs"
    write_report(RESULTS / "report.html", records, title=title, label=lambda record: labels[record.path])
    for run in labels:
        (RESULTS / run.name).mkdir(exist_ok=True)
        for name in RECORDS:
            if (run / name).is_file():
                shutil.copy(run / name, RESULTS / run.name / name)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
