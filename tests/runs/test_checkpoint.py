"""A checkpoint is whole or not there, whoever is killed where; what was changed afterwards is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vrm.files import Damaged, NotWritten, read_bytes, remove_remains, write_json, write_text
from vrm.runs.checkpoint import DamagedCheckpoint, checkpoint_path, read_checkpoint, write_checkpoint

from .faults import DAMAGES, every_error, every_kill, failing, files, flip, mounted, operations, remount
from .small import STATE

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "c": torch.ones(4, dtype=torch.bfloat16)}
NAMES = ("tensors.safetensors", "state.json", "manifest.json")


def checkpoint(folder: Path, step: int, *, value: int | None = None) -> Path:
    path = checkpoint_path(folder, step)
    tensors = TENSORS | {"value": torch.tensor(step if value is None else value)}
    write_checkpoint(path, tensors, STATE | {"step": step})
    return path


def value(folder: Path, step: int) -> int:
    """What was written in the checkpoint of a step, which is whole."""
    return int(read_checkpoint(checkpoint_path(folder, step)).tensors["value"])


# ---- kills -----------------------------------------------------------------------------------------------------------


def test_killed_at_any_operation(tmp_path: Path) -> None:
    """The checkpoint of another step stays whole. One that is written again is the old one or the new one."""

    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        def before() -> None:
            checkpoint(tmp_path / str(at), 1)
            checkpoint(tmp_path / str(at), 2, value=-2)

        return before, lambda: checkpoint(tmp_path / str(at), 2) and None

    seen = set()
    for at in every_kill(make):
        folder = tmp_path / str(at)
        remove_remains(folder)
        assert sorted(os.listdir(folder)) == ["step-000000001", "step-000000002"]
        assert value(folder, 1) == 1
        seen.add(value(folder, 2))
        checkpoint(folder, 2)
        assert value(folder, 2) == 2
    assert at > 12
    assert seen == {-2, 2}


def test_killed_while_a_text_is_replaced(tmp_path: Path) -> None:
    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        path = tmp_path / str(at) / "a.txt"
        path.parent.mkdir()
        return lambda: write_text(path, "old"), lambda: write_text(path, "new")

    seen = []
    for at in every_kill(make):
        folder = tmp_path / str(at)
        seen.append((folder / "a.txt").read_text())
        remove_remains(folder)
        assert os.listdir(folder) == ["a.txt"]
    assert seen == sorted(seen, reverse=True)
    assert {*seen} == {"old", "new"}


# ---- disks that are full, read-only, broken --------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("lasting", [False, True])
def test_an_error_at_any_operation(tmp_path: Path, reason: int, lasting: bool) -> None:
    """What lay there stays, nothing half-written does, and the message says why."""

    def make(at: int) -> Callable[[], object]:
        checkpoint(tmp_path / str(at), 1)
        return lambda: checkpoint(tmp_path / str(at), 2)

    for at, error in every_error(reason, make, lasting=lasting):
        folder = tmp_path / str(at)
        assert value(folder, 1) == 1
        assert set(os.listdir(folder)) - {"step-000000002"} == {"step-000000001"}, "no partial folder"
        if error is not None:
            assert isinstance(error, NotWritten)
            assert error.errno == reason
            assert f"{folder / 'step-000000002'} could not be written: {os.strerror(reason)}" in str(error)
            assert ("B are free" in str(error)) == (reason in (errno.ENOSPC, errno.EDQUOT))
        if error is None or (folder / "step-000000002").exists():  # only the last flush failed
            assert value(folder, 2) == 2
        checkpoint(folder, 2)
    assert error is None
    assert at > 12


def test_an_error_at_any_operation_keeps_an_older_one_of_the_same_step(tmp_path: Path) -> None:
    def make(at: int) -> Callable[[], object]:
        checkpoint(tmp_path / str(at), 2, value=-2)
        return lambda: checkpoint(tmp_path / str(at), 2)

    for at, _ in every_error(errno.ENOSPC, make):
        remove_remains(tmp_path / str(at))
        assert os.listdir(tmp_path / str(at)) == ["step-000000002"]
        assert value(tmp_path / str(at), 2) in (-2, 2)


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "tmpfs", "-o", "size=200k") as folder:
        checkpoint(folder, 1)
        with pytest.raises(NotWritten, match=r"No space left on device \(\d+ kB are free\)"):
            write_checkpoint(folder / "step-000000002", {"x": torch.zeros(10**5)}, STATE | {"step": 2})
        assert os.listdir(folder) == ["step-000000001"]
        assert value(folder, 1) == 1
        (folder / "filler").write_bytes(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize))
        with pytest.raises(NotWritten, match="No space left"):
            write_json(folder / "model.json", {"a": "x" * 5000})
        assert sorted(os.listdir(folder)) == ["filler", "step-000000001"]


def test_a_read_only_disk_for_real(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "tmpfs") as folder:
        checkpoint(folder, 1)
        remount(folder, "remount,ro")
        for write in (lambda: checkpoint(folder, 2), lambda: write_text(folder / "a", "a")):
            with pytest.raises(NotWritten, match="Read-only file system"):
                write()
        assert value(folder, 1) == 1


def test_the_watched_operations_are_all_that_write(tmp_path: Path) -> None:
    """A kill can be put between any two: a stopped writer leaves nothing that no operation was counted for."""
    with operations(failing(errno.EIO), lambda number: True), pytest.raises(NotWritten):
        checkpoint(tmp_path, 1)
    assert files(tmp_path) == {}


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001"
    write_checkpoint(path, TENSORS, STATE | {"step": 1, "best": {"top1": 0.1 + 0.2}})
    found = read_checkpoint(path)
    assert found.step == 1
    assert found.state == STATE | {"step": 1, "best": {"top1": 0.1 + 0.2}}
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=0, atol=0)
        found.tensors[name].add_(1)  # it is the reader's own


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path = checkpoint(tmp_path, 1)
    DAMAGES[damage](path / name)
    sum_changed = (name, damage) == ("manifest.json", "one bit")  # then it is a file that does not fit its manifest
    with pytest.raises(DamagedCheckpoint, match="of its manifest" if sum_changed else str(path / name)):
        read_checkpoint(path)


@given(name=st.sampled_from(NAMES), place=st.floats(0, 1, exclude_max=True))
def test_one_bit_anywhere_is_found(name: str, place: float) -> None:
    with TemporaryDirectory() as folder:
        path = checkpoint(Path(folder), 1)
        flip(path / name, int(place * 8 * (path / name).stat().st_size))
        with pytest.raises(DamagedCheckpoint, match=str(path)):
            read_checkpoint(path)


@pytest.mark.parametrize("name", NAMES)
def test_files_of_another_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    one, two = (checkpoint(tmp_path, step) for step in (1, 2))
    shutil.copy(one / name, two / name)
    with pytest.raises(DamagedCheckpoint, match=str(two / name)):
        read_checkpoint(two)


def test_a_whole_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1).rename(tmp_path / "step-000000002")
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is of step 1: it was moved here"):
        read_checkpoint(tmp_path / "step-000000002")
    (tmp_path / "step-000000002").rename(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="is no checkpoint: those are called step-"):
        read_checkpoint(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="is no folder"):
        read_checkpoint(tmp_path / "step-000000007")


SUM = "0" * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[
            (lambda m, value=value: m.update(format=value), f"was written in format {value!r}; .* reads format 3 alone")
            for value in (1, 99, "3", 3.0, True, None)
        ],
        (lambda m: m.update(schema=m.pop("format") - 1), "was written in format 2; .* reads format 3 alone"),
        (lambda m: m.update(step=2), "is of step 2"),
        (lambda m: m.pop("step"), "is of step None"),
        (lambda m: m.pop("sha256"), "must name"),
        (lambda m: m.update(sha256=[]), "must name"),
        (lambda m: m["sha256"].pop("state.json"), "must name"),
        *[
            (lambda m, name=name: m["sha256"].update({name: SUM}), "must name")
            for name in ("../secret", "/etc/passwd", "a/b", "", "x" * 10**5, "\0")
        ],
        *[
            (lambda m, value=value: m["sha256"].update({"state.json": value}), r"state\.json does not have the SHA-256")
            for value in (SUM, None, [SUM])
        ],
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = checkpoint(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match=f"{path}.*{message}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "null", '"text"', "{", "[" * 10**5, '{"format": 3' + "0" * 5000 + "}"]
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    path = checkpoint(tmp_path, 1)
    (path / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=str(path / "manifest.json")):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "tensors.safetensors.bak", "pickle.pth"])
def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path, 1)
    (path / name).write_text("x")
    with pytest.raises(DamagedCheckpoint, match=f"{name} does not belong to the checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", NAMES)
def test_links_pipes_and_folders_are_no_files_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path, 1)
    (path / name).rename(tmp_path / name)
    for make, message in (
        (lambda file: file.symlink_to(tmp_path / name), "is a link"),
        (os.mkfifo, "is no plain file"),  # whoever opens one to read waits for a writer
        (Path.mkdir, "is no plain file"),
    ):
        make(path / name)
        with pytest.raises(DamagedCheckpoint, match=f"{name} {message}"):
            read_checkpoint(path)
        (path / name).rmdir() if (path / name).is_dir() else (path / name).unlink()
    (tmp_path / "step-000000002").symlink_to(path)
    with pytest.raises(DamagedCheckpoint, match="is no folder"):
        read_checkpoint(tmp_path / "step-000000002")


# ---- single files ----------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(11))
    for path, message in (
        (tmp_path / "b", "b is missing"),
        (tmp_path / ("x" * 1000), "cannot be read"),
        (Path("a\0b"), "cannot be read"),
        (Path("/dev/zero"), "is no plain file"),
        (tmp_path / "a", "has 11 bytes, at most 10 are read"),
    ):
        with pytest.raises(Damaged, match=message):
            read_bytes(path, largest=10)


def test_files_are_made_with_the_rights_that_the_user_chose(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = checkpoint(tmp_path, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((path / "state.json").stat().st_mode) == 0o640
