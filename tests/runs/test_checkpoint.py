"""A checkpoint is whole or not there, whoever is killed where; what was changed afterwards is refused by name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
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

from vrm.runs.checkpoint import (
    Damaged,
    DamagedCheckpoint,
    NotWritten,
    clear,
    make_folder,
    read_bytes,
    read_checkpoint,
    read_json,
    remove_folder,
    sealed,
    write_checkpoint,
    write_json,
    write_text,
)

from .faults import DAMAGES, OPERATIONS, every_kill, failing, files, flip, kill, mounted, operations, remount

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3), "c": torch.ones(4, dtype=torch.bfloat16)}
NAMES = ("tensors.safetensors", "state.json", "metrics.jsonl", "manifest.json")
WRITING = ("open", "write", "fsync", "mkdir", "rename", "replace")
NEVER: Callable[[int], bool] = lambda number: False  # noqa: E731


def checkpoint(folder: Path, step: int, *, value: int | None = None) -> Path:
    path = folder / f"step-{step:09d}"
    tensors = TENSORS | {"value": torch.tensor(step if value is None else value)}
    write_checkpoint(path, tensors, {"step": step}, {"metrics.jsonl": b'{"step": 1}\n' * step})
    return path


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewritten", [False, True])
def test_killed_at_any_operation(tmp_path: Path, rewritten: bool) -> None:
    """The checkpoint of another step stays whole. One of the same step is the old one or the new one."""

    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        def before() -> None:
            checkpoint(tmp_path / str(at), 1)
            if rewritten:
                checkpoint(tmp_path / str(at), 2, value=-2)

        return before, lambda: checkpoint(tmp_path / str(at), 2) and None

    seen = set()
    for at in every_kill(make):
        folder = tmp_path / str(at)
        clear(folder)
        assert sorted(os.listdir(folder)) in (["step-000000001"], ["step-000000001", "step-000000002"])
        assert int(read_checkpoint(folder / "step-000000001")[0]["value"]) == 1
        if (folder / "step-000000002").exists():
            seen.add(int(read_checkpoint(folder / "step-000000002")[0]["value"]))
        else:
            assert not rewritten
            seen.add(0)
        checkpoint(folder, 2)
        assert int(read_checkpoint(folder / "step-000000002")[0]["value"]) == 2
    assert at > 15
    assert seen == ({-2, 2} if rewritten else {0, 2})


def test_killed_while_a_checkpoint_is_removed(tmp_path: Path) -> None:
    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        folder = tmp_path / str(at)
        return lambda: checkpoint(folder, 1) and None, lambda: remove_folder(folder / "step-000000001")

    for at in every_kill(make):
        folder = tmp_path / str(at)
        clear(folder)
        for path in folder.iterdir():
            read_checkpoint(path)
        assert (at == 0) == (folder / "step-000000001").exists()
    assert at == 6


def test_killed_while_it_is_cleared(tmp_path: Path) -> None:
    """A writer was killed after it had put the old one aside, then who cleans up, anywhere."""

    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        folder = tmp_path / str(at)

        def before() -> None:
            checkpoint(folder, 1).rename(folder / ".step-000000001.old")
            checkpoint(folder, 2).rename(folder / ".step-000000002.new")
            checkpoint(folder, 3).rename(folder / ".step-000000003.gone")
            (folder / ".model.json.77.tmp").touch()

        return before, lambda: clear(folder)

    for at in every_kill(make):
        folder = tmp_path / str(at)
        clear(folder)
        assert os.listdir(folder) == ["step-000000001"]
        assert int(read_checkpoint(folder / "step-000000001")[0]["value"]) == 1
    assert at > 10


def test_killed_while_a_text_is_replaced(tmp_path: Path) -> None:
    def make(at: int) -> tuple[Callable[[], None], Callable[[], None]]:
        path = tmp_path / str(at) / "a.txt"
        path.parent.mkdir()
        return lambda: write_text(path, "old"), lambda: write_text(path, "new")

    for at in every_kill(make):
        folder = tmp_path / str(at)
        assert (folder / "a.txt").read_text() == ("old" if at < 4 else "new")
        clear(folder)
        assert os.listdir(folder) == ["a.txt"]
    assert at == 5


def test_everything_is_flushed_before_the_manifest_and_before_it_is_renamed(tmp_path: Path) -> None:
    with operations(kill, NEVER) as done:
        checkpoint(tmp_path, 1)
    one = ["open", "write", "fsync"]
    assert done == ["mkdir", *one, *one, *one, *one, "fsync", "rename", "fsync"]
    with operations(kill, NEVER) as done:
        write_text(tmp_path / "a.txt", "a")
    assert done == [*one, "replace", "fsync"]
    with operations(kill, NEVER) as done:
        make_folder(tmp_path / "x" / "y")
    assert done == ["mkdir", "fsync", "mkdir", "fsync"]


# ---- disks that are full, read-only, broken --------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("lasting", [False, True])
def test_an_error_at_any_operation(tmp_path: Path, reason: int, lasting: bool) -> None:
    """What lay there stays, nothing half-written does, and the message says why."""
    at = 0
    while True:
        folder = tmp_path / str(at)
        checkpoint(folder, 1)

        def now(number: int, at: int = at) -> bool:
            return number == at or (lasting and number > at and done[number] in WRITING)

        failed: NotWritten | None = None
        with operations(failing(reason), now) as done:
            try:
                checkpoint(folder, 2)
            except NotWritten as error:
                failed = error
        if failed is None:
            break
        assert failed.errno == reason
        assert f"{folder / 'step-000000002'} could not be written: {os.strerror(reason)}" in str(failed)
        assert ("MB are free" in str(failed)) == (reason in (errno.ENOSPC, errno.EDQUOT))
        assert int(read_checkpoint(folder / "step-000000001")[0]["value"]) == 1
        left = set(os.listdir(folder)) - {"step-000000001"}
        assert left <= {"step-000000002"}, "no partial folder"
        if left:  # only the last flush failed
            read_checkpoint(folder / "step-000000002")
        checkpoint(folder, 2)
        at += 1
    assert at == len(done)
    assert at > 14


def test_an_error_at_any_operation_keeps_an_older_one_of_the_same_step(tmp_path: Path) -> None:
    at = 0
    while True:
        folder = tmp_path / str(at)
        checkpoint(folder, 2, value=-2)
        with (
            operations(failing(errno.ENOSPC), lambda number, at=at: number == at) as done,
            contextlib.suppress(OSError),
        ):
            checkpoint(folder, 2)
        clear(folder)
        assert os.listdir(folder) == ["step-000000002"]
        assert int(read_checkpoint(folder / "step-000000002")[0]["value"]) in (-2, 2)
        if at >= len(done):
            break
        at += 1


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "tmpfs", "-o", "size=200k") as folder:
        checkpoint(folder, 1)
        large = {"x": torch.zeros(10**5)}
        with pytest.raises(NotWritten, match=r"No space left on device \(0\.[12] MB are free\)"):
            write_checkpoint(folder / "step-000000002", large, {"step": 2})
        assert os.listdir(folder) == ["step-000000001"]
        read_checkpoint(folder / "step-000000001")
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
        read_checkpoint(folder / "step-000000001")


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path = checkpoint(tmp_path, 1)
    DAMAGES[damage](path / name)
    with pytest.raises(DamagedCheckpoint) as refused:
        read_checkpoint(path)
    assert str(path / name) in str(refused.value)


@given(name=st.sampled_from(NAMES), place=st.floats(0, 1, exclude_max=True))
def test_one_bit_anywhere_is_found(name: str, place: float) -> None:
    with TemporaryDirectory() as folder:
        path = checkpoint(Path(folder), 1)
        flip(path / name, int(place * 8 * (path / name).stat().st_size))
        with pytest.raises(DamagedCheckpoint, match=str(path)):
            read_checkpoint(path)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001"
    write_checkpoint(path, TENSORS, {"step": 1, "best": {"top1": 0.1 + 0.2}})
    tensors, state = read_checkpoint(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in TENSORS
    )
    assert state == {"step": 1, "best": {"top1": 0.1 + 0.2}}
    for tensor in tensors.values():
        tensor.add_(1)  # it is the reader's own


@pytest.mark.parametrize("name", NAMES)
def test_files_of_another_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    one, two = (checkpoint(tmp_path, step) for step in (1, 2))
    shutil.copy(one / name, two / name)
    with pytest.raises(DamagedCheckpoint, match=str(two / ("manifest.json" if name == "manifest.json" else name))):
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


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, seal: bool) -> None:
    """Change a manifest; with ``seal`` so that its own sum fits."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(sealed(manifest) if seal else json.dumps(manifest))


