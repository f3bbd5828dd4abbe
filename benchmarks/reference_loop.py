"""Claim: vrm's training step is no slower than the field's usual loop on a CPU, and many times as fast on a GPU.

    python benchmarks/reference_loop.py [pair=resnet32x4/resnet8x4] [batch_size=64] [precision=bfloat16] [key=value ..]
        [--methods kd vrm] [--steps 4] [--rounds 3] [--workers 2] [--out FILE]

The opponent is what most released code does, written plainly here: images augmented one by one with PIL in the workers
of a DataLoader, networks run eagerly, losses and accuracies fetched with ``.item()`` in every step, VRM as Algorithm 1
has it, with every edge in memory. Ours is the step of a run: fed from its store, recorded on a GPU, its meter read
every 50 steps. Both train the same networks from the same weights in the same precision, on the same images (made up
without ``data.root``), with the same number of views and the same augmentations, waiting for data included.

They take turns, round after round. A turn of the opponent starts its workers, consumes the batches that they prepared
meanwhile, and is then timed; afterwards the workers end, so that nothing of it runs while ours is timed. Settings are
given as for ``vrm bench step``. First both sides run the student on the same pixels and compute the whole loss of the
same logits; the exit status is 1 if they differ by more than 1e-4. The results go to
benchmarks/results/DEVICE/reference_loop-PRECISION.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from arguments import at_least
from PIL import Image, ImageDraw
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from views import FILL, OPERATIONS, PADDING, TORCHSSL

from vrm.bench.inputs import is_made_up, load_images, place_images, with_weights
from vrm.bench.step_time import build_step_of_phase, whole_batches
from vrm.bench.subjects import Settings, check_words, resolve_run
from vrm.config.words import split_words
from vrm.contract import Batch, Outputs, Progress, Views
from vrm.data import DataSet, ImageStore, epoch_batches
from vrm.engine.cuda_graphs import CudaGraphRecorder, RecordedFunction
from vrm.engine.devices import processor_name
from vrm.engine.distribution import ALONE
from vrm.runs.assembly import Assembly, assemble
from vrm.runs.environment import describe_environment
from vrm.runs.phase import why_eager

PAIR = "pair=resnet32x4/resnet8x4"
TOLERANCE = 1e-4
LOG_EVERY = 50
TEMPERATURE, ALPHA, BETA, KEEP = 4.0, 10.0, 10.0, 0.9
HALF = {"bfloat16": torch.bfloat16}

# ---- the usual loop ------------------------------------------------------------------------------------------------


class RandAugment:
    """Apply two operations of TorchSSL's list."""

    def __call__(self, image: Image.Image) -> Image.Image:
        for name in random.choices(list(TORCHSSL), k=2):
            low, high = TORCHSSL[name]
            image = OPERATIONS[name](image, low + (high - low) * random.random())
        return image


class Cutout:
    """Paint a grey square of up to half the side."""

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        side, x, y = random.uniform(0, 0.5) * width, random.uniform(0, width), random.uniform(0, height)
        left, top = max(0, x - side / 2), max(0, y - side / 2)
        image = image.copy()
        ImageDraw.Draw(image).rectangle((left, top, min(width, left + side), min(height, top + side)), FILL)
        return image


class Images(Dataset):
    """Training images with one or two views of each."""

    def __init__(self, data: DataSet, num_views: int) -> None:
        store = data.train
        assert isinstance(store, ImageStore)
        self.arrays = store.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.targets = store.targets.tolist()
        weak = [transforms.RandomCrop(data.image_size, padding=PADDING), transforms.RandomHorizontalFlip()]
        last = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
        strong = [RandAugment(), Cutout()]
        self.views = [transforms.Compose(weak + last), transforms.Compose(weak + strong + last)][:num_views]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        image = Image.fromarray(self.arrays[row])
        return (*(view(image) for view in self.views), self.targets[row])


class AverageMeter:
    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: float, count: int) -> None:
        self.sum, self.count = self.sum + value * count, self.count + count


def accuracy(logits: Tensor, target: Tensor, topk: tuple[int, ...]) -> list[Tensor]:
    _, predicted = logits.topk(max(topk), 1)
    correct = predicted.eq(target.view(-1, 1))
    return [correct[:, :k].float().sum() * (100.0 / len(target)) for k in topk]


def usual_kd(student: Tensor, teacher: Tensor) -> Tensor:
    log_p, q = F.log_softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(log_p, q, reduction="batchmean") * TEMPERATURE**2


