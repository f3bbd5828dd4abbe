"""Images and teachers to measure with: the real ones where they are given, made-up ones where not."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

from vrm import config, models
from vrm.bench.subjects import Settings
from vrm.config import ConfigError, Run
from vrm.data import SOURCES, DataSet, ImageStore, channel_statistics
from vrm.data.stores.dataset import few_labels
from vrm.data.stores.host import HostStore
from vrm.engine.devices import choose_device
from vrm.runs.assembly import BATCH_NORMS, load_data, place_data
from vrm.wording import nearest

MADE_UP = {"cifar10": (10, 32), "cifar100": (100, 32), "fashion-mnist": (10, 28)}
"""Number of classes, and side in pixels, of the data sets whose images are made up without ``data.root``."""


def is_made_up(data: config.Data, settings: Settings) -> bool:
    """Return whether the images of a run are made up."""
    given = data.root is not None or data.download
    return not given and (data.name in MADE_UP or settings.classes is not None)


def load_images(data: config.Data, settings: Settings, console: Console) -> DataSet:
    """Return a run's data set, read or made up. Raise ``ConfigError`` if neither is possible."""
    if not is_made_up(data, settings):
        return load_data(data, console)
    if data.name not in SOURCES:
        raise ConfigError(f"data={data.name}: {nearest(data.name, SOURCES)}")
    source = SOURCES[data.name]
    num_classes, side = MADE_UP.get(data.name, (0, 32))
    num_classes, side = settings.classes or num_classes, data.size or side
    train, test = (make_images(samples, num_classes, side) for samples in (settings.samples, num_classes))
    try:
        if data.labels_per_class is not None:
            train = few_labels(train, data.labels_per_class)
        statistics = source.statistics or channel_statistics(train)
        return DataSet(data.name, train, test, *statistics, data.views or source.view_policy)
    except ValueError as error:
        raise ConfigError(f"data={data.name}, made up: {error}") from None


def make_images(num_samples: int, num_classes: int, side: int) -> ImageStore:
    """Return images with smooth colours and some noise, each different, as photographs are; one class after another."""
    generator = torch.Generator().manual_seed(num_samples)
    images = torch.empty(num_samples, 3, side, side, dtype=torch.uint8)
    for some in torch.split(images, 4096):
        coarse = 255 * torch.rand(len(some), 3, 4, 4, generator=generator)
        smooth = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
        some.copy_(smooth.add_(torch.randn(smooth.shape, generator=generator), alpha=20).clamp_(0, 255))
    names = tuple(f"class {number}" for number in range(num_classes))
    return ImageStore(images, torch.arange(num_samples) % num_classes, names)


def place_images(dataset: DataSet, run: Run) -> tuple[DataSet, str]:
    """Put the images where training would, and return the ``data.placement`` that leaves them there."""
    placed = place_data(dataset, choose_device(run.device), run.data)
    placements = {ImageStore: "device", HostStore: "host"}
    return placed, placements.get(type(placed.train), run.data.placement)


def with_weights(teacher: config.Teacher, dataset: DataSet, folder: Path) -> config.Teacher:
    """Return a teacher that has weights as it is, and another with random ones, saved in ``folder``.

    The batch norms of the latter have seen some images, so its logits differ between images and stay finite.
    """
    if teacher.weights is not None or "/" in teacher.name:
        return teacher
    try:
        network = models.create(teacher.name, num_classes=dataset.num_classes, **teacher.options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"teacher={teacher.name}: {error}") from None
    index = torch.arange(min(32, len(dataset.test)), device=dataset.test.targets.device)
    preprocess = models.Preprocess(dataset.mean, dataset.std)
    for module in network.modules():
        if isinstance(module, BATCH_NORMS):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(preprocess(dataset.test.batch(index).cpu()))
    path = folder / "teacher.safetensors"
    models.save_weights(network, path)
    return teacher.model_copy(update={"weights": path})