SUM = "0" * 64


@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=1), "was written with schema 1; this version of vrm reads schema 2 alone"),
        (lambda m: m.update(schema=99), "was written with schema 99"),
        (lambda m: m.update(schema="2"), "was written with schema '2'"),
        (lambda m: m.update(schema=2.0), r"was written with schema 2\.0"),
        (lambda m: m.update(schema=True), "was written with schema True"),
        (lambda m: m.pop("schema"), "was written with schema None"),
        (lambda m: m.update(step=2), "is of step 2"),
        (lambda m: m.update(step=True), "is of step True"),
        (lambda m: m.pop("step"), "is of step None"),
        (lambda m: m.pop("sha256"), "must name"),
        (lambda m: m.update(sha256=[]), "must name"),
        (lambda m: m.update(sha256={}), "must name"),
        (lambda m: m["sha256"].pop("state.json"), "must name"),
        (lambda m: m["sha256"].update({"../secret": SUM}), "must name"),
        (lambda m: m["sha256"].update({"/etc/passwd": SUM}), "must name"),
        (lambda m: m["sha256"].update({"a/b": SUM}), "must name"),
        (lambda m: m["sha256"].update({"": SUM}), "must name"),
        (lambda m: m["sha256"].update({"x" * 10**5: SUM}), "must name"),
        (lambda m: m["sha256"].update({"\0": SUM}), "must name"),
        (lambda m: m["sha256"].update({"state.json": SUM}), r"state\.json does not have the SHA-256"),
        (lambda m: m["sha256"].update({"state.json": None}), r"state\.json does not have the SHA-256"),
        (lambda m: m["sha256"].update({"state.json": [SUM]}), r"state\.json does not have the SHA-256"),
        (lambda m: m["sha256"].update({"timings.jsonl": SUM}), r"timings\.jsonl is missing"),
        (lambda m: m["sha256"].pop("metrics.jsonl"), r"metrics\.jsonl does not belong to the checkpoint"),
    ],
)
def test_an_edited_manifest_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str, seal: bool
) -> None:
    path = checkpoint(tmp_path, 1)
    edit(path, change, seal=seal)
    if not seal and "schema" not in message:
        message = r"manifest\.json does not have the SHA-256 in its seal"
    with pytest.raises(DamagedCheckpoint, match=message) as refused:
        read_checkpoint(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "null", '"text"', "{", "[" * 10**5, '{"schema": 1' + "0" * 5000 + "}"]
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    path = checkpoint(tmp_path, 1)
    (path / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=str(path / "manifest.json")):
        read_checkpoint(path)


