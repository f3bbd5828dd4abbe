"""Every method against reference vectors of released code: value, gradients, state after the step."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import CASES
from .harness import Golden, golden_folder

LAYOUT_OF_THEIR_OWN = ("models_cifar", "randaugment_torchssl")
FILES = sorted(path for path in golden_folder().glob("*.safetensors") if not path.stem.startswith(LAYOUT_OF_THEIR_OWN))
BY_KEY = {key: case for case in CASES for key in (case.name, *case.golden_keys)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    golden = Golden(path)
    method = golden.spec.get("method")
    case = BY_KEY.get(method)
    assert case is not None, f"{path.name} is of the unknown method {method!r}"
    assert case.golden is not None, f"{case.name} has reference vectors but its CASE has no golden adapter"
    case.check(golden, case.golden(golden))
