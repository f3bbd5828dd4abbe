"""Claim: a training step of vrm is no slower than the field's usual loop on the CPU, and many times faster on a GPU.

    python benchmarks/reference_loop.py [--pair resnet32x4/resnet8x4] [--batch 64] [--steps 4] [--rounds 3]

The opponent is the loop that most released code has, written plainly here: images augmented one by one with PIL in the
workers of a DataLoader, networks run eagerly, losses and accuracies fetched with ``.item()`` at every step; VRM as its
Algorithm 1 writes it, every edge in memory. Both sides train the same networks in float32 on the same made-up images
with the same number of views, and take turns in one run. Beforehand both compute KD's and VRM's losses of one batch of
the same pixels, which must agree. Writes benchmarks/results/reference_loop-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from views import FILL, MEAN, OPERATIONS, PADDING, STD, TORCHSSL, pil_view, processor

from vrm import config, models
from vrm.data import DataSet, ImageStore
from vrm.methods.kd import kd_loss
from vrm.methods.vrm import vrm_loss
from vrm.training.assembly import assemble
from vrm.training.loop import Training
from vrm.training.run_folder import RunFolder

CLASSES, TEMPERATURE = 100, 4.0
assert FILL  # the colour with which pil_view fills a cut-out square


class Images(Dataset):
    """One or two views of each image, augmented with PIL, as tensors."""

    def __init__(self, store: ImageStore, num_views: int) -> None:
        self.arrays = list(store.images.permute(0, 2, 3, 1).contiguous().numpy())
        self.targets = store.targets.tolist()
        self.num_views = num_views

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        views = [self.view(self.arrays[row], strong=bool(number)) for number in range(self.num_views)]
        return (*views, torch.tensor(self.targets[row]))

    @staticmethod
    def view(array: np.ndarray, *, strong: bool) -> Tensor:
        names = random.choices(list(TORCHSSL), k=2) if strong else []
        plan = {
            "crop": (random.randint(0, 2 * PADDING), random.randint(0, 2 * PADDING)),
            "flip": random.random() < 0.5,
            "steps": [(name, random.uniform(*TORCHSSL[name])) for name in names],
            "cutout": (random.random() if strong else 0.0, random.random(), random.random()),
        }
        assert all(name in OPERATIONS for name in names)
        pixels = torch.from_numpy(np.array(Image.fromarray(pil_view(array, plan)))).permute(2, 0, 1)
        return normalised(pixels[None])[0]


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def usual_kd(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    log_p, q = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return F.kl_div(log_p, q, reduction="none").sum(1).mean() * temperature**2


def explicit_vrm(student: list[Tensor], teacher: list[Tensor], keep: float = 0.9) -> tuple[Tensor, Tensor]:
    """Algorithm 1: all differences, normalised; the student's unreliable edges left out."""

    def graph(s: list[Tensor], t: list[Tensor]) -> Tensor:
        def edges(v: list[Tensor]) -> Tensor:
            return F.normalize(v[0][None] - v[1][:, None], dim=-1, eps=1e-8)

        with torch.no_grad():
            p, q = (v / v.sum(1, keepdim=True) for v in s)
            entropy = torch.special.entr((p[None] + q[:, None]) / 2).sum(-1)
            kept = entropy <= entropy.flatten().kthvalue(int(keep * (entropy.numel() - 1)) + 1).values
        loss = (edges(s) - edges(t)).square().sum(-1) / 2
        return loss[kept].mean()

    s, t = ([F.softmax(z / TEMPERATURE, 1) for z in logits] for logits in (student, teacher))
    return graph(s, t), graph([v.T for v in s], [v.T for v in t])


