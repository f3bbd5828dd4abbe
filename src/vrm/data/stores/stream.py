"""Class folders of images of any size, decoded for every batch by worker processes.

A worker opens the files of some samples, makes the crops with which the views begin (:attr:`ViewPolicy.crops`) or what
evaluation sees, and sends the bytes back; flips, RandAugment and the like follow on the training device, for the whole
batch. The box of a crop is drawn from the sample's own key with the size that its file has, and a resize takes the
width first, then the height, as :func:`vrm.data.views.geometry.resized_crop` does: no pixel depends on the number of
workers, on what they read ahead, or on whether the images are decoded beforehand.

Workers know nothing but their requests and end with the process that started them. They leave signals to it, so that a
run that is told to stop can finish its step.

Shapes: N images, 3 channels (RGB), H x W pixels, B batch.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import os
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vrm.data.formats.images import SUFFIXES, BadImage, decode_image, fit
from vrm.data.formats.layout import Encoded, EncodedFiles, shown
from vrm.data.stores import nvidia
from vrm.data.stores.cache import fingerprint
from vrm.data.stores.host import HOST_SHARE, Beside, Placement, ahead, amount, free_memory, on_host, onto
from vrm.data.stores.store import BadData, Store, check_classes, with_crop
from vrm.data.views.transforms import CentralCrop, Draws, RandomResizedCrop

if TYPE_CHECKING:
    from vrm.data.views.policies import ViewPolicy

Decoder = Literal["cpu", "nvidia"]
"""What decodes images for training."""

_PART = 32  # images of one request; a batch is shared among the workers in such parts
_HELD = 1 << 26  # bytes of decoded images that a worker holds until their boxes are drawn together
_TIMEOUT = 300.0  # seconds
_READ = 1 << 30  # bytes of a split's files that its hash reads at most: a second or two on a disk of today
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class DecodingError(BadData):
    """Images that cannot be decoded through no fault of theirs: the message says what happened, where, and the fix."""


# ---- in a worker ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """Some images, and what is wanted of them.

    ``side``: (H, W) that they must have, if they must have one. ``size``: the square that they are fitted to, if any.
    Then ``crops``: the crop of every view of the samples ``index`` in this epoch; or ``crop``: what evaluation sees; or
    all as it is; or, with ``histogram``, how often each level occurs.
    """

    files: tuple[str, ...]
    side: tuple[int, int] | None = None
    size: int | None = None
    crop: CentralCrop | None = None
    crops: tuple[RandomResizedCrop, ...] = ()
    index: tuple[int, ...] = ()
    epoch: int = 0
    seed: int = 0
    histogram: bool = False

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of what fulfils it: uint8 (B, 3, h, w) for every view or else once, or int64 (3, 256)."""
        if self.histogram:
            return [(3, 256)]
        squares = [crop.size for crop in self.crops or (self.crop,) if crop is not None]
        if not squares and self.size is None and self.side is not None:
            return [(len(self), 3, *self.side)]
        return [(len(self), 3, side, side) for side in squares or (self.size,) if side is not None]


@dataclass
class Place:
    """Where a worker is: the position of an image in its request."""

    value: int = 0


def fulfil(request: Request, out: Sequence[NDArray[Any]], place: Place) -> None:
    """Write what the request wants to ``out``: for every view, or else once, uint8 (B, 3, h, w); or int64 (3, 256).

    :class:`~vrm.data.stores.store.BadData` for the first image that cannot be had.
    """
    if request.histogram:
        out[0][:] = 0
    held: list[Image.Image] = []
    for position, file in enumerate(request.files):
        place.value = position
        held.append(_opened(request, file))
        if not request.crops:
            image = held.pop()
            if request.histogram:
                for channel, values in enumerate(image.split()):
                    out[0][channel] += values.histogram()
            else:
                out[0][position] = _pixels(image if request.crop is None else central(image, request.crop))
        elif position == len(request) - 1 or sum(3 * image.width * image.height for image in held) > _HELD:
            _cut(request, held, slice(position + 1 - len(held), position + 1), out)
            held = []


def _opened(request: Request, file: str) -> Image.Image:
    origin = shown(Path(file))
    image = decode_image(Path(file), origin, size=None if request.side else request.size)
    if request.side is not None and (image.height, image.width) != request.side:
        raise BadData(
            f"{origin} is {image.height} x {image.width} pixels, but all images must be "
            f"{request.side[0]} x {request.side[1]} pixels (height x width); give a size to fit them to, data.size=N, "
            "or views that begin with a resized crop, such as data.views=imagenet"
        )
    return image if request.size is None else fit(image, request.size)


