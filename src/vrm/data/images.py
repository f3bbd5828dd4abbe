"""Encoded images to bytes of one size: decoding, colour modes, resizing, in a pool of threads.

Every image becomes RGB with 8 bits a channel: grey is repeated, palettes are looked up, CMYK and the like are converted
by Pillow, alpha is dropped (not blended), of 16-bit grey ``round(level / 257)`` is kept, of an animation the first
frame. EXIF orientation is not applied, as in torchvision. Floating-point images have no known range and are refused.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Progress = Callable[[int, int], None]
"""Called with (images decoded, images in all)."""

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_CHUNK = 256  # images decoded between two calls of the progress callback
# Bytes; smaller images are mostly Python's work, and threads only get in each other's way: on two cores 10,000 WebP
# images of 32 x 32 took 1.6 s on one thread and 2.1 s on two.
_SMALL = 4096


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB; ``ValueError`` for modes without a known range."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save the image with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"levels of {levels.min()} to {levels.max()} do not fit 16 bits")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> Image.Image:
    """The shorter side brought to ``size`` pixels (bilinear, antialiased), then the central square."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def check_size(size: int | None) -> None:
    """``ValueError`` unless ``size`` is a number of pixels or ``None``."""
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")


def pixels(image: Image.Image, size: int | None) -> NDArray[np.uint8]:
    """The pixels (3, H, W) of any image as RGB, fitted to ``size`` if one is given."""
    rgb = to_rgb(image)
    return np.ascontiguousarray(np.asarray(rgb if size is None else fit(rgb, size)).transpose(2, 0, 1))


def decode(encoded: bytes | Path, origin: str, *, size: int | None) -> NDArray[np.uint8]:
    """The pixels (3, H, W) of one encoded image; ``ValueError`` naming its ``origin`` if it cannot be read."""
    try:
        data = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return pixels(image, size)
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise ValueError(
            f"{origin}: no readable image ({type(error).__name__}: {error}); expected one of {', '.join(_FORMATS)}, "
            "whole; get this file again or remove the image"
        ) from error


def decode_all(
    encoded: Sequence[bytes | Path],
    origins: Sequence[str],
    *,
    size: int | None = None,
    expected: tuple[int, int] | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """All images as one tensor, uint8 (N, 3, H, W).

    Args:
        encoded: the bytes of each image, or its file.
        origins: where each image came from, for errors.
        size: fit every image to this square; otherwise all must have one size.
        expected: that size (height, width), where it is known beforehand.
        num_workers: threads; by default one for tiny images, else one a core. The result does not depend on it, nor
            does the image that an error names: the first bad one.
        progress: called now and then with (done, total).
    """
    first = decode(encoded[0], origins[0], size=size)
    shape = (3, *expected) if expected else first.shape
    hint = f"all images must be {shape[1]} x {shape[2]} pixels (height x width)" + (
        "" if expected else f" as {origins[0]}; or give a size to fit them to: data.size=N"
    )
    images = np.empty((len(encoded), *shape), dtype=np.uint8)

    def fill(start: int) -> int:
        stop = min(start + _CHUNK, len(encoded))
        for row in range(start, stop):
            image = first if row == 0 else decode(encoded[row], origins[row], size=size)
            if image.shape != shape:
                raise ValueError(f"{origins[row]} is {image.shape[1]} x {image.shape[2]} pixels, but {hint}")
            images[row] = image
        return stop

    if num_workers is None:
        small = all(isinstance(item, bytes) and len(item) < _SMALL for item in encoded[:_CHUNK])
        num_workers = 1 if small else (os.cpu_count() or 1)
    pool = ThreadPoolExecutor(num_workers)
    try:
        for done in pool.map(fill, range(0, len(encoded), _CHUNK)):
            if progress:
                progress(done, len(encoded))
    finally:
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(images)
