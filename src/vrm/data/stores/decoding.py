"""Decoding of image files for every batch, in the worker processes of a PyTorch ``DataLoader``.

A :class:`Request` says what is wanted of a few images: the crops with which the views begin
(:attr:`~vrm.data.views.policies.ViewPolicy.crops`), what evaluation sees, or a histogram. The answer is a function of
the request alone: a crop's box is drawn from the sample's own key and the size of its file, and a resize takes the
width first, then the height, as :func:`vrm.data.views.geometry.resized_crop` does. So no pixel depends on the number of
workers or on how far they work ahead.

Workers ignore the signals that stop a run, which are the training process's business, and end with that process. One
that dies or hangs ends the run with a sentence that names the image it was at.

Shapes: 3 channels (RGB), H x W pixels, B batch.
"""

from __future__ import annotations

import atexit
import os
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vrm.data.errors import BadData
from vrm.data.formats.images import decode_image, fit
from vrm.data.formats.layout import shown
from vrm.data.views.transforms import CentralCrop, Draws, RandomResizedCrop
from vrm.wording import shape_in_words

REQUEST_SIZE = 32
"""Images of one request; a batch is shared among the workers in such parts."""

_HELD = 1 << 26
"""Bytes of decoded images that are held until the boxes of their crops are drawn together."""

_TIMEOUT = 300.0
"""Seconds without an image after which the workers are given up."""

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class DecodingError(BadData):
    """Decoding failed, but not for a bad image: the message says what happened, at which image, and the fix."""


# ---- what is decoded ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A few image files, and what is wanted of them.

    ``side``: (H, W) that every image must have, if any. ``size``: the square that every image is fitted to first, if
    any. Then one of these is returned: with ``crops``, the crop of every view of the samples ``index`` in this epoch;
    with ``crop``, what evaluation sees; with ``histogram``, the count of each level; else the whole images.
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

    def empty_result(self) -> tuple[Tensor, ...]:
        """Allocate the result: one uint8 tensor (B, 3, h, w), or one for each view, or int64 (3, 256)."""
        if self.histogram:
            return (torch.zeros((3, 256), dtype=torch.int64),)
        squares = [crop.size for crop in self.crops or (self.crop,) if crop is not None]
        sizes = [(side, side) if side else self.side for side in squares or (self.size,)]
        return tuple(torch.empty((len(self.files), 3, *size), dtype=torch.uint8) for size in sizes if size is not None)


def decode_request(request: Request, out: Sequence[NDArray[Any]], begin: Callable[[str], None]) -> None:
    """Write what the request wants to ``out``; call ``begin`` with the name of each file before it is opened.

    Raise :class:`~vrm.data.errors.BadData` for the first image that cannot be used.
    """
    held: list[Image.Image] = []
    for position, file in enumerate(request.files):
        begin(file)
        held.append(_open(request, file))
        if not request.crops:
            image = held.pop()
            if request.histogram:
                for channel, band in enumerate(image.split()):
                    out[0][channel] += band.histogram()
            else:
                out[0][position] = _to_array(image if request.crop is None else crop_centre(image, request.crop))
        elif position == len(request.files) - 1 or sum(3 * image.width * image.height for image in held) > _HELD:
            _write_crops(request, held, slice(position + 1 - len(held), position + 1), out)
            held = []


def _open(request: Request, file: str) -> Image.Image:
    origin = shown(Path(file))
    image = decode_image(Path(file), origin, size=None if request.side else request.size)
    if request.side is not None and (image.height, image.width) != request.side:
        raise BadData(
            f"{origin} is {shape_in_words((image.height, image.width))} pixels, but all images must be "
            f"{shape_in_words(request.side)} pixels (height x width); give a size to fit them to, data.size=N, "
            "or views that begin with a resized crop, such as data.views=imagenet"
        )
    return image if request.size is None else fit(image, request.size)


def _write_crops(
    request: Request, images: Sequence[Image.Image], rows: slice, out: Sequence[NDArray[np.uint8]]
) -> None:
    """Write the crops of all views of the images that are the ``rows`` of the request."""
    heights = torch.tensor([image.height for image in images])
    widths = torch.tensor([image.width for image in images])
    for view, crop in enumerate(request.crops):
        draws = Draws.for_view(torch.tensor(request.index[rows]), epoch=request.epoch, view=view, seed=request.seed)
        boxes = torch.stack(crop.box(heights, widths, draws), dim=1).int().tolist()
        for target, image, (top, left, height, width) in zip(out[view][rows], images, boxes, strict=True):
            box = image.crop((left, top, left + width, top + height))
            target[:] = _to_array(resize(box, (crop.size, crop.size), crop.resample))


