"""Passes side by side: what waits for what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs.small import small, train
from vrm.engine import streams as module
from vrm.engine.distiller import Distiller
from vrm.engine.streams import SideStreams
from vrm.engine.teacher_cache import TeacherCache
from vrm.runs import phase


class Streams:
    """CUDA's streams as names, and what was asked of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.current = self.Stream(self, "main")
        patch.setattr(module, "_stream", cache(module._stream.__wrapped__))
        patch.setattr(torch.cuda, "Stream", lambda device: self.Stream(self, f"stream {len(self.made())}"))
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "stream", self.within)

    class Stream:
        def __init__(self, owner: Streams, name: str) -> None:
            self.owner, self.name = owner, name
            owner.told.append(f"made {name}")

        def wait_stream(self, other: Any) -> None:
            self.owner.told.append(f"{self.name} waits for {other.name}")

    def made(self) -> list[str]:
        return [each for each in self.told if each.startswith("made stream")]

    @contextmanager
    def within(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def work(self, name: str) -> None:
        self.told.append(f"{name} in {self.current.name}")


def test_side_streams_start_after_what_is_queued_and_join_before_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    for _ in range(2):
        side = SideStreams(torch.device("cuda"))
        side.join()  # nothing was begun: a recording may not wait for work outside of it
        for number in range(2):
            with side.on(number):
                streams.work(f"pass {number}")
        streams.work("student")
        side.join()
        streams.work("losses")
    once = [
        *("stream 0 waits for main", "pass 0 in stream 0", "stream 1 waits for main", "pass 1 in stream 1"),
        *("student in main", "main waits for stream 0", "main waits for stream 1", "losses in main"),
    ]
    told = [each for each in streams.told if not each.startswith("made")]
    assert told == 2 * once
    assert len(streams.made()) == 2, "the same streams for every step, whosever it is"


@pytest.mark.parametrize("cached", [False, True])
def test_a_step_joins_before_it_reads_what_the_teacher_says(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    told: list[str] = []

    class Told(SideStreams):
        @contextmanager
        def on(self, number: int) -> Iterator[None]:
            told.append(f"stream {number}")
            yield

        def join(self) -> None:
            told.append("join")

    def telling(owner: type, name: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **more: told.append(name) or function(*given, **more))

    monkeypatch.setattr(phase, "SideStreams", Told)
    telling(Distiller, "_losses")
    telling(TeacherCache, "record")
    words = [f"teacher.cache={tmp_path / 'cache'}"] if cached else []
    train(small(tmp_path / "run", "method=vrm", f"teacher={teacher}/", "steps=2", *words))
    recorded = ["join", "record"] if cached else []
    each = ["stream 0", "stream 1", *recorded, "join", "_losses"]
    assert told[-2 * len(each) :] == 2 * each  # the rehearsal comes before
