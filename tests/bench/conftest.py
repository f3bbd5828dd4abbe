from __future__ import annotations

import pytest

from vrm import methods
from vrm.bench import comparison, subjects
from vrm.contract import Method

from .small import Alone, Example


def refer_to(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Measure these references with every method."""
    for module in (subjects, comparison):
        monkeypatch.setattr(module, "REFERENCES", names)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more methods, which are also the references."""
    known: dict[str, type[Method]] = {"example": Example, "alone": Alone}
    load, names = methods.load, methods.names()
    monkeypatch.setattr(methods, "load", lambda name: known.get(name) or load(name))
    monkeypatch.setattr(methods, "names", lambda: tuple(sorted({*names, *known})))
    refer_to(monkeypatch, "alone", "example")
