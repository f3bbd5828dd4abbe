"""Run folders written by hand: what a training leaves behind, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vrm.models.card import FORMAT
from vrm.runs.folder import Record, read_run


def write_run(
    path: Path,
    *,
    seed: int = 0,
    method: str = "kd",
    views: int = 1,
    top1: Sequence[float] = (50.0, 60.0),
    loss: Sequence[float] = (2.0, 1.0),
    finished: bool = True,
    teacher: str | None = "teachers/t/",
    teacher_top1: float = 97.0,
    student: str = "resnet8",
    extra_epochs: int = 0,
    seconds: float = 10.0,
    device: str = "cpu (x86_64, 1 thread)",
    data: dict[str, Any] | None = None,
    **settings: Any,
) -> Record:
    """A run of as many epochs as ``top1`` has entries (extra ones included), read back."""
    path.mkdir(parents=True)
    options = settings.pop("options", {})
    config = {
        "recipe": "digits",
        "run": str(path),
        "seed": seed,
        "epochs": len(top1) - extra_epochs,
        "views": views,
        "student": {"name": student, "weights": None, "options": {}},
        "teacher": None if teacher is None else {"name": teacher, "weights": None, "options": {}, "allow_weak": False},
        "method": {"name": method, **options},
        "data": {"name": "digits", "root": None, "seed": None, "views": None} | (data or {}),
        **settings,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (path / "environment.json").write_text(
        json.dumps({"device": device, "threads": 1, "torch": "2.8.0", "task": "classification", "format": FORMAT})
    )
    lines = [
        {"step": 10 * epoch, "epoch": epoch, "split": split, "name": name, "value": value}
        for split, name, values in (("test", "top1", top1), ("train", "loss", loss))
        for epoch, value in enumerate(values, start=1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if teacher is not None:
        scores = {"top1": teacher_top1, "top5": 100.0, "loss": 0.1}
        measured = {
            "key": "k",
            "images": 359,
            "architecture": "resnet20",
            "task": "classification",
            "recorded": None,
            "scores": scores,
        }
        (path / "teacher.json").write_text(json.dumps(measured), encoding="utf-8")
    if finished:
        best = max(range(len(top1)), key=lambda i: top1[i])
        model = {
            "architecture": student,
            "task": "classification",
            "last": {"top1": top1[-1], "epoch": len(top1)},
            "best": {"top1": top1[best], "epoch": best + 1},
            "parameters": 77850,
            "steps": 10 * len(top1),
            "all_steps": 10 * len(top1),
            "epochs": float(len(top1)),
            "extra_epochs": extra_epochs,
            "student_views": 2 if method == "vrm" else views,
            "seconds": seconds,
            "device": device,
        }
        (path / "model.json").write_text(json.dumps(model), encoding="utf-8")
    return read_run(path)


def change_model(record: Record, **values: Any) -> Record:
    """The same run with another ``model.json``."""
    path = record.path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")
    return read_run(record.path)
