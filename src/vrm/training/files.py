"""Writing that a power cut cannot tear: beside, flushed to the disk, renamed. And reading that believes no file.

A checkpoint is a folder of three files::

    tensors.safetensors   all tensors
    state.json            plain values
    manifest.json         schema, step, the SHA-256 of the other two, and one of itself

The first two are on the disk before the manifest is written, the manifest before the folder gets its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMA = 2
"""Counted up when a checkpoint of another version cannot be read any more."""

CONTENT = ("state.json", "tensors.safetensors")
LARGEST_JSON = 1 << 26
"""Bytes of a state or manifest; what is larger was not written here."""


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written; the message names the file and what is wrong with it."""


class NotWritten(RuntimeError):
    """A file that could not be written (a full disk, a read-only folder); what was there before is whole."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the various errors of a full or read-only disk into :class:`NotWritten`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise NotWritten(
            f"{path} could not be written: {reason}. What was there before is whole; make room on the disk or let the "
            "folder be written, then resume"
        ) from error


def fsync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once. ``NotWritten`` leaves the old one."""
    beside = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            beside.write_text(text, encoding="utf-8")
            fsync(beside)
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_sum(manifest: Mapping[str, object]) -> str:
    """The SHA-256 of a manifest's other entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
    """Write ``folder`` with tensors and a JSON state that holds its ``step``; it appears whole or not at all.

    ``NotWritten`` leaves nothing of it.
    """
    beside = folder.with_name(f".{folder.name}.new")
    with writing(folder):
        try:
            if beside.exists():
                shutil.rmtree(beside)
            beside.mkdir(parents=True)
            save_file(
                {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
                beside / "tensors.safetensors",
            )
            (beside / "state.json").write_text(json.dumps(state, sort_keys=True, indent=1), encoding="utf-8")
            for name in CONTENT:
                fsync(beside / name)
            manifest = {
                "schema": SCHEMA,
                "step": state["step"],
                "sha256": {name: sha256(beside / name) for name in CONTENT},
            }
            manifest["manifest"] = _own_sum(manifest)
            (beside / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, indent=1), encoding="utf-8")
            fsync(beside / "manifest.json")
            fsync(beside)
            if folder.exists():
                shutil.rmtree(folder)
            beside.rename(folder)
        except (OSError, SafetensorError):
            shutil.rmtree(beside, ignore_errors=True)  # what is left is swept at the next start
            raise
        fsync(folder.parent)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint, after its sums were checked. ``DamagedCheckpoint`` names the file at fault."""
    sums, step = _read_manifest(folder)
    for name, expected in sums.items():
        if sha256(folder / name) != expected:
            raise DamagedCheckpoint(f"{folder / name} does not have the SHA-256 of its manifest: it was changed or cut")
    state = _read_json(folder / "state.json")
    if state.get("step") != step:
        raise DamagedCheckpoint(f"{folder / 'state.json'} is of step {state.get('step')!r}, its manifest of {step}")
    try:
        with safe_open(folder / "tensors.safetensors", "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpoint(f"{folder / 'tensors.safetensors'}: {error}") from None


def _read_manifest(folder: Path) -> tuple[dict[str, str], int]:
    """The sums of the other files, and the step, once the manifest and the list of files agree with each other."""
    file = folder / "manifest.json"
    manifest = _read_json(file)
    schema = manifest.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        age = "an older" if type(schema) is int and schema < SCHEMA else "an unknown"
        raise DamagedCheckpoint(
            f"{folder} was written with {age} schema, {schema!r}; this version reads schema {SCHEMA}: resume it with "
            "the version of vrm in its environment.json"
        )
    told = manifest.pop("manifest", None)
    sums, step = manifest.get("sha256"), manifest.get("step")
    if told != _own_sum(manifest):
        raise DamagedCheckpoint(f"{file} does not have its own SHA-256: it was changed")
    if not isinstance(sums, dict) or sorted(sums) != sorted(CONTENT) or type(step) is not int:
        raise DamagedCheckpoint(f"{file} must name a step and {' and '.join(CONTENT)} alone")
    if folder.name.removeprefix("step-").lstrip("0") != str(step or ""):
        raise DamagedCheckpoint(f"{file} is of step {step}, but lies in {folder.name}: it was moved")
    there = {path.name for path in folder.iterdir()}
    for name in (*CONTENT, "manifest.json"):
        if name not in there:
            raise DamagedCheckpoint(f"{folder / name} is missing")
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder / name} is no plain file")
    if more := sorted(there - {*CONTENT, "manifest.json"}):
        raise DamagedCheckpoint(f"{folder / more[0]} does not belong there; remove it")
    return {name: str(value) for name, value in sums.items()}, step


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object. ``DamagedCheckpoint`` for anything else."""
    try:
        if file.is_symlink() or file.stat().st_size > LARGEST_JSON:
            raise DamagedCheckpoint(f"{file} is a link, or larger than {LARGEST_JSON} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(f"{file} is damaged ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{file} must hold names and values")
    return content
