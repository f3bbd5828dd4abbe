"""Decoding images: encoded bytes of any colour mode to RGB pixels of one size, in a pool of threads.

Every image becomes RGB with 8 bits a channel: grey is repeated, palettes are looked up, CMYK and the like are converted
by Pillow, alpha is dropped (not blended), 16-bit grey becomes ``round(level / 257)``, 16-bit colour keeps the upper
byte, an animation its first frame. EXIF orientation is not applied, as in torchvision.

An image is bad if its pixels cannot be decoded completely and within bounds; :class:`BadImage` says which and why. The
content decides the format, never the file's name. How much damage is found depends on the format: PNG carries
checksums; JPEG, WebP, GIF, BMP and PPM do not, and a flipped bit there can pass as other pixels.
"""

from __future__ import annotations

import io
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from vrm.data.errors import BadData
from vrm.wording import shape_in_words

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""A function called with (done, total)."""

BadImagePolicy = Literal["error", "skip", "report"]
"""What to do about bad images: stop at the first, leave them out, or list all and stop."""

SUFFIXES = frozenset(
    {".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
"""Endings of the files that are taken as images, in small letters; files may have them in any."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK = 32
"""Images decoded by a thread between two calls of the progress callback, which a stop waits for."""

_SMALL = 4096
"""Bytes below which images are decoded by one thread: decoding them is mostly Python code, which threads cannot share.

On two cores 10,000 WebP images of 32 x 32 pixels took 1.6 s on one thread and 2.1 s on two.
"""


