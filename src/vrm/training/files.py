"""Writing that a power cut cannot tear: beside, flushed to the disk, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMA = 1


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written; the message names the file and what is wrong with it."""


def fsync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    fsync(beside)
    beside.replace(path)
    fsync(path.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
    """Write ``folder`` with tensors, JSON state and a manifest of SHA-256 sums; it appears whole or not at all."""
    beside = folder.with_name(f".{folder.name}.new")
    if beside.exists():
        shutil.rmtree(beside)
    beside.mkdir(parents=True)
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
        beside / "tensors.safetensors",
    )
    (beside / "state.json").write_text(json.dumps(state, sort_keys=True, indent=1), encoding="utf-8")
    sums = {name: sha256(beside / name) for name in ("state.json", "tensors.safetensors")}
    manifest = {"schema": SCHEMA, "sha256": sums}
    (beside / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, indent=1), encoding="utf-8")
    for name in (*sums, "manifest.json"):
        fsync(beside / name)
    fsync(beside)
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
    fsync(folder.parent)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and state of a checkpoint, after its sums were checked. ``DamagedCheckpoint`` names the file at fault."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        schema, sums = manifest["schema"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder / 'manifest.json'} is missing or damaged ({type(error).__name__})") from None
    if schema != SCHEMA:
        raise DamagedCheckpoint(f"{folder} was written with schema {schema}; this version reads schema {SCHEMA}")
    if not isinstance(sums, dict) or set(sums) != {"state.json", "tensors.safetensors"}:
        raise DamagedCheckpoint(f"{folder / 'manifest.json'} must name state.json and tensors.safetensors alone")
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder / name} is missing")
        if sha256(folder / name) != expected:
            raise DamagedCheckpoint(f"{folder / name} does not have the SHA-256 of its manifest: it was changed or cut")
    try:
        with safe_open(folder / "tensors.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{folder / 'tensors.safetensors'}: {error}") from None
    return tensors, json.loads((folder / "state.json").read_text(encoding="utf-8"))
