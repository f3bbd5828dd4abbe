"""Measure how many images a second come from class folders decoded for every batch, and from packs.

    python benchmarks/throughput.py [--images 1500] [--batch 128] [--workers 0 1 2] [--device cpu]
                                    [--out benchmarks/results/throughput.json]

JPEG files of the size and content of photographs (about 500 x 375 pixels, 60 to 110 kB) are made in a temporary folder.
With two views of 224 x 224 pixels per sample, in batches as a training step gets them, this measures:

- streaming with each number of workers: files are read, decoded, cropped and resized for each view;
- the same work by torchvision and Pillow in one process, as most training scripts do it, for comparison;
- a mapped pack of 256 x 256 pixels (one tensor for both views: crops follow on the device), and how long it takes to
  make and to open;
- the memory of this process (resident, and its own part of that), of the workers, and of the mapped files.

The first batches, during which workers start, are not counted. Images a second count samples, not views. Before streams
are timed, pixels are compared: exit status 1 if any differs between numbers of workers, or between a pack and the
folder that it was made of.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from arguments import at_least
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from vrm.data import DataSet, Store, epoch_batches, load, place
from vrm.data.datasets.packed import open_pack
from vrm.data.stores.pack import write_pack
from vrm.data.views.policies import view_policy
from vrm.engine.devices import processor_name

VIEWS = view_policy("imagenet")
FEED = {"epoch": 1, "seed": 0, "num_virtual": 1}


def photograph(seed: int) -> Image.Image:
    """Make a picture with the spectrum of photographs: noise at every scale, the coarser the stronger."""
    draw = np.random.default_rng(seed)
    width, height = [(500, 375), (375, 500), (500, 333)][seed % 3]
    total = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((3, 60.0), (12, 30.0), (48, 16.0), (160, 9.0)):
        coarse = draw.normal(128, 60, (cells, cells, 3)).clip(0, 255).astype(np.uint8)
        fine = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(fine, np.float32) - 128) * (strength / 40)
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


def make_folder(root: Path, images: int) -> int:
    """Make class folders of photographs, and return their bytes."""
    total = 0
    for split, count in (("train", images), ("test", max(8, images // 20))):
        for number in range(count):
            file = root / split / f"class{number % 4}" / f"{number:06d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            photograph(number + 10**6 * (split == "test")).save(file, quality=88)
            total += file.stat().st_size
    return total


def batches_of(store: Store, batch: int) -> Sequence[Tensor]:
    return epoch_batches(len(store), batch, seed=0, epoch=1, device=store.targets.device)


def rate(items: Iterator[tuple[Tensor, ...]], device: torch.device, skipped: int) -> float:
    """Return samples a second after the first ``skipped`` batches."""
    count, start = 0, 0.0
    for number, (index, *_) in enumerate(items):
        if number == skipped:
            settle(device)
            start = time.perf_counter()
        elif number > skipped:
            count += len(index)
    settle(device)
    return count / (time.perf_counter() - start)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(*, of: int | str = "self") -> dict[str, int]:
    """Return megabytes of a process: all that is resident, its own part, and mapped files."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{of}/status").read_text().splitlines())
    names = {"resident": "VmRSS", "own": "RssAnon", "files": "RssFile"}
    return {name: int(lines[key].split()[0]) // 1024 for name, key in names.items()}


def usual(store: Any, batch: int) -> Iterator[tuple[Tensor, ...]]:
    """Make two views as most training scripts do: Pillow opens, torchvision crops, resizes and flips, one process."""
    transform = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    for index in batches_of(store, batch):
        views: list[list[Tensor]] = [[], []]
        for row in index.tolist():
            with Image.open(store.file(row)) as image:
                picture = image.convert("RGB")
            for view in views:
                view.append(transform(picture))
        yield index, *(torch.stack(view) for view in views)


def differing(root: Path, packed: DataSet, workers: Sequence[int], batch: int) -> dict[str, int]:
    """Count bytes in which two batches differ between numbers of workers, and a pack from its folder."""

    def first(num_workers: int) -> list[Tensor]:
        store = streams(root, num_workers, "cpu").train
        return [
            image
            for _, *images in store.batches(batches_of(store, batch)[:2], policy=VIEWS, **FEED)
            for image in images
        ]

    expected = first(workers[0])
    found = {
        f"workers {number}": sum(int((a != b).sum()) for a, b in zip(expected, first(number), strict=True))
        for number in workers[1:]
    }
    some = torch.arange(0, len(packed.train), 7)
    decoded = load("folder", root=root, size=256, views="none", placement="stream", num_workers=0)
    found["pack"] = int((packed.train.batch(some) != decoded.train.batch(some)).sum())
    return found


def streams(root: Path, num_workers: int, device: str) -> DataSet:
    return place(load("folder", root=root, views="imagenet", placement="stream", num_workers=num_workers), device)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=at_least(4), default=1500)
    parser.add_argument("--batch", type=at_least(1), default=128)
    parser.add_argument("--workers", type=at_least(0), nargs="+", default=[0, 1, os.cpu_count() or 1])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "throughput.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)  # workers take the cores
    workers = sorted(set(options.workers))
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["VRM_CACHE"] = f"{temporary}/cache"
        root, folder = Path(temporary) / "photographs", Path(temporary) / "pack"
        total = make_folder(root, options.images)
        print(
            f"{options.images} photographs, {total / options.images / 1000:.0f} kB each with the test split", flush=True
        )

        source = load("folder", root=root, size=256, views="none", placement="stream", num_workers=max(workers))
        seconds, _ = timed(lambda: write_pack(source, folder))
        packing = len(source.train) + len(source.test)
        before = memory()
        opening, packed = timed(lambda: open_pack(folder, views="imagenet"))
        report: dict[str, Any] = {
            "pack": {
                "megabytes": round(sum(file.stat().st_size for file in folder.iterdir()) / 1e6),
                "images_per_second_made": round(packing / seconds),
                "seconds_to_open": round(opening, 4),
                "megabytes_to_open": memory()["resident"] - before["resident"],
            }
        }
        differences = differing(root, packed, workers, options.batch)
        print(f"bytes that differ: {differences}", flush=True)

        rows = []
        skipped = min(3, options.images // options.batch // 2)
        alone = streams(root, 0, "cpu").train
        few = batches_of(alone, options.batch)[: 2 + skipped]
        report["usual_images_per_second"] = round(
            rate(usual(alone.select(torch.cat([*few])), options.batch), device, 1)
        )
        print(f"torchvision's usual way, one process: {report['usual_images_per_second']} images/s", flush=True)
        for number in workers:
            store = streams(root, number, options.device).train
            fed = store.batches(batches_of(store, options.batch), policy=VIEWS, **FEED)
            row = {"workers": number, "images_per_second": round(rate(fed, device, skipped)), "memory": memory()}
            processes = multiprocessing.active_children()
            row["memory_of_each_worker"] = [memory(of=process.pid) for process in processes if process.pid]
            del fed, store  # its workers end
            rows.append(row)
            print(f"streaming, {number} workers: {row['images_per_second']} images/s", flush=True)
        report["streaming"] = rows
        mapped = place(packed, options.device, "host").train
        for epoch in ("first", "second"):  # every image is checked in the first
            fed = mapped.batches(batches_of(mapped, options.batch), policy=VIEWS, **FEED)
            report["pack"][f"images_per_second_{epoch}_epoch"] = round(rate(fed, device, skipped))
        report["pack"]["memory"] = memory()
        print(f"pack: {report['pack']}", flush=True)
    report |= {
        "differing_bytes": differences,
        "images": options.images,
        "kilobytes_an_image": round(total / options.images / 1000),
        "batch": options.batch,
        "views": 2,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores_of_machine": os.cpu_count(),
        "load_average_at_end": os.getloadavg()[0],
        "processor": processor_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(differences.values()))


if __name__ == "__main__":
    raise SystemExit(main())
