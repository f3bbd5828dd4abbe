"""JPEG files decoded by NVIDIA's decoder, through torchvision, and cropped on the GPU.

An option, not the default, because it is another decoder: its pixels differ from those of the CPU by some levels, so
that a run is no longer the same wherever it decodes; and it takes some damaged files for good ones. The boxes of the
crops are the same. What is no JPEG file of three colours is decoded as everywhere else.

Shapes: B batch, 3 channels (RGB), H x W pixels, which differ from image to image.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vrm.data.formats.images import decode_image
from vrm.data.formats.layout import shown
from vrm.data.stores.store import BadData
from vrm.data.views import geometry
from vrm.data.views.transforms import Draws, RandomResizedCrop

_AT_ONCE = 1 << 25  # bytes of padded images that are resized together; on the way they take several times as much


def available(device: torch.device) -> str:
    """Empty if the decoder works on this device, else why not."""
    if device.type != "cuda":
        return "it decodes on NVIDIA GPUs"
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "JPEG")
    try:
        _decode([_bytes(picture.getvalue())], device)
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return ""


def cropped(
    files: Sequence[str],
    index: Sequence[int],
    crops: Sequence[RandomResizedCrop],
    *,
    epoch: int,
    seed: int,
    side: tuple[int, int] | None,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The crop of every view of the samples ``index``, whose images are in ``files``: uint8 (B, 3, h, w) each.

    ``side``: (H, W) that every image must have, if any. :class:`~vrm.data.stores.store.BadData` for one that cannot be
    used.
    """
    images = _decoded(files, device)
    for file, image in zip(files, images, strict=True):
        if side is not None and tuple(image.shape[1:]) != side:
            raise BadData(f"{shown(Path(file))} is {tuple(image.shape[1:])} pixels, but all images must be {side}")
    rows, columns = torch.tensor([image.shape[1:] for image in images]).unbind(1)
    views = []
    for view, crop in enumerate(crops):
        draws = Draws.of_view(torch.tensor(index), epoch=epoch, view=view, seed=seed)
        boxes = torch.stack(crop.box(rows, columns, draws), dim=1).int().tolist()
        cut = [
            image[:, top : top + height, left : left + width]
            for image, (top, left, height, width) in zip(images, boxes, strict=True)
        ]
        views.append(torch.cat([_resized(group, crop) for group in _groups(cut)]))
    return tuple(views)


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _decoded(files: Sequence[str], device: torch.device) -> list[Tensor]:
    """All images on the device, uint8 (3, H, W)."""
    found: dict[int, Tensor] = {}
    jpegs: dict[int, Tensor] = {}
    for row, file in enumerate(files):
        content = Path(file).read_bytes() if Path(file).is_file() else b""
        if _is_colour_jpeg(content):
            jpegs[row] = _bytes(content)
        else:
            found[row] = _on_cpu(file).to(device)
    try:
        decoded = _decode([*jpegs.values()], device) if jpegs else []
    except RuntimeError as error:
        for row in jpegs:
            _on_cpu(files[row])  # names the bad one
        raise ValueError(
            f"NVIDIA's decoder takes none of {len(jpegs)} images, such as {shown(Path(files[next(iter(jpegs))]))} "
            f"({str(error).splitlines()[0]}), though they are good; use data.decoder=cpu"
        ) from error
    found |= zip(jpegs, decoded, strict=True)
    return [found[row] for row in range(len(files))]


def _decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg  # later releases may not have it

    decoded: list[Tensor] = decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
    return decoded


def _on_cpu(file: str) -> Tensor:
    image = decode_image(Path(file), shown(Path(file)), size=None)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def _is_colour_jpeg(content: bytes) -> bool:
    if not content.startswith(b"\xff\xd8"):
        return False
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            return image.mode == "RGB"
    except OSError:  # decoding it will tell why
        return False


def _groups(images: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Neighbours whose padded size stays within bounds."""
    group: list[Tensor] = []
    height = width = 0
    for image in images:
        height, width = max(height, image.shape[1]), max(width, image.shape[2])
        if group and 3 * height * width * (len(group) + 1) > _AT_ONCE:
            yield group
            group, (height, width) = [], image.shape[1:]
        group.append(image)
    yield group


def _resized(images: Sequence[Tensor], crop: RandomResizedCrop) -> Tensor:
    """Images of any sizes, resized to the crop's: padded to one size, so that all go at once."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])
    rows, columns = (
        torch.tensor([image.shape[axis] for image in images], dtype=torch.float64).to(padded.device) for axis in (1, 2)
    )
    origin = torch.zeros_like(rows)
    size = (crop.size, crop.size)
    return geometry.resized_crop(padded, origin, origin, rows, columns, size=size, resample=crop.resample)
