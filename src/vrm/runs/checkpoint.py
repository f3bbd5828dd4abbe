"""Files that a power cut cannot tear: written beside, flushed to the disk, renamed; and that show when they changed.

A checkpoint is a folder::

    step-000000042/
        tensors.safetensors     weights, momenta, banks, averages, random states
        state.json              the plain values beside them
        metrics.jsonl, ..       the logs up to this step
        manifest.json           {"schema": 2, "step": 42, "sha256": {file: sum, ..}, "seal": ..}

It appears whole or not at all. JSON files end in a *seal*, the SHA-256 of everything else in them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from vrm.files import fsync, replace_file, write_file
from vrm.models.weights import serialise

SCHEMA = 2
"""Of checkpoints. Another one is refused by name, never guessed at."""

CHECKPOINT = re.compile(r"step-(\d{9,18})")
"""The name of a checkpoint's folder."""

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
LOGS = ("metrics.jsonl", "timings.jsonl")
LARGEST_JSON = 64 * 2**20
"""Bytes of a JSON file beyond which it is none of ours."""


class Damaged(ValueError):
    """A file that is not what was written; the message names it and what is wrong with it."""

    exit_code = 1


class DamagedCheckpoint(Damaged):
    """A checkpoint that is not what was written, or not of the run where it lies."""


class NotWritten(OSError):
    """Something that could not be written, as on a full disk; what lay there before still does. The message says why.

    ``errno`` is that of the failure beneath.
    """

    exit_code = 1


@contextlib.contextmanager
def explained(path: Path, what: str = "could not be written") -> Iterator[None]:
    """:class:`NotWritten` in place of any other ``OSError``."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        text = f"{path} {what}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += _room(path)
        failure = NotWritten(f"{text}; what lay there before is as it was")
        failure.errno = error.errno
        raise failure from error


def _room(path: Path) -> str:
    place = next(folder for folder in (path, *path.parents) if folder.is_dir())
    try:
        return f" ({shutil.disk_usage(place).free / 1e6:.1f} MB are free)"
    except OSError:
        return ""


# ---- single files ----------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once. ``NotWritten`` if that fails."""
    with explained(path):
        replace_file(path, text.encode())


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Replace a JSON file at once, sealed. ``NotWritten`` if that fails."""
    write_text(path, sealed(content))


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, without its seal; one without was written by hand. ``Damaged`` if it was changed."""
    return unsealed(read_bytes(path, LARGEST_JSON), path, required=False)


def check_sum(path: Path) -> None:
    """Warn if a file of a finished run is not what it was at the end, by the ``manifest.json`` beside it.

    It is no more than a warning: people edit settings and cards, and take folders apart.
    """
    manifest = path.with_name(MANIFEST)
    if manifest.exists():
        sums = read_json(manifest).get("sha256")
        expected = sums.get(path.name) if isinstance(sums, dict) else None
        if expected is not None and hashlib.sha256(read_bytes(path)).hexdigest() != expected:
            warnings.warn(
                f"{path} was changed after the run had ended: it does not have its SHA-256 in {manifest}", stacklevel=3
            )


def sealed(content: Mapping[str, object]) -> str:
    """``content`` as JSON with its seal."""
    plain = json.loads(json.dumps(content))  # what a reader will see: keys of text, lists for tuples
    plain.pop("seal", None)
    return json.dumps(plain | {"seal": _seal(plain)}, indent=1)  # it ends in a brace: a byte less is a fault


def unsealed(text: bytes, path: Path, *, required: bool) -> dict[str, Any]:
    """What was :func:`sealed`. ``Damaged`` names ``path`` if the seal does not fit, or is missing but ``required``."""
    content = _parsed(text, path)
    seal = content.pop("seal", None)
    if seal is None and required:
        raise Damaged(f"{path} has no seal")
    if seal is not None and seal != _seal(content):
        raise Damaged(f"{path} does not have the SHA-256 in its seal: it was changed")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise Damaged(f"{path} holds no keys and values")
    return content