def algorithm_1(student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the relation loss between samples and between classes, without the student's unreliable edges."""

    def edges(real: Tensor, virtual: Tensor) -> Tensor:
        return F.normalize(real.unsqueeze(0) - virtual.unsqueeze(1), dim=-1, eps=1e-8)

    def graph(s: list[Tensor], t: list[Tensor]) -> Tensor:
        with torch.no_grad():
            p, q = (v / v.sum(1, keepdim=True) for v in s)
            entropy = torch.special.entr((p.unsqueeze(0) + q.unsqueeze(1)) / 2).sum(-1)
            last = entropy.flatten().sort().values[int(KEEP * (entropy.numel() - 1))]
            kept = (entropy <= last).float()
        return (0.5 * (edges(*s) - edges(*t)).square().sum(-1) * kept).sum() / kept.sum()

    s, t = ([F.softmax(z / TEMPERATURE, dim=1) for z in logits] for logits in (student, teacher))
    return graph(s, t), graph([v.T for v in s], [v.T for v in t])


def usual_loss(method: str, learnt: list[Tensor], taught: list[Tensor], target: Tensor) -> Tensor:
    if method == "kd":
        return 0.1 * F.cross_entropy(learnt[0], target) + 0.9 * usual_kd(learnt[0], taught[0])
    between_samples, between_classes = algorithm_1(learnt, taught)
    task = F.cross_entropy(learnt[0], target) + F.cross_entropy(learnt[1], target)
    return task + ALPHA * between_samples + BETA * between_classes


class UsualLoop:
    """The networks and the loader; :meth:`turn` starts the workers, trains, and ends them."""

    def __init__(self, assembly: Assembly, data: DataSet, method: str, workers: int) -> None:
        assert assembly.teacher is not None
        self.device, self.method, self.workers = assembly.device, method, workers
        self.student = deepcopy(assembly.student.network)
        self.teacher = deepcopy(assembly.teacher.teacher.network)
        settings = assembly.run.optimizer
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        half = HALF.get(assembly.run.precision)
        self.autocast = torch.autocast(self.device.type, half) if half else nullcontext()
        self.loader = DataLoader(
            Images(data, 2 if method == "vrm" else 1),
            batch_size=assembly.run.batch_size,
            shuffle=True,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            drop_last=True,
        )
        self.meters = {name: AverageMeter() for name in ("loss", "top1", "top5")}

    def batches(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def turn(self, steps: int) -> float:
        """Return the seconds of a step, after the batches prepared ahead are consumed."""
        batches = self.batches()
        for _ in range(1 + self.loader.prefetch_factor * self.workers if self.workers else 1):
            self.step(next(batches))
        found = seconds(lambda: self.step(next(batches)), steps, self.device)
        batches.close()  # and with it the loader's iterator and its workers
        return found

    def step(self, batch: list[Tensor]) -> None:
        *views, target = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        self.student.train()
        with self.autocast:
            with torch.no_grad():
                taught = [self.teacher(view) for view in views]
            learnt = [self.student(view) for view in views]
        learnt, taught = [z.float() for z in learnt], [z.float() for z in taught]
        loss = usual_loss(self.method, learnt, taught, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        top1, top5 = accuracy(learnt[0], target, topk=(1, 5))
        for name, value in (("loss", loss), ("top1", top1), ("top5", top5)):
            self.meters[name].update(value.item(), len(target))


# ---- ours ----------------------------------------------------------------------------------------------------------


class OurLoop:
    """The step of a run, with batches as training gets them."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly
        self.made = build_step_of_phase(assembly)
        self.call: Callable[..., None] = self.made
        if why_eager(assembly) is None:
            self.call = RecordedFunction(self.made, CudaGraphRecorder(assembly.device))
        self.steps = 0
        self.batches = self.feed()

    def feed(self) -> Iterator[tuple[Tensor, ...]]:
        run, store, device = self.assembly.run, self.assembly.data.train, self.assembly.device
        epoch = 0
        while True:
            epoch += 1
            self.made.epoch.fill_(epoch)
            order = epoch_batches(len(store), run.batch_size, seed=run.data_seed, epoch=epoch, device=device)
            yield from store.batches(
                [index for index in order if len(index) == run.batch_size],
                epoch=epoch,
                seed=run.data_seed,
                policy=self.assembly.policy,
                num_virtual=self.assembly.distiller.num_virtual,
            )

    def turn(self, steps: int, *, warmup: int = 1) -> float:
        """Return the seconds of a step."""
        for _ in range(warmup):
            self.step()
        return seconds(self.step, steps, self.assembly.device)

    def step(self) -> None:
        for group in self.made.optimizer.param_groups:
            group["lr"].fill_(self.assembly.run.optimizer.lr)
        self.call(*next(self.batches))
        self.steps += 1
        if self.steps % LOG_EVERY == 0:
            self.made.meter.read(ALONE)


# ---- both ----------------------------------------------------------------------------------------------------------


def seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Return the seconds of wall time of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def differences(assembly: Assembly, data: DataSet, method: str) -> dict[str, float]:
    """Return how far the two sides differ on the same pixels: in the student's logits, and in the loss of equal logits.

    The differences are relative to the largest logit and to the usual loss. The logits are computed in float32 with
    batch norm in train mode, the loss in float64: in float32 Algorithm 1 has few correct digits for edges between views
    that are almost equal.
    """
    batch = whole_batches(assembly, 1)[0]
    index, pixels = batch[0], build_step_of_phase(assembly).views(*batch)
    target = data.train.targets[index]
    mean, std = (torch.tensor(value, device=index.device).view(3, 1, 1) for value in (data.mean, data.std))
    assert assembly.teacher is not None
    teacher: nn.Module = assembly.teacher.teacher.network
    with torch.no_grad():
        student = deepcopy(assembly.distiller.student).train()
        usual = [student.network((view.float() / 255 - mean) / std) for view in pixels]
        ours = [student(view).logits for view in pixels]
        taught = [teacher((view.float() / 255 - mean) / std).double() for view in pixels]
        apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(usual, ours, strict=True))
        learnt = [logits.double() for logits in usual]
        one = torch.ones((), dtype=torch.int64, device=index.device)
        views = (Views(Outputs(z[0]), tuple(Outputs(v) for v in z[1:])) for z in (learnt, taught))
        loss = assembly.method(*views, Batch(index, target), Progress(one, one, 1, 1)).total()
        expected = usual_loss(method, learnt, taught, target)
    return {"logits": apart, "loss": abs(float(expected - loss)) / abs(float(expected))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--methods", nargs="+", default=["kd", "vrm"], choices=["kd", "vrm"])
    parser.add_argument("--steps", type=at_least(1), default=4, help="of each side in a round")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--workers", type=at_least(0), default=2, help="of the usual loop")
    parser.add_argument("--out", type=Path)
    options = parser.parse_intermixed_args()
    own, words = split_words(options.words, Settings.model_fields)
    if own and any(not word.startswith(("samples=", "classes=")) for word in own):
        parser.error(f"of vrm bench's own words only samples= and classes= are known here, not {' '.join(own)}")
    check_words(words)
    words = words if any(word.startswith(("pair=", "teacher=")) for word in words) else [PAIR, *words]
    settings = Settings.model_validate({"samples": 4096} | dict(word.split("=") for word in own))
    rows: dict[str, Any] = {}
    load = os.getloadavg()[0]
    for method in options.methods:
        run = resolve_run("cifar100", words, method)
        data, placement = place_images(load_images(run.data, settings, Console()), run)
        with tempfile.TemporaryDirectory(prefix="vrm-reference-") as folder:
            assert run.teacher is not None
            teacher = with_weights(run.teacher, data, Path(folder))
            placed = run.data.model_copy(update={"placement": placement})
            run = run.model_copy(update={"teacher": teacher, "data": placed})
            assembly = assemble(run, dataset=data)
        if not isinstance(data.train, ImageStore):
            parser.error("the usual loop here holds its images in memory: leave data.placement out")
        apart = differences(assembly, data, method)
        usual, ours = UsualLoop(assembly, data, method, options.workers), OurLoop(assembly)
        ours.turn(1, warmup=4)
        found: dict[str, list[float]] = {"usual": [], "ours": []}
        for _ in range(options.rounds):
            found["usual"].append(usual.turn(options.steps))
            found["ours"].append(ours.turn(options.steps))
        ratios = [a / b for a, b in zip(found["usual"], found["ours"], strict=True)]
        rows[method] = {
            "student_views": 1 + assembly.distiller.num_virtual,
            "relative_differences": apart,
            "usual_images_per_second": run.batch_size / median(found["usual"]),
            "our_images_per_second": run.batch_size / median(found["ours"]),
            "ratio": median(ratios),
            "ratios": ratios,
            "usual_ms": [1e3 * value for value in found["usual"]],
            "our_ms": [1e3 * value for value in found["ours"]],
        }
        print(
            f"{method}: usual loop {rows[method]['usual_images_per_second']:,.0f} images/s, ours "
            f"{rows[method]['our_images_per_second']:,.0f}: {rows[method]['ratio']:.2f} times "
            f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}); logits differ by {apart['logits']:.1g}, "
            f"losses by {apart['loss']:.1g}",
            flush=True,
        )
        told = describe_environment(assembly.device) | {"processor": processor_name()}
    report = {
        "what": "the usual loop and ours",
        "words": words,
        "precision": run.precision,
        "batch_size": run.batch_size,
        "workers": options.workers,
        "steps_a_round": options.steps,
        "made_up_images": is_made_up(run.data, settings),
        "environment": told,
        "load_average": [load, os.getloadavg()[0]],
        "methods": rows,
    }
    slug = "-".join("".join(c if c.isalnum() else " " for c in str(told["device"]).lower()).split())
    out = options.out or Path(__file__).parent / "results" / slug / f"reference_loop-{run.precision}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")
    return int(any(not value <= TOLERANCE for row in rows.values() for value in row["relative_differences"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
