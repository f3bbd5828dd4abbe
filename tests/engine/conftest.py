"""What the tests of the step share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.small import make_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a trained teacher, which no test changes."""
    return make_teacher(tmp_path_factory.mktemp("teacher") / "run")
