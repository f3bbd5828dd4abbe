"""Measuring steps side by side: what takes turns, what is listed as failed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vrm.bench import step_time
from vrm.bench.comparison import measure_step
from vrm.bench.step_time import Timings
from vrm.bench.subjects import Settings
from vrm.config import checked

from .conftest import refer_to
from .small import FEW, QUIET, TINY, measured, rows


def test_images_may_lie_elsewhere_for_one(examples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: dict[str, str] = {}
    original = step_time.build_step_of_phase

    def look(assembly: Any, position: int = 0) -> Any:
        placed[assembly.run.data.placement] = type(assembly.data.train).__name__
        return original(assembly, position)

    monkeypatch.setattr(step_time, "build_step_of_phase", look)
    assert len(rows(measured("methods=[alone]", "against=[data.placement=host]"))) == 4
    assert placed == {"device": "ImageStore", "host": "HostStore"}


def test_too_few_images_for_a_batch_are_a_failure() -> None:
    found = measure_step("cifar100", TINY[:1] + TINY[2:], checked(Settings, FEW | {"samples": 4}), console=QUIET)
    assert not found["rows"]
    assert all("make no batch of 8" in each["reason"] for each in found["failed"])


def test_methods_phases_and_changes_take_turns(examples: None) -> None:
    changes = ("precision=bfloat16", "example.scale=2+batch_size=3", "batch_size=4")
    found = measured("methods=[example]", f"against=[{','.join(changes)}]", "batch_size=6")
    of = rows(found)
    expected = ["alone", "example (alone)", "example (main)"]
    expected += [f"example ({phase}) {change}" for change in changes for phase in ("alone", "main")]
    assert list(of) == expected
    assert not found["failed"]
    for name, row in of.items():
        assert row["timed_steps"] == 1
        assert row["least_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["median_ms"])
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["launches"] > 50
        assert row["nonfinite_steps"] == 0
        assert not row["recorded"]
        assert (row["over_unchanged"] is not None) is any(change in name for change in changes)
    assert of["alone"]["over"]["alone"] == 1
    assert of["example (main)"]["over"]["example"] == 1
    assert of["example (main)"]["over"]["alone"] == pytest.approx(1 / of["alone"]["over"]["example"])
    assert of["alone"]["shares"]["teacher"] < 0.01 < of["example (main)"]["shares"]["teacher"]
    assert of["example (main) precision=bfloat16"]["precision"] == "bfloat16"
    assert of["example (main) batch_size=4"]["batch_size"] == 4
    both = of["example (main) example.scale=2+batch_size=3"]
    assert (both["batch_size"], both["options"]["scale"]) == (3, 2.0)
    assert of["example (main)"]["batch_size"] == 6
    assert found["pair"] == "resnet8/resnet8"
    assert not found["made_up_images"]
    assert found["environment"]["threads"] == torch.get_num_threads()


def test_what_cannot_be_measured_is_listed_with_its_reason(examples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured("methods=[example,alone]", "example.refuse=true")
    assert list(rows(found)) == ["alone"]
    assert {each["name"] for each in found["failed"]} == {"example (alone)", "example (main)"}
    assert all("too wide for it" in each["reason"] for each in found["failed"])
    found = measured("methods=[example,alone]", "example.breaks=true")
    assert {each["reason"] for each in found["failed"]} == {"RuntimeError: shapes do not fit"}
    assert list(rows(found)) == ["alone"]

    original, count = Timings.add_round, [0]

    def breaks_later(self: Timings, *arguments: Any, **options: Any) -> None:
        count[0] += 1
        if self.run.method["name"] == "example" and self.call.__name__ == "eager" and count[0] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        original(self, *arguments, **options)

    monkeypatch.setattr(Timings, "add_round", breaks_later)
    found = measured("methods=[example,alone]", rounds=3)
    assert list(rows(found)) == ["alone"]
    assert {each["reason"] for each in found["failed"]} == {"OutOfMemoryError: CUDA out of memory."}
    assert rows(found)["alone"]["over"] == {"alone": 1.0, "example": None}


def test_references_that_are_not_there_are_done_without(examples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    refer_to(monkeypatch, "alone", "lost")
    found = rows(measured("methods=[example]"))
    assert found["example (main)"]["over"]["alone"] > 0
    assert found["example (main)"]["over"]["lost"] is None
    refer_to(monkeypatch, "alone", "example")
    chosen = checked(Settings, FEW | {"methods": ("alone",)})
    found = rows(measure_step("digits", ["student=resnet8", *TINY[1:]], chosen, console=QUIET))
    assert list(found) == ["alone"]
