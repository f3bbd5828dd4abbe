"""Claim: CIFAR's virtual view is made at least three times as fast as a PIL core makes it, and not one pixel differs.

    python benchmarks/views.py [--images 2048] [--repeats 7] [--device auto] [--out benchmarks/results/views.json]

The view is crop, flip, RandAugment (two operations), Cutout. The PIL pipeline gets its random numbers for nothing (ours
draws them within the time measured); both start from and end in uint8 arrays. Both are then measured once more with
normalisation to float32. On two cores PIL works in two processes, each on half of the images, which send nothing back;
ours uses two threads. The pipelines are measured in turns and the best of the repeats counts, so that other load on the
machine slows both.

On a GPU the same view is made for batches of 64, 512 and 4096: call by call; recorded as a CUDA graph, as in a training
step; and compiled by ``torch.compile`` and recorded, as with ``compile=true``. The claim is a million images a second,
timed by CUDA events over 50 batches.

The results name the processor and the GPU. Exit status 1 if any pixel differs on the CPU, on the GPU, or compiled.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from arguments import at_least
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor

from vrm.compilation import compile_options
from vrm.data.views.pixels import constant
from vrm.data.views.policies import view_policy
from vrm.data.views.transforms import TORCHSSL, Draws
from vrm.engine.devices import processor_name

SEED, EPOCH, VIEW, PADDING = 0, 1, 1, 4
FORMS = ("call by call", "recorded", "compiled, recorded")
FILL = (125, 123, 114)
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def affine(image: Image.Image, *numbers: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, numbers)


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "AutoContrast": lambda image, value: ImageOps.autocontrast(image),
    "Brightness": lambda image, value: ImageEnhance.Brightness(image).enhance(value),
    "Color": lambda image, value: ImageEnhance.Color(image).enhance(value),
    "Contrast": lambda image, value: ImageEnhance.Contrast(image).enhance(value),
    "Equalize": lambda image, value: ImageOps.equalize(image),
    "Identity": lambda image, value: image,
    "Posterize": lambda image, value: ImageOps.posterize(image, int(value)),
    "Rotate": lambda image, value: image.rotate(value),
    "Sharpness": lambda image, value: ImageEnhance.Sharpness(image).enhance(value),
    "ShearX": lambda image, value: affine(image, 1, value, 0, 0, 1, 0),
    "ShearY": lambda image, value: affine(image, 1, 0, 0, value, 1, 0),
    "Solarize": lambda image, value: ImageOps.solarize(image, value),
    "TranslateX": lambda image, value: affine(image, 1, 0, value * image.width, 0, 1, 0),
    "TranslateY": lambda image, value: affine(image, 1, 0, 0, 0, 1, value * image.height),
}


def plans(index: Tensor, *, seed: int, epoch: int, view: int, num_ops: int = 2) -> list[dict[str, Any]]:
    """What the policy ``cifar`` draws for one virtual view of every sample, in words."""
    draws = Draws.for_view(index, seed=seed, epoch=epoch, view=view)
    crop = (draws.uniform("crop", 2) * (2 * PADDING + 1)).long().T.tolist()
    flip = (draws.uniform("flip", 1)[0] < 0.5).tolist()
    augment = draws.uniform("randaugment", 2 * num_ops).T.tolist()
    cutout = draws.uniform("cutout", 3).T.tolist()
    names, result = list(TORCHSSL), []
    for i in range(len(index)):
        steps = []
        for choice, amount in zip(augment[i][::2], augment[i][1::2], strict=True):
            name = names[int(choice * len(names))]
            low, high = TORCHSSL[name]
            steps.append((name, low + (high - low) * amount))
        result.append({"crop": crop[i], "flip": flip[i], "steps": steps, "cutout": cutout[i]})
    return result


def pil_view(array_HWC: np.ndarray, plan: dict[str, Any]) -> np.ndarray:
    """The virtual view as the field's code makes it, one image at a time."""
    image = Image.fromarray(array_HWC)
    width, height = image.size
    top, left = plan["crop"]
    image = ImageOps.expand(image, PADDING).crop((left, top, left + width, top + height))
    if plan["flip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, value in plan["steps"]:
        image = OPERATIONS[name](image, value)
    share, x, y = plan["cutout"]
    side = share * 0.5 * width
    if side > 0:
        left, top = int(max(0, x * width - side / 2)), int(max(0, y * height - side / 2))
        image = image.copy()
        ImageDraw.Draw(image).rectangle((left, top, min(width, left + side), min(height, top + side)), FILL)
    return np.asarray(image)


def pil_batch(arrays: list[np.ndarray], given: list[dict[str, Any]], normalised: bool) -> Tensor:
    """A batch of views (B, 3, H, W), stacked; normalised image by image, as a data set's transform does."""
    mean, std = (np.array(value, dtype=np.float32).reshape(3, 1, 1) for value in (MEAN, STD))
    done = []
    for array, plan in zip(arrays, given, strict=True):
        view = pil_view(array, plan).transpose(2, 0, 1)
        done.append((view.astype(np.float32) / 255 - mean) / std if normalised else view)
    return torch.from_numpy(np.stack(done))


def our_batch(images: Tensor, index: Tensor, normalised: bool) -> Tensor:
    view, draws = images, Draws.for_view(index, seed=SEED, epoch=EPOCH, view=VIEW)
    for step in view_policy("cifar").virtual:
        view = step(view, draws)
    if not normalised:
        return view
    mean, std = (constant(value, torch.float32, images.device).view(3, 1, 1) for value in (MEAN, STD))
    return view.float().div_(255).sub_(mean).div_(std)


def pil_worker(connection: Any, arrays: list[np.ndarray], batch: int, normalised: bool) -> None:
    """Make all views each time it is asked."""
    torch.set_num_threads(1)
    given = plans(torch.arange(len(arrays)), seed=SEED, epoch=EPOCH, view=VIEW)
    while connection.recv():
        for start in range(0, len(arrays), batch):
            pil_batch(arrays[start : start + batch], given[start : start + batch], normalised)
        connection.send(True)


def measure(images: Tensor, batch: int, cores: int, normalised: bool, repeats: int) -> dict[str, Any]:
    arrays = list(images.permute(0, 2, 3, 1).contiguous().numpy())
    index = torch.arange(len(images))
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for core in range(cores):
        ours, theirs = context.Pipe()
        worker = context.Process(target=pil_worker, args=(theirs, arrays[core::cores], batch, normalised), daemon=True)
        worker.start()
        pipes.append(ours)
        workers.append(worker)

    def pil() -> None:
        for pipe in pipes:
            pipe.send(True)
        for pipe in pipes:
            pipe.recv()

    def batched() -> None:
        for start in range(0, len(images), batch):
            our_batch(images[start : start + batch], index[start : start + batch], normalised)

    torch.set_num_threads(cores)
    seconds: dict[str, list[float]] = {"pil": [], "batched": []}
    for repeat in range(repeats + 1):
        for name, function in (("pil", pil), ("batched", batched)):
            start = time.perf_counter()
            function()
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    for pipe, worker in zip(pipes, workers, strict=True):
        pipe.send(False)
        worker.join()
    rates = {name: len(images) / min(values) for name, values in seconds.items()}
    return {
        "batch": batch,
        "cores": cores,
        "normalised": normalised,
        "pil_images_per_second": round(rates["pil"]),
        "batched_images_per_second": round(rates["batched"]),
        "ratio": round(rates["batched"] / rates["pil"], 2),
        "median_ratio": round(float(np.median(seconds["pil"]) / np.median(seconds["batched"])), 2),
    }


def compiled() -> Callable[[Tensor, Tensor, bool], Tensor]:
    """What ``torch.compile`` makes of ``our_batch``."""
    return torch.compile(our_batch, fullgraph=True, dynamic=False, options=compile_options())


def on_gpu(images: Tensor, batch: int, form: str, normalised: bool, repeats: int, calls: int = 50) -> dict[str, Any]:
    """Images a second on the GPU that holds the images: the best of the repeats."""
    repeat_to_fill = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch].contiguous()
    index = torch.arange(batch, device=images.device)
    make = compiled() if form.startswith("compiled") else our_batch

    def step() -> None:
        make(repeat_to_fill, index, normalised)

    run = step
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    if form.endswith("recorded"):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    rates = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        rates.append(batch * calls / start.elapsed_time(end) * 1000)
    return {
        "batch": batch,
        "form": form,
        "normalised": normalised,
        "images_per_second": round(max(rates[1:])),
        "median_images_per_second": round(float(np.median(rates[1:]))),
    }