def read_bytes(path: Path, largest: int | None = None) -> bytes:
    """All of a regular file: no link is followed, no pipe waited for. ``Damaged`` if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        link = isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.EMLINK)
        raise Damaged(f"{path} " + ("is a link" if link else f"cannot be read ({error})")) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(f"{path} is no plain file")
        if largest is not None and status.st_size > largest:
            raise Damaged(f"{path} has {status.st_size:,} bytes, at most {largest:,} are read")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error})") from None
    finally:
        os.close(descriptor)


# ---- folders ---------------------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each with its name on the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        with contextlib.suppress(FileExistsError):  # of another process
            os.mkdir(path)
        fsync(path.parent)


def remove_folder(folder: Path) -> None:
    """Take a folder's name away at once, then its content."""
    aside = folder.with_name(f".{folder.name}.gone")
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def clear(folder: Path) -> None:
    """Remove what writers that were killed left in ``folder``; a checkpoint that one had just put aside comes back."""
    for path in sorted(folder.glob(".*")):
        name = path.name[1:].rpartition(".")[0]
        if path.name.endswith(".old") and CHECKPOINT.fullmatch(name) and not (folder / name).exists():
            os.rename(path, folder / name)
        elif re.fullmatch(r"\.step-\d+\.(new|old|gone)", path.name) and path.is_dir():
            shutil.rmtree(path)
        elif re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, object], logs: Mapping[str, bytes] | None = None
) -> None:
    """Write a checkpoint, whose name ends in the number of ``state["step"]``. ``NotWritten`` leaves no trace of it.

    One of the same name stays until the new one is whole.
    """
    content = {
        TENSORS: serialise(tensors),
        STATE: json.dumps(state, sort_keys=True, indent=1).encode(),
        **(logs or {}),
    }
    sums = {name: hashlib.sha256(value).hexdigest() for name, value in sorted(content.items())}
    manifest = sealed({"schema": SCHEMA, "step": state["step"], "sha256": sums}).encode()
    beside, before = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    with explained(folder):
        try:
            for left in (beside, before):
                if left.exists():
                    shutil.rmtree(left)
            make_folder(folder.parent)
            os.mkdir(beside)
            for name, value in (*content.items(), (MANIFEST, manifest)):  # the manifest is the last
                write_file(beside / name, value)
            fsync(beside)
            if folder.exists():
                os.rename(folder, before)
            os.rename(beside, folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            if before.exists() and not folder.exists():
                os.rename(before, folder)
            raise
        fsync(folder.parent)
        if before.exists():
            shutil.rmtree(before)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint, after all was checked. ``DamagedCheckpoint`` names the file at fault."""
    content = read_contents(folder)
    try:
        tensors = safetensors.torch.load(content[TENSORS])
    except Exception as error:  # the library has errors of its own, and Python's for some types
        raise DamagedCheckpoint(f"{folder / TENSORS} is no safetensors file ({error})") from None
    try:
        state = _parsed(content[STATE], folder / STATE)
    except Damaged as error:
        raise DamagedCheckpoint(str(error)) from None
    if not _is_step(state.get("step"), folder):
        raise DamagedCheckpoint(f"{folder / STATE} is of step {state.get('step')!r}")
    return tensors, state


def read_contents(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each checked against the manifest. ``DamagedCheckpoint`` names the file at fault."""
    try:
        return _contents(folder)
    except (Damaged, OSError) as error:
        raise DamagedCheckpoint(str(error)) from None


def _contents(folder: Path) -> dict[str, bytes]:
    if CHECKPOINT.fullmatch(folder.name) is None:
        raise Damaged(f"{folder} is no checkpoint: those are called step- and at least nine digits")
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder} is no folder")
    path = folder / MANIFEST
    text = read_bytes(path, LARGEST_JSON)
    schema = _parsed(text, path).get("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise Damaged(f"{folder} was written with schema {schema!r}; this version of vrm reads schema {SCHEMA} alone")
    manifest = unsealed(text, path, required=True)
    sums, step = manifest.get("sha256"), manifest.get("step")
    if not _is_step(step, folder):
        raise Damaged(f"{path} is of step {step!r}: it was moved here from another checkpoint")
    if not isinstance(sums, dict) or not {TENSORS, STATE} <= sums.keys() <= {TENSORS, STATE, *LOGS}:
        raise Damaged(f"{path} must name {TENSORS} and {STATE}, beside them at most {' and '.join(LOGS)}")
    for name in sorted({*os.listdir(folder)} - {*sums, MANIFEST}):
        raise Damaged(f"{folder / name} does not belong to the checkpoint: its manifest does not name it")
    content = {name: read_bytes(folder / name) for name in sums}
    for name, value in content.items():
        if hashlib.sha256(value).hexdigest() != sums[name]:
            raise Damaged(f"{folder / name} does not have the SHA-256 of its manifest: it was changed or cut")
    return content


def _is_step(found: object, folder: Path) -> bool:
    return type(found) is int and found == int(folder.name.removeprefix("step-"))