def test_a_sum_edited_together_with_its_file_is_refused_by_the_seal(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1)
    (path / "state.json").write_text('{"step": 1, "best": {}}')
    total = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    edit(path, lambda m: m["sha256"].update({"state.json": total}), seal=False)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json does not have the SHA-256 in its seal"):
        read_checkpoint(path)
    edit(path, lambda m: m.pop("seal"), seal=False)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json has no seal"):
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
    (path / name).symlink_to(tmp_path / name)
    with pytest.raises(DamagedCheckpoint, match=f"{name} is a link"):
        read_checkpoint(path)
    (path / name).unlink()
    os.mkfifo(path / name)  # whoever opens one to read waits for a writer
    with pytest.raises(DamagedCheckpoint, match=f"{name} is no plain file"):
        read_checkpoint(path)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(DamagedCheckpoint, match=f"{name} is no plain file"):
        read_checkpoint(path)
    (tmp_path / "step-000000002").symlink_to(path)
    with pytest.raises(DamagedCheckpoint, match="is no folder"):
        read_checkpoint(tmp_path / "step-000000002")


# ---- single files ----------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        ),
        max_size=4,
    ),
    st.floats(0, 1, exclude_max=True),
)
def test_a_sealed_file_says_what_it_said_or_is_refused(content: dict[str, Any], place: float) -> None:
    content.pop("seal", None)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        write_json(path, content)
        assert json.dumps(read_json(path)) == json.dumps(json.loads(json.dumps(content)))
        write_json(path, read_json(path) | {"seal": "of before"})
        assert json.dumps(read_json(path)) == json.dumps(json.loads(json.dumps(content)))
        text = path.read_text()
        bit = int(place * 8 * path.stat().st_size)
        if text.find('"seal"') <= bit // 8 < text.find('"seal"') + 6:
            return  # without its name a seal is none
        flip(path, bit)
        try:
            found = read_json(path)
        except Damaged as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert json.dumps(found) == json.dumps(json.loads(json.dumps(content)))


def test_a_file_written_by_hand_needs_no_seal(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="a is missing"):
        read_bytes(tmp_path / "a")
    with pytest.raises(Damaged, match="cannot be read"):
        read_bytes(tmp_path / ("x" * 1000))
    with pytest.raises(Damaged, match="cannot be read"):
        read_bytes(Path("a\0b"))
    with pytest.raises(Damaged, match="is no plain file"):
        read_bytes(Path("/dev/zero"))
    (tmp_path / "a").write_bytes(bytes(11))
    with pytest.raises(Damaged, match="has 11 bytes, at most 10 are read"):
        read_bytes(tmp_path / "a", 10)


def test_files_are_made_with_the_rights_that_the_user_chose(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = checkpoint(tmp_path, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((path / "state.json").stat().st_mode) == 0o640


def test_the_watched_operations_are_all_that_write(tmp_path: Path) -> None:
    """A kill can be put between any two: a stopped writer leaves nothing that no operation was counted for."""
    with operations(failing(errno.EIO), lambda number: True), pytest.raises(NotWritten):
        checkpoint(tmp_path, 1)
    assert files(tmp_path) == {}
    assert set(OPERATIONS) >= {"write", "rename", "unlink"}