def differing_pixels(
    images: Tensor, batch: int, device: str, make: Callable[[Tensor, Tensor, bool], Tensor] = our_batch
) -> int:
    """How many bytes of all views differ between PIL and ours on a device."""
    index = torch.arange(len(images))
    given = plans(index, seed=SEED, epoch=EPOCH, view=VIEW)
    arrays = list(images.permute(0, 2, 3, 1).contiguous().numpy())
    expected = pil_batch(arrays, given, False)
    parts = zip(images.to(device).split(batch), index.to(device).split(batch), strict=True)
    made = torch.cat([make(*part, False) for part in parts]).cpu()
    return int((made != expected).sum())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=at_least(1), default=2048)
    parser.add_argument("--repeats", type=at_least(1), default=7)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="measure the GPU, too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "views.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    # Half of them smooth and of a narrow range, as photographs are: noise alone leaves AutoContrast nothing to do.
    blurred = torch.nn.functional.avg_pool2d(images[::2].float(), 5, 1, 2, count_include_pad=False)
    images[::2] = blurred.round().to(torch.uint8)

    gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    differing = {"cpu": differing_pixels(images, 512, "cpu")}
    if gpu:
        differing["cuda"] = differing_pixels(images, 512, "cuda")
        differing["cuda, compiled"] = differing_pixels(images, 512, "cuda", compiled())
    for device, number in differing.items():
        print(
            f"{options.images} images on {device}: {number} bytes of {images.numel()} differ from PIL {PIL.__version__}"
        )
    rows = []
    for normalised in (False, True):
        for cores in (1, 2):
            for batch in (64, 512):
                row = measure(images, batch, cores, normalised, options.repeats)
                rows.append(row)
                print(
                    f"cores {cores}  batch {batch:3d}  {'normalised' if normalised else 'uint8':10s}  "
                    f"PIL {row['pil_images_per_second']:6d}/s  batched {row['batched_images_per_second']:6d}/s  "
                    f"ratio {row['ratio']:.2f} (of medians {row['median_ratio']:.2f})",
                    flush=True,
                )
    gpu_rows = []
    for normalised in (False, True) if gpu else ():
        for form in FORMS:
            for batch in (64, 512, 4096):
                gpu_rows.append(on_gpu(images.cuda(), batch, form, normalised, options.repeats))
                print(
                    f"GPU      batch {batch:4d}  {'normalised' if normalised else 'uint8':10s}  "
                    f"{form:18s}  {gpu_rows[-1]['images_per_second']:9,d}/s",
                    flush=True,
                )
    report = {
        "differing_bytes": differing,
        "images": options.images,
        "repeats": options.repeats,
        "rows": rows,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpu_rows": gpu_rows,
        "cores_of_machine": os.cpu_count(),
        "load_average_at_start": load,
        "processor": processor_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(differing.values()))


if __name__ == "__main__":
    raise SystemExit(main())
