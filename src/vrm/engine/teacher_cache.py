"""A teacher's logits on every view of every epoch, kept on disk once for all runs with the same views.

Views are functions of (data seed, epoch, sample, view), and a frozen teacher is a function of views, so its logits can
be read instead of computed. Stored in float32 they are bitwise what the teacher would compute, as long as everything is
the same that its arithmetic depends on: the cache stores that as its *key*, and refuses a run with another one.

A cache is a folder::

    cache.json                            {"schema": 2, "key": {...}}, for people to read as well
    epoch-0001-view-0.safetensors         logits (N, C); view 0 is the real one; the header holds a SHA-256 sum
    ...

A file appears whole or not at all, and only if its run went through the whole epoch. The views are stored apart, so a
method with one view uses what one with two has stored. Several processes may fill and read a cache at the same time.

Shapes: N samples of the training set, C classes, V views, B batch.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vrm import config, models
from vrm.config import ConfigError, Run
from vrm.contract import DataInfo, Method, Outputs, Probe, Views
from vrm.data.views.policies import ViewPolicy
from vrm.engine.distribution import ALONE, World
from vrm.files import Damaged, locked, make_folder, read_json, remove_remains, write_json
from vrm.models import FrozenTeacher, save_tensors
from vrm.models.weights import read_tensors
from vrm.wording import bytes_in_words, counted

SCHEMA = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16}

Precision = Literal["float32", "float16"]


def cache_key(
    run: Run,
    teacher: FrozenTeacher,
    *,
    architecture: str,
    policy: ViewPolicy,
    data_hash: str,
    device: torch.device,
    processes: int = 1,
) -> dict[str, Any]:
    """Return everything that decides the bits of the teacher's logits, by name, with values as JSON has them.

    Settings that split a batch are part of it, because a network's last bits depend on how many samples are computed
    together. ``threads`` matter on the CPU only, ``deterministic`` and cuDNN's version on a GPU only.
    """
    network, preprocess = teacher.teacher.network, teacher.teacher.preprocess
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(network))  # without addresses
    cuda = device.type == "cuda"
    cudnn: int | None = torch.backends.cudnn.version() if cuda else None  # type: ignore[no-untyped-call]
    library = architecture.partition(":")[0]
    found = config.teacher_outputs(run) | {
        "deterministic": run.deterministic and cuda,
        "teacher": architecture,
        "teacher weights": models.weights_hash(network),
        "teacher structure": hashlib.sha256(structure.encode()).hexdigest(),
        "input": repr(preprocess),
        "outputs": "probabilities" if teacher.teacher.probabilities else "logits",
        "views": policy.describe(),
        "training data": data_hash,
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "threads": None if cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        "cudnn": cudnn,
        "vrm": version("vrm"),
        "library": f"{library} {version(library)}" if library in ("timm", "torchvision") else None,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return each item in which two keys differ, in words."""

    def shown(value: object) -> str:
        text = "nothing" if value is None else str(value)
        return f"{text[:12]}.." if re.fullmatch(r"[0-9a-f]{64}", text) else text

    there, here = (dict(_leaves(dict(side), "")) for side in (stored, given))
    return [
        f"{name} is {shown(there.get(name))} there and {shown(here.get(name))} here"
        for name in dict.fromkeys((*there, *here))
        if there.get(name) != here.get(name)
    ]


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield ``(dotted name, plain value)`` of everything inside."""
    if isinstance(value, dict) and value:
        for inner, content in value.items():
            yield from _leaves(content, f"{name}.{inner}" if name else str(inner))
    elif isinstance(value, list) and value:
        for number, content in enumerate(value):
            yield from _leaves(content, f"{name}.{number}")
    else:
        yield name, value


def check_method(method: Method, student: Probe, teacher: Probe, data: DataInfo) -> None:
    """Raise ``ConfigError`` unless the logits are all that a method reads of its teacher. Build the method."""
    needs, name = method.needs, type(method).__name__
    if not needs.teacher:
        raise ConfigError(f"teacher.cache: {name} learns from no teacher, so there is nothing to keep; leave it out")
    if needs.teacher_batch_statistics:
        raise ConfigError(
            f"teacher.cache keeps the logits of a teacher in eval mode, but that of {name} with these options "
            "normalises by each batch; leave teacher.cache out"
        )
    more = ", ".join(needs.teacher_taps)
    if not more:
        # Build the method against a probe that has only logits: it raises if it also needs pooled features.
        shapes = {tap: shape for tap, shape in teacher.shapes.items() if tap == "logits"}
        try:
            with torch.random.fork_rng(devices=[]):
                method.build(student, replace(teacher, shapes=shapes), data)
        except ValueError:
            more = "pooled"
    if more:
        raise ConfigError(
            f"teacher.cache keeps logits alone, but {name} with these options reads more of its teacher: {more}. Leave "
            "teacher.cache out, or choose a method that learns from logits"
        )


class TeacherCache:
    """The logits of one epoch on the device, read from the folder or to be written to it.

    Each epoch stands between :meth:`begin` and :meth:`end`. Unless it is :attr:`known`, the teacher's outputs are given
    to :meth:`record`; either way a step learns from :meth:`views`. Both use the same device tensors in every epoch and
    wait for nothing, so a recorded step may hold them; ``known`` decides which recording is valid.

    Args:
        folder: Where the cache lies; made when the first epoch is stored.
        key: See :func:`cache_key`.
        num_samples: N.
        num_classes: C.
        num_views: V, the real view included.
        precision: How logits are stored. ``float16`` halves the size and rounds (relative error 2^-11), also in the run
            that computes them: a run that is resumed, or made again, learns from the same numbers.
        device: Where the step runs; ``4 * N * C * V`` bytes are allocated there.
        world: The processes of the run; each records its share, the main one writes.

    Raises:
        ConfigError: The folder holds logits with another key, or something else.
    """

    known: bool = False
    """Whether the current epoch's logits were read. A Python value, the same in all processes."""
    tell: Callable[[str], None]
    """Called with what a user must know: a damaged file, an epoch that cannot be stored. By default it warns."""

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        *,
        num_samples: int,
        num_classes: int,
        num_views: int,
        precision: Precision = "float32",
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        self.folder, self.precision, self.world = folder, precision, world
        self.tell = warnings.warn
        self.key = {**key, "logits": f"{num_samples} x {num_classes}", "stored as": precision}
        self._key_hash = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self._has_key()
        self.logits_VNC = torch.zeros(num_views, num_samples, num_classes, device=device)
        self.seen_N = torch.zeros(num_samples, dtype=torch.bool, device=device)

    # ---- in the step ------------------------------------------------------------------------------------------------

    def views(self, index_B: Tensor) -> Views:
        """Return the teacher's float32 logits (B, C) on every view of these samples."""
        return Views.of(Outputs(logits_NC.index_select(0, index_B)) for logits_NC in self.logits_VNC)

    def record(self, index_B: Tensor, teacher: Views) -> None:
        """Keep the teacher's outputs on these samples, for :meth:`views` and :meth:`end`."""
        for logits_NC, outputs in zip(self.logits_VNC, teacher.each(), strict=True):
            if outputs.logits.dtype != torch.float32:
                raise ValueError(f"teacher.cache keeps float32 logits, this teacher gives {outputs.logits.dtype}")
            logits_BC = outputs.logits.detach()
            if self.precision == "float16":
                rounded_BC = logits_BC.half().float()
                # an epoch with logits out of range is not stored, so they need not be rounded
                logits_BC = torch.where(rounded_BC.isfinite(), rounded_BC, logits_BC)
            logits_NC.index_copy_(0, index_B, logits_BC)
        self.seen_N.index_fill_(0, index_B, True)

    # ---- around an epoch --------------------------------------------------------------------------------------------

    def begin(self, epoch: int) -> None:
        """Read the epoch if all its views are stored undamaged; else prepare to record it."""
        stored: list[Tensor] = []
        try:
            if all(path.exists() for path in self._paths(epoch)):
                stored = [self._read(path) for path in self._paths(epoch)]
        except Damaged as error:
            self.tell(f"{error}; epoch {epoch} is computed again")
        self.known = not self.world.any(not stored)
        if self.known:
            for logits_NC, values_NC in zip(self.logits_VNC, stored, strict=True):
                logits_NC.copy_(values_NC)
        else:
            self.logits_VNC.zero_()
            self.seen_N.zero_()

    def end(self, epoch: int) -> None:
        """Store the epoch if it was recorded from its first batch to its last. Wait for the device."""
        if self.known or not bool((self.world.sum(self.seen_N.int()) > 0).all()):
            return
        # Each sample is recorded by one process and zero elsewhere: a sum of bit patterns is exact, for -0.0 too.
        logits_VNC = self.world.sum(self.logits_VNC.view(torch.int32)).view(torch.float32)
        if not self.world.main:
            return
        stored_VNC = logits_VNC.to("cpu", DTYPES[self.precision])
        if not bool(stored_VNC.isfinite().all()):
            reason = "are NaN or infinite"
            if bool(logits_VNC.isfinite().all()):
                reason = "are out of the range of float16; use teacher.cache_precision=float32"
            self.tell(f"the teacher's logits of epoch {epoch} are not stored: some {reason}")
            return
        try:
            self._write(epoch, stored_VNC)
        except OSError as error:
            self.tell(f"the teacher's logits of epoch {epoch} are not stored: {error}")

    def describe(self) -> str:
        """Return what is stored, and what the cache takes on disk and device."""
        names = {path.name for path in self.folder.glob("epoch-*")}
        epochs = {int(name.split("-")[1]) for name in names}
        whole = sum(names >= {path.name for path in self._paths(epoch)} for epoch in epochs)
        size = sum((self.folder / name).stat().st_size for name in names)
        return (
            f"teacher cache {self.folder}: {counted(whole, 'epoch')} stored, {bytes_in_words(size)} in "
            f"{self.precision}; {bytes_in_words(self.logits_VNC.nbytes)} on {self.logits_VNC.device}"
        )

    # ---- the folder -------------------------------------------------------------------------------------------------

    def _paths(self, epoch: int) -> list[Path]:
        return [self.folder / f"epoch-{epoch:04d}-view-{view}.safetensors" for view in range(len(self.logits_VNC))]

    def _has_key(self) -> bool:
        """Return whether the folder is a cache already. Raise ``ConfigError`` if it has another key, or other files."""
        file = self.folder / "cache.json"
        if not file.is_file():
            if self.folder.exists() and not self.folder.is_dir():
                raise ConfigError(f"teacher.cache={self.folder} is a file; give a folder")
            other = [path.name for path in self.folder.glob("[!.]*")]
            if other and not file.is_file():  # another process may have made it meanwhile
                raise ConfigError(
                    f"teacher.cache={self.folder} holds other files ({other[0]}, ..) and no cache.json; give a folder "
                    "of its own"
                )
            return False
        try:
            content = read_json(file)
            schema, stored = content["schema"], dict(content["key"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is damaged ({error}); delete {self.folder}") from None
        if schema != SCHEMA:
            raise ConfigError(
                f"{file} was written with schema {schema}, this version reads schema {SCHEMA}; give another folder"
            )
        if differing := differences(stored, self.key):
            raise ConfigError(
                f"teacher.cache={self.folder} was made with other settings: {'; '.join(differing)}. Give "
                "teacher.cache=ANOTHER_FOLDER, or the settings it was made with"
            )
        return True

    def _write(self, epoch: int, logits_VNC: Tensor) -> None:
        """Write the views of an epoch that are missing or damaged. Raise ``ConfigError`` as :meth:`_has_key` does."""
        make_folder(self.folder)
        with locked(self.folder / ".lock", wait=True):
            remove_remains(self.folder)
            if not self._has_key():
                write_json(self.folder / "cache.json", {"schema": SCHEMA, "key": self.key})
            for path, logits_NC in zip(self._paths(epoch), logits_VNC, strict=True):
                if not self._is_stored(path):
                    save_tensors({self._name(path): logits_NC}, path)

    def _is_stored(self, path: Path) -> bool:
        try:
            self._read(path)
        except Damaged:
            return False
        return True

    def _name(self, path: Path) -> str:
        """Return the name of the tensor in a file. It says where the numbers belong: a file is valid there only."""
        return f"{path.stem} of {self._key_hash}"

    def _read(self, path: Path) -> Tensor:
        """Return stored logits (N, C). Raise :class:`vrm.files.Damaged` if they are not intact, or belong elsewhere."""
        try:
            return read_tensors(path)[self._name(path)]
        except KeyError:
            raise Damaged(f"{path} holds the logits of another epoch, view or cache") from None
        except ValueError:
            raise Damaged(f"{path} was changed or cut, or cannot be read") from None