class BadImage(BadData):
    """An image that cannot be used: ``origin`` says which, ``reason`` why."""

    def __init__(self, origin: str, reason: str) -> None:
        super().__init__(
            f"{origin}: {reason}; expected one of {', '.join(_FORMATS)}, whole: get this image again, remove it, or "
            "leave such images out: data.bad_images=skip (report lists them all)"
        )
        self.origin, self.reason = origin, reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        """Pickle the arguments: a worker process sends the error to its parent."""
        return BadImage, (self.origin, self.reason)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to mode RGB. Raise ``ValueError`` for modes without a known range."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save the image with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"levels of {levels.min()} to {levels.max()} do not fit 16 bits")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow has no direct conversion
    if image.mode == "RGB":  # converting would copy it
        image.load()
        return image
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` pixels (bilinear, antialiased) and cut out the central square."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    _check_number_of_pixels(width, height)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def check_size(size: int | None) -> None:
    """Raise ``ValueError`` unless ``size`` is a number of pixels or ``None``."""
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")


def to_pixels(image: Image.Image, size: int | None) -> NDArray[np.uint8]:
    """Return the pixels (3, H, W) of an image as RGB, fitted to a square of ``size`` if one is given."""
    return _to_array(_to_fitted_rgb(image, size))


def _to_fitted_rgb(image: Image.Image, size: int | None) -> Image.Image:
    rgb = to_rgb(image)
    return rgb if size is None else fit(rgb, size)


def _to_array(rgb: Image.Image) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def decode(encoded: bytes | Path, origin: str, *, size: int | None) -> NDArray[np.uint8]:
    """Decode an image to pixels (3, H, W). Raise :class:`BadImage`, naming ``origin``, if it cannot be read."""
    return _to_array(decode_image(encoded, origin, size=size))


def decode_image(encoded: bytes | Path, origin: str, *, size: int | None) -> Image.Image:
    """Decode an image to mode RGB; otherwise as :func:`decode`."""
    try:
        data = encoded if isinstance(encoded, bytes) else _read_file(encoded)
        with _open(data) as image:
            _check_number_of_pixels(*image.size)
            rgb = _to_fitted_rgb(image, size)
        if data.startswith(_PNG):
            _check_png(data)
    except MemoryError:  # not the image's fault
        raise
    except Exception as error:  # Pillow's decoders raise almost anything for broken bytes
        text = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise BadImage(origin, f"no readable image ({type(error).__name__}: {text})") from error
    return rgb


def _read_file(file: Path) -> bytes:
    if file.exists() and not file.is_file():  # reading a pipe would wait forever
        raise ValueError("neither a file nor a link to one")
    return file.read_bytes()


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        # Pillow's own text holds a memory address, which differs from run to run.
        raise UnidentifiedImageError(f"it begins with {data[:12]!r}") from None


def _check_number_of_pixels(width: int, height: int) -> None:
    """Raise ``ValueError`` above Pillow's bound, a quarter of a gigabyte decoded; Pillow itself only warns there."""
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels (width x height) are more than PIL.Image.MAX_IMAGE_PIXELS, "
            f"{Image.MAX_IMAGE_PIXELS:,}"
        )


def _check_png(data: bytes) -> None:
    """Raise ``ValueError`` unless every critical chunk has the right checksum; Pillow stops reading at the last row."""
    start, kind = len(_PNG), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + 8 + length
        if end + 4 > len(data):
            raise ValueError("truncated")
        if kind[:1].isupper() and zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"the checksum of its chunk {kind.decode('ascii', 'replace')} differs")
        start = end + 4


def decode_all(
    encoded: Sequence[bytes | Path],
    origins: Sequence[str],
    *,
    size: int | None = None,
    expected: tuple[int, int] | None = None,
    leave_out: bool = False,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, dict[int, str]]:
    """Decode images to one tensor, uint8 (N, 3, H, W), and return it with the rows left out and their reasons.

    Args:
        encoded: the bytes of each image, or its file.
        origins: where each image came from, for errors.
        size: fit every image to this square; otherwise all must have one size.
        expected: that size (height, width), where it is known beforehand.
        leave_out: leave bad images out, and those of another size than expected, or else than most.
        num_workers: threads; by default one for tiny images, else one a core. Neither the result nor the image that an
            error names depends on it.
        progress: called now and then with (done, total).

    Raises:
        BadImage: for the first that cannot be read, unless bad ones are left out.
        ValueError: the images have not one size; or, if bad ones are left out, no size is that of most.
    """
    shape = expected
    if shape is None and leave_out:
        shape = (size, size) if size else _most_common_size(encoded, num_workers)
    elif shape is None:
        shape = decode(encoded[0], origins[0], size=size).shape[1:]
    images = np.empty((len(encoded), 3, *shape), dtype=np.uint8)

    def work(row: int) -> str | None:
        try:
            image = decode(encoded[row], origins[row], size=size)
        except BadImage as error:
            if not leave_out:
                raise
            return error.reason
        if image.shape[1:] == shape:
            images[row] = image
            return None
        found, wanted = shape_in_words(image.shape[1:]), shape_in_words(shape)
        if leave_out:
            return f"{found} pixels (height x width), not {wanted}"
        fix = f" like {origins[0]}; or give a size to fit them to: data.size=N"
        raise ValueError(
            f"{origins[row]} is {found} pixels, but all images must be {wanted} pixels (height x width)"
            + ("; data.bad_images=skip leaves it out" if expected else fix)
        )

    bad = _collect_reasons(_map_rows(encoded, work, num_workers, progress))
    good = 0
    for row in range(len(encoded)) if bad else ():  # in place: the images may fill the memory
        if row not in bad:
            images[good] = images[row]
            good += 1
    return torch.from_numpy(images[: len(encoded) - len(bad)]), bad


def find_bad(
    encoded: Sequence[bytes | Path],
    origins: Sequence[str],
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> dict[int, str]:
    """Return the row of each image that cannot be read, whatever its size, with the reason.

    Every image is decoded once and dropped. Arguments as in :func:`decode_all`.
    """

    def work(row: int) -> str | None:
        try:
            decode(encoded[row], origins[row], size=None)
        except BadImage as error:
            return error.reason
        return None

    return _collect_reasons(_map_rows(encoded, work, num_workers, progress))


def _collect_reasons(results: Iterator[str | None]) -> dict[int, str]:
    return {row: reason for row, reason in enumerate(results) if reason is not None}


def _most_common_size(encoded: Sequence[bytes | Path], num_workers: int | None) -> tuple[int, int]:
    """Return the size (height, width) that more than half of the readable headers announce."""

    def read_header(row: int) -> tuple[int, int] | None:
        item = encoded[row]
        try:
            if isinstance(item, Path) and not item.is_file():
                return None
            with Image.open(io.BytesIO(item) if isinstance(item, bytes) else item, formats=_FORMATS) as image:
                return (image.height, image.width)
        except MemoryError:
            raise
        except Exception:  # decoding it will say why
            return None

    sizes = Counter(size for size in _map_rows(encoded, read_header, num_workers, None) if size is not None)
    if not sizes:
        raise ValueError(f"none of the {len(encoded)} images can be read")
    size, number = sizes.most_common(1)[0]
    if 2 * number <= sizes.total():
        raise ValueError(
            f"the images have {len(sizes)} sizes, and most have none in common: {shape_in_words(size)} pixels (height "
            f"x width) is the size of {number} in {sizes.total()}; give a size to fit them to: data.size=N"
        )
    return size


def _map_rows(
    encoded: Sequence[bytes | Path], work: Callable[[int], T], num_workers: int | None, progress: Progress | None
) -> Iterator[T]:
    """Yield ``work(row)`` for every row in order, computed by threads; the first row in order that fails ends it."""
    count = len(encoded)

    def chunk(start: int) -> list[T]:
        return [work(row) for row in range(start, min(start + _CHUNK, count))]

    if num_workers is None:
        small = all(isinstance(item, bytes) and len(item) < _SMALL for item in encoded[:_CHUNK])
        num_workers = 1 if small else (os.cpu_count() or 1)
    pool = ThreadPoolExecutor(max(num_workers, 1))
    try:
        done = 0
        for results in pool.map(chunk, range(0, count, _CHUNK)):
            done += len(results)
            if progress:
                progress(done, count)
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)
