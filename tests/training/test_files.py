"""A checkpoint is whole or not there, wherever the power goes; what was changed afterwards is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vrm.training import files
from vrm.training.files import DamagedCheckpoint, read_checkpoint, write_checkpoint, write_text
from vrm.training.run_folder import RunFolder

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "c": torch.ones(4, dtype=torch.bfloat16)}


class PowerCut(BaseException):
    """Ends the writing where it stands."""


@contextmanager
def power_cut(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[list[str]]:
    """Let ``after`` file operations happen, and not one more."""
    done: list[str] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if len(done) == after:
                raise PowerCut
            done.append(name)
            return original(*arguments, **options)

        return operation

    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync", counted("fsync", files.fsync))
        patch.setattr(files, "save_file", counted("tensors", files.save_file))
        patch.setattr(shutil, "rmtree", counted("rmtree", shutil.rmtree))
        for name in ("mkdir", "write_text", "rename", "replace"):
            patch.setattr(Path, name, counted(name, getattr(Path, name)))
        yield done


def checkpoint(folder: RunFolder, step: int) -> None:
    write_checkpoint(folder.checkpoint_path(step), {"step": torch.tensor(step)}, {"step": step})


@pytest.mark.parametrize("rewritten", [False, True])
def test_power_cut_between_any_two_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewritten: bool) -> None:
    """The checkpoint before remains, or the new one is whole; and the next attempt succeeds."""
    after = 0
    finished = False
    while not finished:
        folder = RunFolder(tmp_path / f"run{after}")
        checkpoint(folder, 1)
        if rewritten:
            checkpoint(folder, 2)
        with power_cut(monkeypatch, after) as done:
            try:
                checkpoint(folder, 2)
                finished = True
            except PowerCut:
                assert len(done) == after
        newest = folder.newest()
        assert newest is not None
        tensors, state, complaints = newest
        assert complaints == []
        assert state["step"] == int(tensors["step"]) in (1, 2)
        assert not finished or state["step"] == 2
        checkpoint(folder, 2)
        assert folder.newest()[1]["step"] == 2  # type: ignore[index]
        folder.close()
        after += 1
    assert after > 8


def test_everything_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with power_cut(monkeypatch, after=1000) as done:
        write_checkpoint(tmp_path / "step-1", TENSORS, {"step": 1})
    content, manifest = ["mkdir", "tensors", "write_text", "fsync", "fsync"], ["write_text", "fsync"]
    assert done == [*content, *manifest, "fsync", "rename", "fsync"]
    with power_cut(monkeypatch, after=1000) as done:
        write_text(tmp_path / "a.txt", "a")
    assert done == ["write_text", "fsync", "replace", "fsync"]


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "quarter": cut(0.25),
    "half": cut(0.5),
    "99 %": cut(0.99),
    "last byte": shorten,
    "one bit": flip,
    "empty": empty,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        checkpoint(folder, step)
    DAMAGES[damage](folder.checkpoint_path(2) / name)
    found = folder.newest()
    assert found is not None
    assert found[1]["step"] == 1
    assert len(found[2]) == 1
    assert str(folder.checkpoint_path(2)) in found[2][0]
    folder.close()


def test_files_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / f"step-{step}", {"x": torch.tensor(step)}, {"step": step})
    shutil.copy(tmp_path / "step-1" / "tensors.safetensors", tmp_path / "step-2" / "tensors.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"tensors\.safetensors does not have the SHA-256"):
        read_checkpoint(tmp_path / "step-2")


@pytest.mark.parametrize(
    "manifest",
    [
        {"schema": 99, "sha256": {}},
        {"schema": 2, "sha256": {"../../secret": "0"}},
        {"schema": 2, "sha256": {"state.json": "0"}},
        {"schema": 2, "sha256": []},
        {"schema": 1, "sha256": {}},
        {"schema": True, "step": 1, "sha256": {}},
        {"schema": 2},
        [],
        "text",
        None,
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, manifest: object) -> None:
    write_checkpoint(tmp_path / "step-1", TENSORS, {"step": 1})
    (tmp_path / "step-1" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="step-1"):
        read_checkpoint(tmp_path / "step-1")


@given(st.binary(max_size=200))
def test_any_bytes_as_a_manifest_are_refused(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name) / "step-1", TENSORS, {"step": 1})
        (Path(name) / "step-1" / "manifest.json").write_bytes(content)
        with pytest.raises(DamagedCheckpoint):
            read_checkpoint(Path(name) / "step-1")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step-1", TENSORS, {"step": 1, "best": {"top1": 0.1 + 0.2}})
    tensors, state = read_checkpoint(tmp_path / "step-1")
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in TENSORS
    )
    assert state == {"step": 1, "best": {"top1": 0.1 + 0.2}}
