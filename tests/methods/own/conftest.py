"""Collect a method's test only while the method's file exists."""

from __future__ import annotations

from pathlib import Path

from vrm import methods

collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("test_*.py")
    if path.stem.removeprefix("test_") not in methods.names()
]