def _cut(request: Request, images: Sequence[Image.Image], where: slice, out: Sequence[NDArray[Any]]) -> None:
    """The crops of all views of these images, which are at this place in the request."""
    rows = torch.tensor([image.height for image in images])
    columns = torch.tensor([image.width for image in images])
    for view, crop in enumerate(request.crops):
        draws = Draws.of_view(torch.tensor(request.index[where]), epoch=request.epoch, view=view, seed=request.seed)
        boxes = torch.stack(crop.box(rows, columns, draws), dim=1).int().tolist()
        for made, image, (top, left, height, width) in zip(out[view][where], images, boxes, strict=True):
            box = image.crop((left, top, left + width, top + height))
            made[:] = _pixels(resized(box, (crop.size, crop.size), crop.resample))


def central(image: Image.Image, crop: CentralCrop) -> Image.Image:
    """What evaluation sees of an image: as :class:`~vrm.data.views.transforms.CentralCrop` makes it of tensors."""
    height, width = crop.scaled(image.height, image.width)
    top, left = crop.corner(height, width)
    return resized(image, (height, width), crop.resample).crop((left, top, left + crop.size, top + crop.size))


def resized(image: Image.Image, size: tuple[int, int], resample: str) -> Image.Image:
    """``Image.resize`` to ``size`` (h, w), the width first; Pillow alone decides by version what it begins with."""
    for shape in ((size[1], image.height), (size[1], size[0])):
        image = image.resize(shape, _RESAMPLING[resample])
    return image


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image).transpose(2, 0, 1)


def _serve(connection: Connection, place: Any) -> None:
    """Fulfil requests, one after the other, until the other end of the connection is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        while True:
            request: Request = connection.recv()
            out = [np.empty(shape, np.int64 if request.histogram else np.uint8) for shape in request.shapes]
            try:
                fulfil(request, out, place)
            except ValueError as error:
                connection.send(error)
            except Exception:
                connection.send(DecodingError(f"decoding failed in a worker:\n{traceback.format_exc()}"))
            else:
                connection.send(None)
                for array in out:
                    _write(connection.fileno(), array.data.cast("B"))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _write(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


# ---- in the process that trains -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Part:
    """A request, and the tensors that it fills."""

    request: Request
    out: Sequence[Tensor]
    worker: _Worker | None = None
    done: bool = False
    error: Exception | None = None


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    place: Any
    waiting: deque[Part] = field(default_factory=deque)
    sending: Lock = field(default_factory=Lock)
    receiving: Lock = field(default_factory=Lock)


class Decoders:
    """Processes that fulfil requests: started at the first, ended with this object or with the process.

    Args:
        count: how many; with 0 the process itself decodes.
        timeout: seconds without an answer after which it is given up.
    """

    def __init__(self, count: int, *, timeout: float = _TIMEOUT) -> None:
        self.count = count
        self.timeout = timeout
        self._workers: list[_Worker] = []
        self._turn = 0
        self._starting = Lock()
        self._failure: DecodingError | None = None
        self._end = weakref.finalize(self, _end, self._workers)  # called at most once

    def submit(self, part: Part) -> None:
        """Begin to work on it; :meth:`finish` waits for it. Who submits a part need not finish it."""
        if not self.count:
            return
        with self._starting:
            if not self._workers:
                self._start()
            part.worker = self._workers[self._turn]
            self._turn = (self._turn + 1) % self.count
        with part.worker.sending:
            part.worker.waiting.append(part)
            try:
                part.worker.connection.send(part.request)
            except OSError:  # dead, which finishing the part will tell
                return

    def finish(self, part: Part) -> None:
        """Wait until the part's tensors are filled.

        :class:`~vrm.data.BadData` for an image that cannot be used; :class:`DecodingError` for a worker that
        dies or does not answer.
        """
        if part.worker is None:
            fulfil(part.request, [tensor.numpy() for tensor in part.out], Place())
            return
        with part.worker.receiving:
            while not part.done:
                self._receive(part.worker)
        if part.error is not None:
            raise part.error

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(self.count):
            ours, theirs = context.Pipe()
            place = context.RawValue("q", -1)
            process = context.Process(target=_serve, args=(theirs, place), name="vrm decoder", daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, place))
        atexit.register(self._end)  # before multiprocessing's own, which would wait for them

    def _receive(self, worker: _Worker) -> None:
        """Take the answer to the request that was sent to this worker before the others."""
        part = worker.waiting[0]
        try:
            if not wait([worker.connection], self.timeout):
                raise self._failed(worker, f"a decoding process has given no answer for {self.timeout:g} s")
            part.error = worker.connection.recv()
            for tensor in part.out if part.error is None else ():
                _read(worker.connection.fileno(), tensor.numpy().data.cast("B"))
        except (EOFError, OSError) as error:
            worker.process.join(1)
            code = worker.process.exitcode or 0
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise self._failed(worker, f"a decoding process ended {how}") from error
        part.done = True
        worker.waiting.popleft()

    def _failed(self, worker: _Worker, what: str) -> DecodingError:
        """The first failure, whoever meets it: with it all end."""
        with self._starting:
            if self._failure is None:
                position = worker.place.value
                if position < 0:
                    where = (
                        "before its first image; a script that trains needs its own code under "
                        "if __name__ == '__main__', else data.workers=0"
                    )
                else:
                    files = worker.waiting[0].request.files
                    where = f"at {shown(Path(files[min(position, len(files) - 1)]))}"
                self._failure = DecodingError(
                    f"{what}, {where}. Is there enough memory (SIGKILL says mostly that there was not), and does the "
                    "disk answer? Try fewer data.workers, or data.workers=0 to decode in the process that trains"
                )
                for each in self._workers:
                    each.process.kill()
            return self._failure


def _read(descriptor: int, content: memoryview) -> None:
    while content:
        count = os.readv(descriptor, [content])
        if not count:
            raise EOFError
        content = content[count:]


def _end(workers: Sequence[_Worker]) -> None:
    """Workers have nothing to lose."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.connection.close()


