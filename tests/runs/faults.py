"""What can happen to a disk and to who writes on it: a kill, a full disk, at any single operation."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPERATIONS = ("open", "write", "pwrite", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
OPERATIONS += ("ftruncate", "truncate")
"""All by which this process changes the disk. Of ``open`` those count that may make a file."""

Act = Callable[[str, Callable[..., Any], tuple[Any, ...]], None]


@contextmanager
def operations(act: Act, at: Callable[[int], bool]) -> Iterator[list[str]]:
    """Watch the operations on the disk, and ``act`` before those whose number (from 0) is one ``at`` which to act."""
    done: list[str] = []

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if name != "open" or arguments[1] & os.O_CREAT:
                number = len(done)
                done.append(name)
                if at(number):
                    act(name, original, arguments)
            return original(*arguments, **options)

        return operation

    originals = {name: getattr(os, name) for name in OPERATIONS}
    for name, original in originals.items():
        setattr(os, name, watched(name, original))
    try:
        yield done
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def kill(name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """``kill -9`` on this process; of what it was writing, a half is written."""
    if name == "write":
        original(arguments[0], arguments[1][: len(arguments[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def failing(reason: int) -> Act:
    """An error of the system in place of the operation; of what was being written, a half is written."""

    def fail(name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if name == "write":
            original(arguments[0], arguments[1][: len(arguments[1]) // 2])
        raise OSError(reason, os.strerror(reason))

    return fail


def killed(call: Callable[[], None], at: int, before: Callable[[], None] = lambda: None) -> bool:
    """Whether a process that does ``before`` and then ``call`` is killed at the ``at``-th operation of ``call``.

    It is not if it has no more operations than that.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            before()
            with operations(kill, lambda number: number == at):
                call()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed"
    return os.WIFSIGNALED(status)


def every_kill(make: Callable[[int], tuple[Callable[[], None], Callable[[], None]]]) -> Iterator[int]:
    """Kill a process at every single operation. ``make(at)`` gives what it does before, and what it is killed in."""
    at = 0
    while True:
        before, call = make(at)
        was_killed = killed(call, at, before)
        yield at
        if not was_killed:
            return
        at += 1


WRITING = ("open", "write", "fsync", "mkdir", "rename", "replace")


def every_error(
    reason: int, make: Callable[[int], Callable[[], object]], *, lasting: bool = False
) -> Iterator[tuple[int, Exception | None]]:
    """Let every single operation of a call fail; if ``lasting``, all after it that write fail too.

    ``make(at)`` prepares and gives the call. Yields the number of the operation and what the call raised, and ends with
    the number of operations, when all went well.
    """
    at, count = 0, 1
    while at <= count:
        error, count = _fail_at(at, reason, make(at), lasting)
        yield at, error
        at += 1


def _fail_at(at: int, reason: int, call: Callable[[], object], lasting: bool) -> tuple[Exception | None, int]:
    """What the call raises if its ``at``-th operation fails, and how many operations it does."""
    fail = failing(reason)

    def act(name: str, original: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if len(done) == at + 1 or name in WRITING:
            fail(name, original, arguments)

    with operations(act, lambda number: number == at or (lasting and number > at)) as done:
        try:
            call()
        except (OSError, ValueError) as error:
            return error, len(done)
    return None, len(done)


def files(folder: Path) -> dict[str, bytes]:
    """All there is in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- damage ----------------------------------------------------------------------------------------------------------


def _cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, min(int(path.stat().st_size * share), path.stat().st_size - 1))


def flip(path: Path, bit: int | None = None) -> None:
    """Change one bit; by default one a third of the way."""
    content = bytearray(path.read_bytes())
    bit = 8 * (len(content) // 3) + 2 if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "quarter": _cut(0.25),
    "half": _cut(0.5),
    "99 %": _cut(0.99),
    "last byte": _cut(1),
    "one bit": flip,
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" x") and None,
}
"""To one file."""


# ---- real disks ------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, kind: str, *options: str) -> Iterator[Path]:
    """A file system of its own; the test is skipped where this user may not mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", kind, *options, kind, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a mounted file system."""
    subprocess.run(["mount", "-o", options, folder], check=True)