def crop_centre(image: Image.Image, crop: CentralCrop) -> Image.Image:
    """Crop an image for evaluation, as :class:`~vrm.data.views.transforms.CentralCrop` crops tensors."""
    height, width = crop.scaled(image.height, image.width)
    top, left = crop.corner(height, width)
    return resize(image, (height, width), crop.resample).crop((left, top, left + crop.size, top + crop.size))


def resize(image: Image.Image, size: tuple[int, int], resample: str) -> Image.Image:
    """Resize to ``size`` (h, w), the width first: left alone, Pillow's order depends on its version."""
    for shape in ((size[1], image.height), (size[1], size[0])):
        image = image.resize(shape, _RESAMPLING[resample])
    return image


def _to_array(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image).transpose(2, 0, 1)


# ---- in the workers -------------------------------------------------------------------------------------------------

_NOT_STARTED, _WORKING, _IDLE = range(3)
_LONGEST_NAME = 4096
"""Bytes of a file's path that are kept; Linux allows no more."""


class _Answers(Dataset[Any]):
    """A map-style data set whose keys are requests: ``answers[request]`` decodes.

    ``status`` (workers, 1 + path), in shared memory: what each worker does, and the file that it does it with.
    """

    def __init__(self, num_workers: int) -> None:
        self.status = torch.zeros((num_workers, 1 + _LONGEST_NAME), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    def __getitem__(self, request: Request) -> tuple[Tensor, ...] | BadData:
        """Return the result, or the error: raised in a worker, ``DataLoader`` would wrap it."""
        worker = get_worker_info()
        assert worker is not None
        status = self.status[worker.id].numpy()

        def begin(file: str) -> None:
            name = os.fsencode(file)[: _LONGEST_NAME - 1] + b"\0"
            status[1 : 1 + len(name)] = np.frombuffer(name, np.uint8)
            status[0] = _WORKING

        try:
            # In shared memory from the start: a failure to get some is raised here, in a sender's thread it is lost.
            result = tuple(
                tensor.share_memory_()  # type: ignore[no-untyped-call]
                for tensor in request.empty_result()
            )
            decode_request(request, [tensor.numpy() for tensor in result], begin)
        except BadData as error:
            return error
        except Exception:
            return DecodingError(f"decoding failed in a worker, at {self.file(worker.id)}:\n{traceback.format_exc()}")
        finally:
            status[0] = _IDLE
        return result

    def file(self, worker: int) -> str:
        """Return the file that a worker is or was at."""
        name = bytes(self.status[worker, 1:].numpy()).partition(b"\0")[0]
        return shown(Path(os.fsdecode(name)))


class _Keys:
    """A sampler whose keys are set anew for every pass over the data."""

    keys: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.keys


def _unchanged(item: Any) -> Any:
    return item


# ---- in the process that trains -------------------------------------------------------------------------------------


class _Pool:
    """Some worker processes, and the ``DataLoader`` that they belong to. One pass over requests at a time."""

    def __init__(self, num_workers: int) -> None:
        self.answers = _Answers(num_workers)
        self.sampler = _Keys()
        self.loader = DataLoader(
            self.answers,
            batch_size=None,
            sampler=self.sampler,
            num_workers=num_workers,
            collate_fn=_unchanged,
            multiprocessing_context="spawn",  # a copy of a process with threads and a GPU can hang
            generator=torch.Generator(),  # the global one is left alone
            persistent_workers=True,
        )
        self.processes: list[BaseProcess] = []

    def begin(self, requests: Iterator[Request]) -> Iterator[Any]:
        """Begin a pass. The first starts the workers, with the signals blocked that are not theirs to obey."""
        self.sampler.keys = requests
        if not self.processes and hasattr(signal, "pthread_sigmask"):  # not on Windows
            resource_tracker.ensure_running()  # to start it later would unblock SIGINT and SIGTERM again
            signal.pthread_sigmask(
                signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
            )
        passing: Any = iter(self.loader)
        self.processes[:] = passing._workers
        return passing  # type: ignore[no-any-return]

    def explain(self, error: BaseException) -> DecodingError:
        """Kill the workers, and return what to say about one that died, or about all if none answers."""
        ended = [number for number, process in enumerate(self.processes) if not process.is_alive()]
        working = [number for number, row in enumerate(self.answers.status) if row[0] == _WORKING]
        worker = (ended or working or [0])[0]
        what = str(error)
        if ended:
            code = self.processes[worker].exitcode or 0
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            what = f"a decoding process ended {how}"
        status = int(self.answers.status[worker, 0])
        where = f"{'at' if status == _WORKING else 'after'} {self.answers.file(worker)}"
        if status == _NOT_STARTED:
            where = (
                "before its first image; a script that trains needs its own code under if __name__ == '__main__', "
                "else data.workers=0"
            )
        _kill(self.processes)
        return DecodingError(
            f"{what}, {where}. Is there enough memory (SIGKILL mostly means that there was not, SIGBUS that /dev/shm "
            "is full), and does the disk answer? Try fewer data.workers, or data.workers=0 to decode in the process "
            "that trains"
        )


def _kill(processes: Sequence[BaseProcess]) -> None:
    """End workers at once: they have nothing to lose."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


class Decoder:
    """Decodes requests in worker processes, which are started at the first and kept for the next.

    Args:
        num_workers: how many processes; with 0 the calling process decodes.
        timeout: seconds without an image after which the workers are given up.
    """

    def __init__(self, num_workers: int, *, timeout: float = _TIMEOUT) -> None:
        self.num_workers = num_workers
        self.timeout = timeout
        self._idle: list[_Pool] = []
        self._failure: DecodingError | None = None

    def decode(self, requests: Sequence[Callable[[], Request]], *, depth: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the results in order, up to ``depth`` of them taken from the workers before they are asked for.

        Several passes may be under way at once. Raise :class:`~vrm.data.errors.BadData` for an image that cannot be
        used, :class:`DecodingError` if a worker dies or hangs.
        """
        if not self.num_workers:
            for make in requests:
                request = make()
                result = request.empty_result()
                decode_request(request, [tensor.numpy() for tensor in result], lambda file: None)
                yield result
            return
        if self._failure is not None:
            raise self._failure
        pool = self._idle.pop() if self._idle else _new_pool(self.num_workers)
        waiting: deque[Future[Any]] = deque()
        # In a thread of its own: in the main thread torch would take over SIGCHLD, and a worker's death would raise
        # wherever the training is.
        thread = ThreadPoolExecutor(1)
        try:
            begun = thread.submit(pool.begin, (make() for make in requests))
            for _ in requests:
                waiting.append(thread.submit(lambda: next(begun.result())))
                if len(waiting) > depth:
                    yield self._take(pool, waiting.popleft())
            while waiting:
                yield self._take(pool, waiting.popleft())
        finally:
            thread.shutdown(cancel_futures=True)
            if self._failure is None:
                self._idle.append(pool)

    def _take(self, pool: _Pool, future: Future[Any]) -> Any:
        """Wait for a result, and raise it if it is an error."""
        found = self._wait(pool, future)
        if isinstance(found, BadData):
            raise found
        return found

    def _wait(self, pool: _Pool, future: Future[Any]) -> Any:
        """Return the next result, however long it takes, as long as the workers get from image to image."""
        seen = pool.answers.status.clone()
        while True:
            try:
                return future.result(self.timeout)
            except TimeoutError:
                if torch.equal(seen, pool.answers.status):
                    error = TimeoutError(f"the decoding processes have finished no image for {self.timeout:g} s")
                    self._failure = pool.explain(error)
                    raise self._failure from None
                seen = pool.answers.status.clone()
            except RuntimeError as error:
                self._failure = pool.explain(error)
                raise self._failure from error


def _new_pool(num_workers: int) -> _Pool:
    pool = _Pool(num_workers)
    end = weakref.finalize(pool, _kill, pool.processes)
    atexit.register(end)  # before multiprocessing's own, which would wait for processes that ignore its SIGTERM
    return pool


def default_workers() -> int:
    """Return the number of cores that this process may use, divided by the processes of a distributed run here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