@dataclass(frozen=True, eq=False)
class Files:
    """The names of many files in one folder, in little memory."""

    folder: Path
    joined: bytes
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, folder: Path, files: Sequence[Path]) -> Files:
        """The names of ``files``, which lie in ``folder`` or below."""
        within = os.path.join(os.fsencode(folder), b"")
        names = [os.fsencode(file).removeprefix(within) for file in files]
        return cls(folder, b"".join(names), np.cumsum([len(name) for name in names], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, row: int) -> bytes:
        """The name of one within the folder."""
        start = int(self.ends[row - 1]) if row else 0
        return self.joined[start : int(self.ends[row])]

    def __getitem__(self, row: int) -> str:
        """The path of one."""
        return os.path.join(self.folder, os.fsdecode(self.name(row)))


@dataclass(frozen=True, eq=False)
class StreamStore(Store):
    """A split whose images are decoded anew for every batch; ``targets`` on the device that trains.

    ``side``: (H, W) of every image, where the data set fixes it. ``size``: every image is fitted to this square before
    anything else. Without both they stay as they are: they have one size, or the views begin with a resized crop and
    evaluation does, with ``crop``. ``chosen``: the files (N,) that belong to the split, where not all do. ``decoder``:
    what decodes for views that crop: the workers, or :mod:`vrm.data.stores.nvidia`.
    """

    files: Files
    targets: Tensor
    classes: tuple[str, ...]
    decoders: Decoders
    skipped: tuple[str, ...] = ()
    size: int | None = None
    side: tuple[int, int] | None = None
    crop: CentralCrop | None = None
    chosen: Tensor | None = None
    decoder: Decoder = "cpu"

    def __post_init__(self) -> None:
        check_classes(self.targets, self.classes)

    @cached_property
    def stored_size(self) -> tuple[int, int]:
        """(H, W) in pixels before the crop: without ``size`` and ``side`` those of the first image."""
        if self.size is not None:
            return self.size, self.size
        if self.side is not None:
            return self.side
        file = self._names([0])[0]
        first = decode_image(Path(file), shown(Path(file)), size=None)
        return first.height, first.width

    @property
    def num_bytes(self) -> None:
        """They are never all decoded at once."""
        return None

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) of the names, sizes and content of the files, and of all else.

        Of more than ``_READ`` bytes the content of so many is read, in files spread evenly over the split.
        """
        settings = [len(self), self.size, self.side, self.classes, *[self.decoder] * (self.decoder != "cpu")]
        digest = hashlib.sha256(json.dumps(settings).encode())
        rows = range(len(self)) if self.chosen is None else self.chosen.tolist()
        sizes = np.fromiter((_num_bytes(self.files[row]) for row in rows), np.int64, len(self))
        for row in rows:
            digest.update(self.files.name(row) + b"\0")
        digest.update(sizes.data)
        digest.update(self.targets.cpu().numpy().data)
        chosen = rows[:: max(1, -(-int(sizes.clip(0).sum()) // _READ))]

        def told(start: int) -> bytes:
            return json.dumps([fingerprint(Path(self.files[row])) for row in chosen[start : start + _PART]]).encode()

        with ThreadPoolExecutor(default_workers()) as pool:
            for content in pool.map(told, range(0, len(chosen), _PART)):
                digest.update(content)
        return with_crop(digest.hexdigest(), self.crop)

    def to(self, device: torch.device | str) -> Self:
        """The same split for training on ``device``. ``ValueError`` if its decoder is not there."""
        if self.decoder == "nvidia" and (why := nvidia.available(torch.device(device))):
            raise ValueError(f"data.decoder=nvidia does not work on {device} ({why}); use data.decoder=cpu")
        return replace(self, targets=self.targets.to(device))

    def select(self, index_B: Tensor) -> Self:
        """The samples with these indices only, in their order; the class list stays whole."""
        rows = index_B.cpu() if self.chosen is None else self.chosen[index_B.cpu()]
        return replace(self, targets=self.targets[index_B], chosen=rows)

    def batch(self, index_B: Tensor) -> Tensor:
        """The images with these indices as evaluation sees them, uint8 (B, 3, H, W) on the device of ``targets``."""
        ((_, images),) = self.read([index_B])
        return images

    def read(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """``(index_B, self.batch(index_B))`` for every batch of indices, decoded ahead."""
        for index_B, (images,) in zip(batches, self._decoded(batches, self._whole(self.crop)), strict=True):
            yield index_B, images

    def feed(
        self, batches: Sequence[Tensor], *, epoch: int, seed: int, policy: ViewPolicy, num_virtual: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """``(index_B, *images)`` for every batch: images of all views, or of each view if :meth:`crops` says so."""
        request = self._whole(None)
        if policy.crops is not None and self.crops(policy):
            real, virtual = policy.crops
            request = Request((), self.side, crops=(real, *[virtual] * num_virtual), epoch=epoch, seed=seed)
        if self.decoder == "nvidia":
            if not request.crops:
                raise ValueError(
                    "data.decoder=nvidia decodes for views that begin with a resized crop, and the views "
                    f"{policy.name!r} do not, or data.size is given; use data.decoder=cpu"
                )
            decoded = self._decoded_there(batches, request)
        else:
            decoded = self._decoded(batches, request)
        for index_B, images in zip(batches, decoded, strict=True):
            yield index_B, *images

    def crops(self, policy: ViewPolicy) -> bool:
        """Images that stay as they are go through the crop of every view where they are decoded."""
        return policy.crops is not None and self.size is None

    def levels(self, index_B: Tensor) -> Tensor:
        """How often each level occurs in each channel of these images, whole, int64 (3, 256)."""
        found = []
        for rows in torch.split(index_B.cpu(), _PART):
            request = Request(self._names(rows.tolist()), self.side, self.size, histogram=True)
            found.append(Part(request, [torch.empty(request.shapes[0], dtype=torch.int64)]))
            self.decoders.submit(found[-1])
        for part in found:
            self.decoders.finish(part)
        return torch.stack([part.out[0] for part in found]).sum(0)

    def _whole(self, crop: CentralCrop | None) -> Request:
        """A request for images in whole, or as evaluation sees them."""
        side = self.stored_size if crop is None and self.size is None else self.side
        return Request((), side, self.size, crop)

    def _names(self, index: Sequence[int]) -> tuple[str, ...]:
        rows = index if self.chosen is None else self.chosen[torch.as_tensor(index)].tolist()
        return tuple(self.files[row] for row in rows)

    def _decoded(self, batches: Sequence[Tensor], request: Request) -> Iterator[tuple[Tensor, ...]]:
        """What the request wants of every batch of indices, on the device of the targets."""
        device = self.targets.device
        pinned = device.type == "cuda"

        def begin(index_B: Tensor) -> Callable[[], tuple[Tensor, ...]]:
            shapes = [(len(index_B), *shape[1:]) for shape in request.shapes]
            out = tuple(torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for shape in shapes)
            parts = []
            for start in range(0, len(index_B), _PART):
                rows = index_B[start : start + _PART].tolist()
                wanted = replace(request, files=self._names(rows), index=tuple(rows))
                parts.append(Part(wanted, [images[start : start + _PART] for images in out]))
                self.decoders.submit(parts[-1])
            return partial(self._finished, parts, out)

        # Two parts for each worker are under way, and at least two batches.
        largest = max((len(batch) for batch in batches), default=1)
        depth = max(2, -(-2 * _PART * self.decoders.count // largest)) if self.decoders.count else 0
        return onto(device, ahead(map(begin, on_host(batches)), depth=depth))

    def _decoded_there(self, batches: Sequence[Tensor], request: Request) -> Iterator[tuple[Tensor, ...]]:
        """The crops of every batch, decoded on the device of the targets, one batch ahead on a stream of its own."""
        beside = Beside(self.targets.device)

        def work(index_B: Tensor) -> tuple[Tensor, ...]:
            rows = index_B.tolist()
            return nvidia.cropped(
                self._names(rows),
                rows,
                request.crops,
                epoch=request.epoch,
                seed=request.seed,
                side=request.side,
                device=beside.device,
            )

        begun = ahead((partial(beside.begin, partial(work, index_B)) for index_B in on_host(batches)), depth=1)
        return (finish() for finish in begun)

    def _finished(self, parts: Sequence[Part], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for part in parts:
            self.decoders.finish(part)
        return out


def _num_bytes(file: str) -> int:
    """-1 for a file that is not there, which decoding it will tell."""
    return os.stat(file).st_size if os.path.exists(file) else -1


# ---- which data sets are streamed -----------------------------------------------------------------------------------


class Streams(NamedTuple):
    """Train and test, decoded for every batch, and why."""

    train: StreamStore
    test: StreamStore
    why: str


def streamed(
    found: object,
    splits: Callable[[EncodedFiles], tuple[Encoded, Encoded]],
    *,
    placement: Placement,
    size: int | None = None,
    crop: CentralCrop | None = None,
    num_workers: int | None = None,
    timeout: float = _TIMEOUT,
    decoder: Decoder = "cpu",
) -> Streams | None:
    """Both splits of what was found, decoded for every batch; or ``None`` if all are to be decoded beforehand.

    They are decoded for every batch if ``placement`` is ``"stream"``; or if it is ``"auto"``, they are files of images,
    and decoded they would take more than half of the free memory (``HOST_SHARE``).

    Args:
        found: what lies in the data's folder.
        splits: what it holds, asked for only if it is needed.
        placement: as :func:`~vrm.data.stores.host.place` has it.
        size: fit every image to this square first; by default they stay as they are.
        crop: what evaluation sees.
        num_workers: processes that decode, for both splits together; by default one for each core that this process
            may use (its share, where ``torchrun`` has started several here).
        timeout: seconds without an answer after which a worker is given up.
        decoder: what decodes for training: ``"cpu"`` the workers, ``"nvidia"`` the GPU (:mod:`vrm.data.stores.nvidia`).

    Raises:
        ValueError: ``placement`` is ``"stream"``, and there are no files of images.
    """
    if not are_files(found):
        if placement == "stream":
            raise ValueError(
                "placement=stream decodes files of images in class folders, and these data lie otherwise; use "
                "placement=auto, device or host, or make a pack of them once: vrm data ... pack=FOLDER"
            )
        return None
    why = "as asked for" if placement == "stream" else _too_large(found, size) if placement == "auto" else ""
    if not why:
        return None
    count = default_workers() if num_workers is None else num_workers
    decoders = Decoders(count, timeout=timeout)
    train, test = (
        StreamStore(
            Files.of(found.folder, [image for image in split.images if isinstance(image, Path)]),
            torch.tensor(split.targets),
            split.classes,
            decoders,
            split.skipped,
            size,
            found.image_size,
            crop,
            decoder=decoder,
        )
        for split in splits(found)
    )
    by = f"{count} processes" if count > 1 else "one process" if count else "the process that trains"
    return Streams(train, test, f"images in {shown(found.folder)}, decoded for every batch by {by}: {why}")


def are_files(found: object) -> TypeGuard[EncodedFiles]:
    """Whether what was found are files of images, one each."""
    return isinstance(found, EncodedFiles) and found.files[0].suffix.lower() in SUFFIXES


def _too_large(found: EncodedFiles, size: int | None) -> str:
    """Why images are better not decoded beforehand; empty if they may be."""
    height, width = (size, size) if size else found.image_size or _first_size(found.files)
    needed, free = 3 * height * width * len(found.files), free_memory()
    return f"decoded they are {amount(needed)}, more than half of {amount(free)} free" * (needed > HOST_SHARE * free)


def _first_size(files: Sequence[Path]) -> tuple[int, int]:
    """(height, width) of the first good image; (0, 0) without any."""
    for file in files:
        try:
            image = decode_image(file, shown(file), size=None)
        except BadImage:  # told when it is needed
            continue
        return image.height, image.width
    return 0, 0


def default_workers() -> int:
    """One process for each core that this one may use, shared among a distributed run's processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
