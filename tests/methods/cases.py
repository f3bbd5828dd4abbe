"""The methods under test: the ``CASE`` of each method that is there, from ``own/test_NAME.py``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from vrm import methods

from .harness import Case

OWN = Path(__file__).parent / "own"
CASES: tuple[Case, ...] = tuple(
    import_module(f"{__package__}.own.test_{name}").CASE
    for name in methods.names()
    if (OWN / f"test_{name}.py").is_file()
)