def usual_loop(
    store: ImageStore, teacher: nn.Module, student: nn.Module, method: str, *, batch: int, workers: int, device: str
) -> Iterator[None]:
    """Trains for ever; yields after every step."""
    loader = DataLoader(
        Images(store, 2 if method == "vrm" else 1),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        pin_memory=device == "cuda",
        persistent_workers=workers > 0,
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    student.train()
    losses, correct = [], []
    while True:
        for *views, target in loader:
            views, target = [view.to(device) for view in views], target.to(device)
            with torch.no_grad():
                taught = [teacher(view) for view in views]
            learnt = [student(view) for view in views]
            loss = sum(F.cross_entropy(logits, target) for logits in learnt)
            if method == "vrm":
                isv, icv = explicit_vrm(learnt, taught)
                loss = loss + 10 * isv + 10 * icv
            else:
                loss = 0.1 * loss + 0.9 * usual_kd(learnt[0], taught[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            correct.append((learnt[0].argmax(1) == target).float().mean().item())
            yield


def our_steps(
    data: DataSet, teacher: nn.Module, student: nn.Module, method: str, *, batch: int, device: str, folder: str
) -> Iterator[None]:
    """The training step of a run, for ever, with its logging."""
    settings = {
        "recipe": "python", "run": f"{folder}/run", "epochs": 1, "batch_size": batch, "device": device,
        "student": {"name": "student"}, "teacher": {"name": "teacher", "allow_weak": True},
        "data": {"name": "cifar100"}, "method": {"name": method, **config.method_settings(method, {})},
    }  # fmt: skip
    assembly = assemble(config.validate(settings), dataset=data, student=student, teacher=teacher)
    training = Training(assembly, RunFolder(Path(folder) / "run"), console=Console(quiet=True), quiet=True)
    training.cache = None
    step = training._enter(training.stretches[0], None)
    call = training._captured(step)
    assembly.distiller.train()
    number = 0
    while True:
        step.epoch.add_(1)
        order = torch.randperm(len(data.train)).to(assembly.device)
        batches = [index for index in torch.split(order, batch) if len(index) == batch]
        for index, *images in assembly.data.train.feed(
            batches, epoch=1, seed=0, policy=assembly.policy, num_virtual=assembly.distiller.num_virtual
        ):
            call(index, *images)
            number += 1
            if number % 50 == 0:
                step.meter.read(training.world)
            yield


def check(teacher: nn.Module, student: nn.Module, images: Tensor) -> dict[str, float]:
    """The relative differences of both sides' losses on the same pixels."""
    views = [normalised(images), normalised(images.flip(-1))]
    with torch.no_grad():
        t, s = ([network.eval()(view).double() for view in views] for network in (teacher, student))
        pairs = {"kd": (usual_kd(s[0], t[0]), kd_loss(s[0], t[0], temperature=TEMPERATURE))}
        pairs |= dict(zip(("isv", "icv"), zip(explicit_vrm(s, t), vrm_loss(*s, *t), strict=True), strict=True))
    return {name: abs(float(a - b)) / abs(float(a)) for name, (a, b) in pairs.items()}


def seconds(loop: Iterator[None], steps: int, wait: Callable[[], object]) -> float:
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        next(loop)
    wait()
    return (time.perf_counter() - started) / steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="resnet32x4/resnet8x4")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="of each side in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="of the usual loop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, batch = options.device, options.batch
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    teacher_name, student_name = options.pair.split("/")

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (max(20 * batch, 1000), 3, 32, 32), dtype=torch.uint8, generator=generator)
    store = ImageStore(images, torch.arange(len(images)) % CLASSES, tuple(map(str, range(CLASSES))))
    data = DataSet("cifar100", store, store, MEAN, STD, "cifar")

    def networks() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        made = [models.create(each, num_classes=CLASSES).to(device) for each in (teacher_name, student_name)]
        return made[0].eval().requires_grad_(False), made[1]

    differences = check(*networks(), images[:batch].to(device))
    print("relative differences of the losses on the same pixels:", differences)
    rows: dict[str, Any] = {}
    for method in ("kd", "vrm"):
        with tempfile.TemporaryDirectory() as folder:
            sides = {
                "usual": usual_loop(store, *networks(), method, batch=batch, workers=options.workers, device=device),
                "vrm": our_steps(data, *networks(), method, batch=batch, device=device, folder=folder),
            }
            measured: dict[str, list[float]] = {side: [] for side in sides}
            for loop in sides.values():
                seconds(loop, 5 if device == "cuda" else 1, wait)  # warm-up, recording
            for _ in range(options.rounds):
                for side, loop in sides.items():
                    if side == "usual":  # use up what the workers prepared while the other side had its turn
                        seconds(loop, 2 * options.workers, wait)
                    measured[side].append(seconds(loop, options.steps, wait))
        ratios = [a / b for a, b in zip(measured["usual"], measured["vrm"], strict=True)]
        rows[method] = {
            "usual_images_per_second": round(batch / statistics.median(measured["usual"]), 1),
            "vrm_images_per_second": round(batch / statistics.median(measured["vrm"]), 1),
            "ratio": round(statistics.median(ratios), 2),
            "ratios": [round(ratio, 2) for ratio in ratios],
        }
        print(f"{method}: usual loop {rows[method]['usual_images_per_second']} images/s, "
              f"vrm {rows[method]['vrm_images_per_second']}: {rows[method]['ratio']} times", flush=True)  # fmt: skip
    report = {
        "pair": options.pair, "batch": batch, "precision": "float32", "workers": options.workers,
        "views": {"kd": 1, "vrm": 2}, "device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0], "torch": torch.__version__, "differences": differences, "methods": rows,
    }  # fmt: skip
    slug = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
    out = options.out or Path(__file__).parent / "results" / f"reference_loop-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    return int(max(differences.values()) > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
