"""A teacher's logits on every view of every epoch, kept on disk once for all runs with the same views.

Views are functions of (data seed, epoch, sample, view) and a frozen teacher is a function of views, so its logits can
be read instead of computed. Stored in float32 they are bitwise what the teacher would say, as long as everything is the
same that its arithmetic depends on: the cache keeps that as its *key*, and refuses a run of which any item differs.

A cache is a folder::

    cache.json                            {"schema": 1, "key": {...}}, to be read by people too
    epoch-0001-view-0.safetensors         "logits" (N, C); view 0 is the real one; its metadata hold a SHA-256 sum
    ...

A file appears whole or not at all, and only if its run went through the whole epoch. The views are apart, so a method
with one view uses what one with two has stored. Several processes may fill and read a cache at the same time.

Shapes: N samples of the training set, C classes, B batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vrm import config, models
from vrm.config import ConfigError, Run
from vrm.contract import DataInfo, Method, Outputs, Probe, Views
from vrm.data.views.policies import ViewPolicy
from vrm.engine.cuda_graphs import WARMUP, CudaGraphRecorder, RecordedFunction
from vrm.engine.distiller import autocast
from vrm.engine.distribution import ALONE, World
from vrm.files import fsync
from vrm.models import FrozenTeacher

SCHEMA = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}
LEFTOVER_SECONDS = 3600
"""Age from which a half-written file is that of a killed run, not one that is being written."""

Precision = Literal["float32", "float16"]


class DamagedEpoch(ValueError):
    """A stored epoch that is not what was written; the message names the file."""


# ---- what must be the same ------------------------------------------------------------------------------------------


def key(
    run: Run,
    *,
    teacher: FrozenTeacher,
    architecture: str,
    policy: ViewPolicy,
    data_hash: str,
    device: torch.device,
    processes: int = 1,
) -> dict[str, Any]:
    """Everything on which the bits of the teacher's logits depend, by name, as it would come back from a JSON file.

    The epoch's order is a function of ``data.seed``; it belongs here, with all that splits a batch, because a network's
    last bits depend on how many samples are computed together. ``threads`` matter on the CPU alone, ``deterministic``
    and the versions of CUDA's libraries on a GPU alone.
    """
    network, preprocess = teacher.teacher.network, teacher.teacher.preprocess
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(network))  # addresses are no part of it
    cuda = device.type == "cuda"
    cudnn: int | None = torch.backends.cudnn.version() if cuda else None  # type: ignore[no-untyped-call]
    library = architecture.partition(":")[0]
    found = {
        "teacher": architecture,
        "teacher weights": models.weights_hash(network),
        "teacher structure": hashlib.sha256(structure.encode()).hexdigest(),
        "normalisation": repr(preprocess),
        "views": policy.describe(),
        "data.seed": run.data_seed,
        "training data": data_hash,
        "batch_size": run.batch_size,
        "accumulate": run.accumulate,
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "threads": None if cuda else torch.get_num_threads(),
        "precision": run.precision,
        "deterministic": run.deterministic and cuda,
        "compile": run.compile,
        "channels_last": run.channels_last,
        "torch": torch.__version__,
        "cudnn": cudnn,
        "vrm": version("vrm"),
        "library": f"{library} {version(library)}" if library in ("timm", "torchvision") else None,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def check_method(method: Method, student: Probe, teacher: Probe, data: DataInfo) -> None:
    """``ConfigError`` unless the teacher's logits are all that a method reads of its teacher; ``method`` gets built."""
    needs, name = method.needs, type(method).__name__
    if not needs.teacher:
        raise ConfigError(f"teacher.cache: {name} learns from no teacher, there is nothing to keep; leave it out")
    if needs.teacher_batch_statistics:
        raise ConfigError(
            f"teacher.cache keeps what a teacher in eval mode says, but that of {name} with these options normalises "
            "by each batch; leave teacher.cache out"
        )
    more = ", ".join(needs.teacher_taps)
    if not more:
        # A method that reads the pooled vector asks for it when it is built: let it ask, with logits alone to be had.
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


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """``(dotted name, plain value)`` of everything inside."""
    if isinstance(value, dict) and value:
        for inner, content in value.items():
            yield from _leaves(content, f"{name}.{inner}" if name else str(inner))
    elif isinstance(value, list) and value:
        for number, content in enumerate(value):
            yield from _leaves(content, f"{name}.{number}")
    else:
        yield name, value


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Each item in which two keys differ, in words."""

    def shown(value: object) -> str:
        text = "nothing" if value is None else str(value)
        return f"{text[:12]}.." if re.fullmatch(r"[0-9a-f]{64}", text) else text

    there, here = (dict(_leaves(dict(side), "")) for side in (stored, given))
    return [
        f"{name} is {shown(there.get(name))} there and {shown(here.get(name))} here"
        for name in dict.fromkeys((*there, *here))
        if there.get(name) != here.get(name)
    ]


# ---- the cache ------------------------------------------------------------------------------------------------------


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


class TeacherCache:
    """The logits of one epoch on the device, read from the folder or to be written to it.

    Each epoch stands between :meth:`begin` and :meth:`end`. Unless it is :attr:`known`, what the teacher says is given
    to :meth:`record`; either way a step learns from :meth:`views`. Both work on the same device tensors in every epoch
    and wait for nothing, so a recorded step may hold them; ``known`` decides which recording is valid.

    Args:
        folder: Where it lies; made when the first epoch is stored.
        key: See :func:`key`.
        num_samples: N.
        num_classes: C.
        num_epochs: Epochs of the run, all phases together.
        num_views: Views of an image, the real one included.
        precision: How logits are stored. ``float16`` halves the size and rounds (relative 2^-11), also in the run that
            computes them: a run that is resumed, or made again, learns from the same numbers.
        device: Where the step runs; ``4 * N * C * num_views`` bytes are taken there.
        world: The processes of the run; each records its share, the main one writes.
        pass_seconds: Measures one pass of the teacher, see :func:`pass_seconds`; for :meth:`summary`.
        tell: Is given what a user must know: a damaged file, an epoch that cannot be stored.

    Raises:
        ConfigError: The folder holds logits with another key, or something else, or its disk has no room.
    """

    known: bool = False
    """Whether the current epoch's logits are there. A Python value, the same in all processes."""

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        *,
        num_samples: int,
        num_classes: int,
        num_epochs: int,
        num_views: int,
        precision: Precision = "float32",
        device: torch.device,
        world: World = ALONE,
        pass_seconds: Callable[[], float] | None = None,
        tell: Callable[[str], None] = _warn,
    ) -> None:
        self.folder, self.precision, self.world, self.tell = folder, precision, world, tell
        self.key = {**key, "logits": f"{num_samples} x {num_classes}", "stored as": precision}
        self.num_epochs, self.num_views = num_epochs, num_views
        self._passes = num_views * -(-num_samples // int(key["batch_size"]))
        self._file_bytes = num_samples * num_classes * DTYPES[precision].itemsize
        self._pass_seconds = pass_seconds
        self._key_hash = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self._check_key()
        self._check_room()
        self.logits_VNC = torch.zeros(num_views, num_samples, num_classes, device=device)
        self.seen_N = torch.zeros(num_samples, dtype=torch.bool, device=device)
        self.epochs_read = self.epochs_stored = self.epochs_partial = 0
        self._damaged: set[Path] = set()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache")
        self._ahead: tuple[int, Future[list[Tensor]]] | None = None

    # ---- in the step ------------------------------------------------------------------------------------------------

    def views(self, index_B: Tensor) -> Views:
        """What the teacher says about every view of these samples: float32 logits (B, C)."""
        real, *virtual = (Outputs(logits_NC.index_select(0, index_B)) for logits_NC in self.logits_VNC)
        return Views(real, tuple(virtual))

    def record(self, index_B: Tensor, teacher: Views) -> None:
        """Keep what the teacher said about these samples, for :meth:`views`."""
        for logits_NC, said in zip(self.logits_VNC, teacher.each(), strict=True):
            if said.logits.dtype != torch.float32:
                raise ValueError(f"teacher.cache keeps float32 logits, this teacher gives {said.logits.dtype}")
            logits_BC = said.logits.detach()
            if self.precision == "float16":
                rounded_BC = logits_BC.half().float()
                # an epoch with logits beyond its range is not stored, and need not be rounded
                logits_BC = torch.where(rounded_BC.isfinite(), rounded_BC, logits_BC)
            logits_NC.index_copy_(0, index_B, logits_BC)
        self.seen_N.index_fill_(0, index_B, True)

    # ---- around an epoch --------------------------------------------------------------------------------------------

    def begin(self, epoch: int) -> None:
        """Read the epoch if all its views are there and whole; else make ready to record it."""
        stored: list[Tensor] = []
        try:
            stored = self._take(epoch)
        except FileNotFoundError:
            pass
        except DamagedEpoch as error:
            self.tell(f"{error}; epoch {epoch} is computed again")
        self.known = not self.world.any(not stored)
        if self.known:
            for logits_NC, values_NC in zip(self.logits_VNC, stored, strict=True):
                logits_NC.copy_(values_NC)
            if epoch < self.num_epochs:
                self._ahead = epoch + 1, self._reader.submit(self._read, epoch + 1)
        else:
            self.logits_VNC.zero_()
            self.seen_N.zero_()

    def end(self, epoch: int) -> None:
        """Store the epoch if it was computed, from its first batch to its last. Waits for the device."""
        if self.known:
            self.epochs_read += 1
            return
        if not bool((self.world.sum(self.seen_N.int()) > 0).all()):
            self.epochs_partial += 1
            return
        # Each sample is one process's, zero elsewhere: a sum of bit patterns is exact, also for a minus zero.
        logits_VNC = self.world.sum(self.logits_VNC.view(torch.int32)).view(torch.float32)
        if not self.world.main:
            return
        stored_VNC = logits_VNC.to("cpu", DTYPES[self.precision])
        if not bool(stored_VNC.isfinite().all()):
            reason = "are NaN or infinite"
            if bool(logits_VNC.isfinite().all()):
                reason = "are beyond the range of float16; use teacher.cache_precision=float32"
            self.tell(f"the teacher's logits of epoch {epoch} are not stored: some {reason}")
            return
        try:
            self._found()
            for view, stored_NC in enumerate(stored_VNC):
                path = self._path(epoch, view)
                if path in self._damaged or not path.exists():
                    self._write(path, stored_NC)
                    self._damaged.discard(path)
        except (OSError, SafetensorError) as error:
            self.tell(f"the teacher's logits of epoch {epoch} are not stored: {error}")
            return
        self.epochs_stored += 1

    # ---- what it costs and saves ------------------------------------------------------------------------------------

    def announce(self) -> str:
        """What is there, what it will take, and the room for it."""
        there, missing = self._count()
        room = f"the others take {_size(missing)}, {_size(_free(self.folder))} are free; " if missing else ""
        return (
            f"teacher cache {self.folder}: {there} of {self.num_epochs} epochs are there; {room}{self.precision}, "
            f"{_size(self.logits_VNC.nbytes)} on {self.logits_VNC.device}"
        )

    def summary(self) -> str:
        """What was read, stored and saved since the start of this process."""
        read = f"{self.epochs_read} epochs read"
        if self.epochs_read:
            passes = self.epochs_read * self._passes
            read += f", {passes:,} passes of the teacher saved"
            if self._pass_seconds is not None:
                each = self._pass_seconds()
                read += f", about {passes * each:,.1f} s at the {1000 * each:.2f} ms that one takes"
        parts = [read, *[f"{self.epochs_stored} computed and stored"] * bool(self.epochs_stored)]
        parts += [f"{self.epochs_partial} computed in part and not stored"] * bool(self.epochs_partial)
        size = sum(path.stat().st_size for path in self.folder.glob("epoch-*.safetensors"))
        return f"teacher cache {self.folder}: {'; '.join(parts)}; {_size(size)} on disk ({self.precision})"

    # ---- the folder -------------------------------------------------------------------------------------------------

    def _path(self, epoch: int, view: int) -> Path:
        return self.folder / f"epoch-{epoch:04d}-view-{view}.safetensors"

    def _paths(self, epoch: int) -> list[Path]:
        return [self._path(epoch, view) for view in range(self.num_views)]

    def _check_key(self) -> bool:
        """Whether the folder is a cache. ``ConfigError`` if it is one with another key, or anything else."""
        file = self.folder / "cache.json"
        if not file.is_file():
            if self.folder.exists() and not self.folder.is_dir():
                raise ConfigError(f"teacher.cache={self.folder} is a file; give a folder")
            other = [path.name for path in self.folder.glob("[!.]*")] if self.folder.is_dir() else []
            if other and not file.is_file():
                raise ConfigError(
                    f"teacher.cache={self.folder} holds other files ({other[0]}, ..) and no cache.json; give a folder "
                    "of its own"
                )
            return False
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            schema, stored = content["schema"], dict(content["key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is damaged ({type(error).__name__}); delete {self.folder}") from None
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

    def _found(self) -> None:
        """Make the folder a cache with this key, unless it is one.

        Of two runs that make one at once the later writes it; files of the other are not valid under its key.
        """
        if self._check_key():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self._beside("cache.json")
        try:
            beside.write_text(json.dumps({"schema": SCHEMA, "key": self.key}, indent=1) + "\n", encoding="utf-8")
            fsync(beside)
            beside.replace(self.folder / "cache.json")
        finally:
            beside.unlink(missing_ok=True)
        fsync(self.folder)

    def _beside(self, name: str) -> Path:
        return self.folder / f".{name}.{os.uname().nodename}-{os.getpid()}.new"

    def _digest(self, path: Path, logits_NC: Tensor) -> str:
        """Of the numbers and of where they belong, so that a file in another's place is no valid one."""
        digest = hashlib.sha256(f"{self._key_hash}/{path.name}/{logits_NC.dtype}/{tuple(logits_NC.shape)}/".encode())
        digest.update(logits_NC.numpy().data)
        return digest.hexdigest()

    def _write(self, path: Path, logits_NC: Tensor) -> None:
        for old in self.folder.glob(".*.new"):
            if time.time() - old.stat().st_mtime > LEFTOVER_SECONDS:
                old.unlink(missing_ok=True)
        beside = self._beside(path.name)
        try:
            save_file({"logits": logits_NC}, beside, {"sha256": self._digest(path, logits_NC)})
            beside.chmod((self.folder / "cache.json").stat().st_mode)  # it is its owner's alone
            fsync(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        fsync(self.folder)

    def _take(self, epoch: int) -> list[Tensor]:
        """The stored epoch, as far as it was read ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == epoch:
            try:
                return ahead[1].result()
            except FileNotFoundError:  # then; perhaps not any more
                pass
        return self._read(epoch)

    def _read(self, epoch: int) -> list[Tensor]:
        """Every view's logits (N, C), mapped into memory and checked. ``FileNotFoundError``, ``DamagedEpoch``."""
        paths = self._paths(epoch)
        for path in paths:
            path.stat()
        return [self._read_file(path) for path in paths]

    def _read_file(self, path: Path) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                told = (file.metadata() or {}).get("sha256")
                logits_NC: Tensor = file.get_tensor("logits")
            if told != self._digest(path, logits_NC):
                raise DamagedEpoch(f"{path} does not have its SHA-256: it was changed, cut or moved")
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            self._damaged.add(path)
            if isinstance(error, DamagedEpoch):
                raise
            raise DamagedEpoch(f"{path} is damaged ({error})") from None
        return logits_NC

    def _count(self) -> tuple[int, int]:
        """How many epochs are there with all views, and how many bytes the missing files take."""
        names = {path.name for path in self.folder.glob("epoch-*.safetensors")}
        missing = [
            sum(path.name not in names for path in self._paths(epoch)) for epoch in range(1, self.num_epochs + 1)
        ]
        return missing.count(0), self._file_bytes * sum(missing)

    def _check_room(self) -> None:
        """``ConfigError`` if what is missing does not fit on the disk."""
        missing, free = self._count()[1], _free(self.folder)
        if missing > free:
            cheaper = "give teacher.cache_precision=float16, or " if self.precision == "float32" else "give "
            raise ConfigError(
                f"teacher.cache={self.folder} needs {_size(missing)} more for {self.num_epochs} epochs of "
                f"{self.num_views} view(s) in {self.precision}, but {_size(free)} are free; {cheaper}a folder on "
                "another disk"
            )


def _size(count: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def _free(folder: Path) -> int:
    """Bytes free where ``folder`` is, or will be made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


# ---- how it comes to a run ------------------------------------------------------------------------------------------


def open_cache(
    run: Run,
    *,
    student_probe: Probe,
    teacher_probe: Probe,
    data: DataInfo,
    teacher: FrozenTeacher,
    architecture: str,
    policy: ViewPolicy,
    data_hash: str,
    num_views: int,
    image_size: tuple[int, int],
    device: torch.device,
    world: World = ALONE,
) -> TeacherCache | None:
    """The cache that ``teacher.cache`` names, checked against the run; ``None`` without one. See :class:`TeacherCache`.

    ``teacher`` lies on its device in the layout in which it will run.
    """
    settings = run.teacher
    if settings is None or settings.cache is None:
        return None
    method = config.build_method(run.method)
    check_method(method, student_probe, teacher_probe, data)
    steps_per_epoch = -(-data.num_samples // run.batch_size)
    num_epochs = sum(phase.epochs or run.epochs for phase in method.phases)
    if run.steps is not None:
        num_epochs = min(num_epochs, -(-run.steps // steps_per_epoch))
    made = key(
        run,
        teacher=teacher,
        architecture=architecture,
        policy=policy,
        data_hash=data_hash,
        device=device,
        processes=world.size,
    )

    def measure() -> float:
        images, index = torch.zeros(1, 3, *image_size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
        view = policy(images, index, epoch=1, seed=0, num_virtual=0)[0]
        batch = view.repeat(run.batch_size, 1, 1, 1).to(device)
        with autocast(run.precision, device):
            return pass_seconds(teacher, batch)

    return TeacherCache(
        settings.cache,
        made,
        num_samples=data.num_samples,
        num_classes=data.num_classes,
        num_epochs=num_epochs,
        num_views=num_views,
        precision=settings.cache_precision,
        device=device,
        world=world,
        pass_seconds=None if run.compile else measure,  # compiling, for a run that only read, would take far longer
    )


def pass_seconds(teacher: FrozenTeacher, view_BCHW: Tensor, *, at_most: float = 1.0) -> float:
    """Seconds that one pass of the teacher takes, the fastest of some within ``at_most`` seconds (after warming up).

    On a GPU it is recorded as a CUDA graph, as the step is.
    """
    device = view_BCHW.device
    logits_BC = torch.zeros_like(teacher(view_BCHW).logits)

    def one(view: Tensor) -> None:
        logits_BC.copy_(teacher(view).logits)

    run: Callable[[Tensor], None] = one
    if device.type == "cuda":
        run = RecordedFunction(one, CudaGraphRecorder(device))
        for _ in range(WARMUP + 1):
            run(view_BCHW)
    started = time.perf_counter()
    found: list[float] = []
    while not found or time.perf_counter() - started < at_most:
        before = time.perf_counter()
        run(view_BCHW)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - before)
    return min(found)
