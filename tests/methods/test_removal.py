"""A method is its file, its test with its case, its vectors and its page; without them everything else works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from vrm import methods

from .cases import CASES

ROOT = Path(__file__).parents[2]
BY_WAY_OF_IT = """
from vrm import methods
from vrm.config import resolve


def test_run() -> None:
    resolve("distill", "digits", ["method={name}", "student=resnet8", "teacher=resnet20"])


def test_class() -> None:
    import vrm.methods.{name}


def test_misspelt() -> None:
    methods.load("{name}x")


def test_other() -> None:
    methods.load("{other}")
"""


def test_a_method_can_be_taken_away(tmp_path: Path) -> None:
    """Take one with a memory, if there is one. Tests that use it are skipped, and all others pass."""
    name = next((case.name for case in CASES if case.small), CASES[0].name)
    other = next(each for each in methods.names() if each != name)
    for part in ("src", "tests", "docs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / f"src/vrm/methods/{name}.py").unlink()
    (tmp_path / f"docs/methods/{name}.md").unlink()
    (tmp_path / f"tests/methods/own/test_{name}.py").unlink()
    for golden in (tmp_path / "tests/goldens").glob(f"{name}_*"):
        golden.unlink()
    (tmp_path / "tests/test_by_way_of_it.py").write_text(BY_WAY_OF_IT.format(name=name, other=other))

    quick = [f"tests/methods/{path}" for path in ("test_golden.py", "test_page.py")]
    quick += ["tests/methods/test_contract.py::test_every_method_has_a_case", "tests/test_by_way_of_it.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rsf", *quick],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "src")}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.count(f"the method {name} is not here") == 2, run.stdout
    assert re.findall(r"^FAILED (\S+)", run.stdout, flags=re.MULTILINE) == [
        "tests/test_by_way_of_it.py::test_misspelt"
    ], run.stdout
    assert re.search(r"1 failed, \d\d+ passed, 2 skipped", run.stdout), run.stdout
