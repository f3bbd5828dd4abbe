"""Checks of room: on the device, and on the disks that a run writes to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from vrm.files import existing_folder
from vrm.runs.assembly import Assembly
from vrm.runs.checks.rehearsal import Rehearsal
from vrm.runs.checks.table import Check
from vrm.runs.plan import Plan
from vrm.wording import bytes_in_words


def check_memory(assembly: Assembly, tried: Rehearsal) -> Check:
    """Say what the run will need of a GPU, from what the rehearsal needed."""
    buffers = sum(buffer.nbytes for buffer in assembly.distiller.buffers())
    copies = _state_bytes(assembly.student.network) * (1 + (assembly.run.ema is not None))
    needed = tried.peak_bytes + tried.optimizer_bytes + buffers + copies
    free, total = torch.cuda.mem_get_info(assembly.device)
    available = free + torch.cuda.memory_reserved(assembly.device)
    name = torch.cuda.get_device_name(assembly.device)
    text = f"about {bytes_in_words(needed)} of the {bytes_in_words(total)} of {name}"
    if needed > available:
        return Check("memory", "fail", f"{text}, of which {bytes_in_words(available)} are free", "lower batch_size")
    return Check("memory", "ok", text)


def _state_bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values() if isinstance(value, Tensor))


def checkpoint_bytes(assembly: Assembly, optimizer_bytes: int) -> tuple[int, int]:
    """Return the bytes of the tensors of one checkpoint, and of the student alone."""
    student = _state_bytes(assembly.student.network)
    copies = 2 + (assembly.run.ema is not None)  # as it is, at its best, averaged
    return copies * student + _state_bytes(assembly.method) + optimizer_bytes, student


def check_disk(assembly: Assembly, plan: Plan, path: Path, optimizer_bytes: int) -> Check:
    """Check that there is room for ``checkpoint.keep`` + 1 checkpoints, the weights, and the teacher's cache.

    What already lies there, of this run or in the cache, is counted as room.
    """
    run = assembly.run
    one, student = checkpoint_bytes(assembly, optimizer_bytes)
    weights = (2 + (run.ema is not None)) * student
    checkpoints = f"{run.checkpoint.keep} + 1 checkpoints of {bytes_in_words(one)}"
    wanted = [(path, (run.checkpoint.keep + 1) * one + weights, checkpoints)]
    if run.teacher is not None and run.teacher.cache is not None:
        size = 4 if run.teacher.cache_precision == "float32" else 2
        values = plan.num_samples * plan.epochs_touched * assembly.num_views * assembly.data.num_classes
        wanted.append((run.teacher.cache, values * size, "the teacher's cache"))
    needed: dict[Path, int] = {}
    texts = []
    for folder, size, what in wanted:
        place = existing_folder(folder)
        known = next((p for p in needed if p.stat().st_dev == place.stat().st_dev), place)
        needed[known] = needed.get(known, 0) + size - min(size, _bytes_in(folder))
        texts.append(f"{bytes_in_words(size)} for {what}")
    text = " and ".join(texts)
    for place, size in needed.items():
        if size > (free := shutil.disk_usage(place).free):
            text += f": {bytes_in_words(size)} more are needed at {place}, {bytes_in_words(free)} are free"
            halve = ", give teacher.cache_precision=float16" if run.teacher is not None and run.teacher.cache else ""
            fix = f"make room, lower checkpoint.keep{halve}, or give run=FOLDER on another disk"
            return Check("disk", "fail", text, fix)
    free = min(shutil.disk_usage(place).free for place in needed)
    return Check("disk", "ok", f"{text}; {bytes_in_words(free)} are free")


def check_folder(path: Path) -> Check:
    """Check that the run's folder, or the one it will be made in, can be written."""
    place = existing_folder(path)
    if not os.access(place, os.W_OK | os.X_OK):
        return Check("folder", "fail", f"{place} cannot be written", "give run=ANOTHER_FOLDER")
    return Check("folder", "ok", f"{path} can be written")


def _bytes_in(folder: Path) -> int:
    """Return the bytes of the large files in a folder."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".bin", ".npy"))
