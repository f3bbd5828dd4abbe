"""Files of strangers: nothing in them is run, and nothing of ours could be."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import pickletools
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import vrm
from vrm.config import ConfigError
from vrm.models import create, load_weights
from vrm.runs import api as runs
from vrm.runs.errors import RunError
from vrm.runs.folder import read_run, read_settings
from vrm.runs.resumption import decide_resumption

from .small import QUIET, small, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(small(run, "method=ce", "checkpoint.every=4"))
    return run


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("form", ["archive", "pickle"])
def test_no_pickle_is_ever_run(whole: Path, tmp_path: Path, form: str) -> None:
    """As teacher, as student, as a run folder, as every single file of one: nothing is run, everything is explained."""
    sentinel = tmp_path / "executed"
    evil = tmp_path / "evil.pth"
    if form == "archive":
        torch.save({"model": Evil(sentinel)}, evil)
    else:
        evil.write_bytes(pickle.dumps(Evil(sentinel)))
    bytes_ = evil.read_bytes()
    names = [evil, *(evil.with_suffix(suffix) for suffix in (".pt", ".tar", ".safetensors", ".ckpt"))]
    for path in names:
        path.write_bytes(bytes_)
        for words in (
            ["method=kd", "teacher=resnet8", f"teacher.weights={path}"],
            ["method=ce", f"student.weights={path}"],
            ["method=kd", f"teacher={path}"],
        ):
            with pytest.raises((ConfigError, RunError), match=re.escape(str(path))):
                train(small(tmp_path / "run", *words))
        with pytest.raises(RunError, match="is not a run folder"):
            runs.resume(path, console=QUIET, quiet=True)
    shutil.copytree(whole, tmp_path / "whole")
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file():
            before = path.read_bytes()
            path.write_bytes(bytes_)
            with contextlib.suppress(ConfigError, RunError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_run(tmp_path / "whole")
                decide_resumption(tmp_path / "whole", read_settings(tmp_path / "whole"))
            with contextlib.suppress(ConfigError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                small(tmp_path / "x", "method=kd", f"teacher={tmp_path / 'whole'}/")
            with contextlib.suppress(ValueError):
                load_weights(create("resnet8", num_classes=10), tmp_path / "whole")
            path.write_bytes(before)
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(Evil(sentinel)))
    assert sentinel.exists(), "it would have worked"


def test_a_card_cannot_have_other_files_opened(whole: Path, tmp_path: Path) -> None:
    """Options on a card reach the network's constructor; those of timm that name files of weights are refused."""
    pytest.importorskip("timm")
    sentinel, evil = tmp_path / "executed", tmp_path / "evil.pth"
    torch.save(Evil(sentinel), evil)
    shutil.copytree(whole, tmp_path / "teacher")
    card = json.loads((tmp_path / "teacher" / "model.json").read_text())
    (tmp_path / "teacher" / "manifest.json").unlink()
    for options in (
        {"checkpoint_path": str(evil)},
        {"pretrained": True, "pretrained_cfg_overlay": {"file": str(evil)}},
        {"pretrained": True, "pretrained_cfg": {"file": str(evil), "architecture": "resnet10t"}},
    ):
        changed = card | {"architecture": "timm:resnet10t", "options": options}
        (tmp_path / "teacher" / "model.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match="would load weights unchecked"):
            train(small(tmp_path / "run", "method=kd", f"teacher={tmp_path / 'teacher'}/"))
    assert not sentinel.exists()


def test_what_a_run_leaves_is_text_and_safetensors(whole: Path) -> None:
    for path in whole.rglob("*"):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        else:
            content.decode("utf-8")
        assert not content.startswith((b"PK", b"\x80"))
        with pytest.raises((ValueError, IndexError)):
            list(pickletools.genops(content[:100_000] or b"{"))


CODE = sorted(Path(vrm.__file__).parent.rglob("*.py"))
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.dump", "pickle.dumps", "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open"),
    *("torch.save", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "joblib.load"),
    *("cloudpickle.dump", "dill.load", "numpy.load", "np.load", "tempfile.mktemp", "extractall", "unpack_archive"),
}


def called(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_the_source_runs_no_foreign_code() -> None:
    """No pickle is written or opened with code, no eval, no shell, no unsafe YAML; the exceptions are named."""
    allowed = {("words.py", "yaml.load")}  # with a loader of its own, stricter than the safe one
    found = set()
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = called(node.func)
            words = {keyword.arg: keyword.value for keyword in node.keywords}
            where = f"{path}:{node.lineno}"
            if name in FORBIDDEN or name.rpartition(".")[2] in ("extractall", "unpack_archive"):
                found.add((path.name, name))
            if name == "torch.load":
                assert isinstance(words.get("weights_only"), ast.Constant), where
                assert words["weights_only"].value is True, where
            assert "shell" not in words, where
            assert "allow_pickle" not in words, where
            if name.endswith("Unpickler"):
                assert path.name == "pickles.py", where
    assert found == allowed
