"""Draws the picture of the README and fills in its table, from ``benchmarks/results/digits-demo.json``.

``python docs/figures/demo.py`` does both. ``python docs/figures/demo.py runs/demo`` makes the record anew before, from
the run folders that ``vrm demo`` has left there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "digits-demo.json"
PICTURE = Path(__file__).with_suffix(".svg")


def gather(folder: Path) -> dict[str, Any]:
    """Return the test scores of each run of a demo, after each epoch, and where they were measured."""
    from vrm.cli.demo import SETTINGS, run_folder
    from vrm.report import summarise
    from vrm.runs.folder import read_run

    settings = []
    for label in SETTINGS:
        paths = (run_folder(folder, label, seed) for seed in range(10**6))
        records = []
        for path in paths:
            if not (path / "model.json").is_file():
                break
            records.append(read_run(path))
        (row,) = summarise(records)
        runs = [
            {
                "seed": record.config["seed"],
                "curve": [round(value, 4) for _, value in record.curve("test", row.metric.key)],
            }
            for record in row.finished
        ]
        settings.append({"label": label, "passes": row.passes, "best": round(row.best.mean, 4), "runs": runs})
    assert row.teacher is not None
    environment = row.records[0].environment
    return {
        "command": f"vrm demo seeds={len(records)}",
        "metric": row.metric.label,
        "unit": row.metric.unit,
        "teacher": {"architecture": row.teacher.architecture, "score": round(row.teacher.score, 4)},
        "environment": {key: environment[key] for key in ("device", "python", "torch", "vrm")},
        "settings": settings,
    }


def last_scores(setting: dict[str, Any]) -> list[float]:
    """Return the score of each run after its last epoch."""
    return [run["curve"][-1] for run in setting["runs"]]


def fill_in(text: str, record: dict[str, Any]) -> str:
    """Return the README with its table made from the record."""
    count = len(record["settings"][0]["runs"])
    lines = [
        f"| setting | student passes | {record['metric']} after the last epoch, mean ± sd (n = {count}) | best epoch |",
        "| --- | ---: | ---: | ---: |",
    ]
    for setting in record["settings"]:
        last = last_scores(setting)
        mean = f"{fmean(last):.2f} ± {stdev(last):.2f} {record['unit']}"
        lines.append(f"| {setting['label']} | {setting['passes']} | {mean} | {setting['best']:.2f} {record['unit']} |")
    table = "\n".join(lines)
    found, times = re.subn(
        r"<!-- demo -->\n.*?<!-- end -->", lambda _: f"<!-- demo -->\n{table}\n<!-- end -->", text, flags=re.DOTALL
    )
    if times != 1:
        raise ValueError(f"the marks of the demo's table stand {times} times in the text, not once")
    return found


def draw(record: dict[str, Any]) -> None:
    """Draw the learning curves, and every run's last score."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "vrm", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (curves, dots) = plt.subplots(
        1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=(3, 2), facecolor="white"
    )
    teacher = record["teacher"]["score"]
    for number, setting in enumerate(record["settings"]):
        runs = [run["curve"] for run in setting["runs"]]
        epochs = range(1, len(runs[0]) + 1)
        by_epoch = [*zip(*runs, strict=True)]
        dashes = "--" if setting["label"].endswith("two views") else "-"
        color = f"C{('alone', 'KD', 'VRM').index(setting['label'].partition(',')[0])}"
        curves.plot(epochs, [fmean(values) for values in by_epoch], dashes, color=color, label=setting["label"])
        last = last_scores(setting)
        dots.plot(last, [-number] * len(last), "o", color=color, alpha=0.5, markersize=4, markeredgewidth=0)
        dots.plot([fmean(last)], [-number], "|", color=color, markersize=16, markeredgewidth=2)
    for axis, line in ((curves, curves.axhline), (dots, dots.axvline)):
        line(teacher, color="0.6", linestyle=":", linewidth=1)
        axis.grid(alpha=0.25)
    name = f"{record['metric']} on the test images, {record['unit']}"
    curves.set(xlabel="epoch", ylabel=name, ylim=(40, 101), title="mean over the seeds after each epoch")
    curves.annotate(f"teacher {teacher:.1f}", (1, teacher - 3.5), color="0.4", fontsize=8)
    curves.legend(frameon=False, loc="lower right", fontsize=8)
    dots.set(xlabel=name, title="last epoch: each run, and the mean")
    dots.set_yticks(range(0, -len(record["settings"]), -1), [setting["label"] for setting in record["settings"]])
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    """Make the record if a folder is given, then the picture and the table."""
    if sys.argv[1:]:
        text = json.dumps(gather(Path(sys.argv[1])), indent=1, ensure_ascii=False)
        text = re.sub(r"\[\s+([\d.,\s]+?)\s+\]", lambda curve: f"[{' '.join(curve[1].split())}]", text)
        RECORD.write_text(text + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    draw(record)
    readme = ROOT / "README.md"
    readme.write_text(fill_in(readme.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
