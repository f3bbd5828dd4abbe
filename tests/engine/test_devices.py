"""The device of a run, in words."""

from __future__ import annotations

import pytest
import torch

from vrm.engine.devices import device_name


@pytest.mark.parametrize(("number", "words"), [(1, ", 1 thread)"), (2, ", 2 threads)")])
def test_threads_are_counted_in_words(number: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: number)
    assert device_name(torch.device("cpu")).endswith(words)
