"""Checkpoints: everything that a training needs to go on, in a folder that appears whole or not at all.

::

    step-000000042/
        tensors.safetensors     weights, momenta, banks, averages, random states
        state.json              the plain values beside them, those in the states of networks included
        manifest.json           {"format": 3, "step": 42, "sha256": {file: sum, ..}}
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from vrm.files import (
    LARGEST_JSON,
    Damaged,
    explained,
    parse_json,
    read_bytes,
    read_json,
    remove_folder,
    replacing_folder,
    write_file,
)
from vrm.models.card import FORMAT
from vrm.models.weights import packed, unpacked
from vrm.wording import first_line

NAME = re.compile(r"step-(\d{9,18})")
"""The name of a checkpoint's folder."""

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class DamagedCheckpoint(Damaged):
    """A checkpoint that is not what was written, or does not belong where it lies."""


class Mark(BaseModel):
    """Where a log stood when the checkpoint was written."""

    bytes: int
    sha256: str
    lost: int


class State(BaseModel):
    """The plain values of a checkpoint."""

    step: int
    phase: str
    meter: list[str]
    rate_scale: float
    best: dict[str, float]
    last: dict[str, float]
    seconds: dict[str, float]
    hashes: dict[str, str | None]
    environment: dict[str, Any]
    settings: dict[str, Any]
    logs: dict[str, Mark]
    values: dict[str, Any] = {}
    """What the states of networks hold beside tensors, by name, as :func:`vrm.models.weights.packed` gives it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    """What the states of networks hold beside tensors."""

    @property
    def step(self) -> int:
        """Number of steps done."""
        return int(self.state["step"])

    def part(self, prefix: str) -> dict[str, Any]:
        """Return the tensors and other values under ``prefix.``, by the rest of their names."""
        start = f"{prefix}."
        content = self.tensors | self.values
        return {name.removeprefix(start): value for name, value in content.items() if name.startswith(start)}

    @contextmanager
    def fitted(self) -> Iterator[None]:
        """Raise :class:`DamagedCheckpoint` where tensors are missing or have another shape."""
        try:
            yield
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DamagedCheckpoint(
                f"the checkpoint of step {self.step} does not fit this run's networks, as if another version of a "
                f"library had made them: {first_line(error)}"
            ) from error


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` steps lies in the folder of checkpoints."""
    return folder / f"step-{step:09d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    found = (path for path in folder.glob("step-*") if NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def write_checkpoint(path: Path, content: Mapping[str, Any], state: Mapping[str, object]) -> None:
    """Write a checkpoint, in place of one of the same step: tensors (and what else states hold), and plain values.

    Raise :class:`~vrm.files.NotWritten` if that fails; then what lay there before still does.
    """
    tensors = {n: t.detach().cpu().contiguous().clone() for n, t in content.items() if isinstance(t, Tensor)}
    values = {name: packed(value, name) for name, value in content.items() if not isinstance(value, Tensor)}
    state = {**state, "values": values} if values else state
    files = {
        TENSORS: safetensors.torch.save(tensors),
        STATE: json.dumps(state, sort_keys=True, indent=1).encode(),
    }
    sums = {name: hashlib.sha256(value).hexdigest() for name, value in sorted(files.items())}
    manifest = {"format": FORMAT, "step": state["step"], "sha256": sums}
    with explained(path), replacing_folder(path) as beside:
        for name, value in (*files.items(), (MANIFEST, json.dumps(manifest, indent=1).encode())):
            write_file(beside / name, value)


def remove_checkpoints(folder: Path, *, step: int, keep: int) -> None:
    """Leave the ``keep`` newest checkpoints up to ``step``, and none of later steps.

    Later ones were passed over when the run was resumed. Raise :class:`~vrm.files.NotWritten` if that fails.
    """
    found = list_checkpoints(folder)
    place = found.index(checkpoint_path(folder, step))
    for path in (*found[:place], *found[place + keep :]):
        with explained(path, "could not be removed"):
            remove_folder(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, checked against its manifest. Raise :class:`DamagedCheckpoint` naming the file at fault."""
    try:
        content = _read_files(path)
        state = parse_json(content[STATE], path / STATE)
        State.model_validate(state)
        tensors = safetensors.torch.load(content[TENSORS])
        values = {name: unpacked(value) for name, value in state.get("values", {}).items()}
    except ValidationError as error:
        first = error.errors()[0]
        raise DamagedCheckpoint(f"{path / STATE}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (Damaged, OSError) as error:
        raise DamagedCheckpoint(str(error)) from None
    except Exception as error:  # safetensors raises errors of its own, and Python's for some types
        raise DamagedCheckpoint(f"{path / TENSORS} is no safetensors file ({error})") from None
    if state["step"] != _step_of(path):
        raise DamagedCheckpoint(f"{path / STATE} is of step {state['step']}")
    return Checkpoint(path, tensors, state, values)


def _read_files(path: Path) -> dict[str, bytes]:
    """Return the content of a checkpoint's files. Raise ``Damaged`` if one is not what the manifest says."""
    if NAME.fullmatch(path.name) is None:
        raise Damaged(f"{path} is no checkpoint: those are called step- and at least nine digits")
    if path.is_symlink() or not path.is_dir():
        raise Damaged(f"{path} is no folder")
    manifest = read_json(path / MANIFEST)
    written_as = manifest.get("format", manifest.get("schema"))
    if type(written_as) is not int or written_as != FORMAT:
        raise Damaged(f"{path} was written in format {written_as!r}; this version of vrm reads format {FORMAT} alone")
    if manifest.get("step") != _step_of(path):
        raise Damaged(
            f"{path / MANIFEST} is of step {manifest.get('step')!r}: it was moved here from another checkpoint"
        )
    sums = manifest.get("sha256")
    if not isinstance(sums, dict) or sums.keys() != {TENSORS, STATE}:
        raise Damaged(f"{path / MANIFEST} must name {TENSORS} and {STATE}")
    for name in sorted({*os.listdir(path)} - {*sums, MANIFEST}):
        raise Damaged(f"{path / name} does not belong to the checkpoint: its manifest does not name it")
    content = {name: read_bytes(path / name, largest=LARGEST_JSON if name == STATE else None) for name in sums}
    for name, value in content.items():
        if hashlib.sha256(value).hexdigest() != sums[name]:
            raise Damaged(f"{path / name} does not have the SHA-256 of its manifest: it was changed or cut")
    return content


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
