"""Scores of a network on a split, whole or a sample of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vrm.contract import Outputs
from vrm.data import Store
from vrm.engine.distribution import ALONE, World
from vrm.models.modes import evaluation_mode
from vrm.tasks import Task

LARGEST_BATCH, PIXELS = 250, {"cpu": 1 << 18, "cuda": 1 << 20}
"""Images of one forward pass, and pixels of all of them: a CPU takes a second for five images of 224 x 224 pixels."""


class Stopped(Exception):
    """An evaluation ended early, as it was asked to."""


@torch.no_grad()
def evaluate(
    network: nn.Module,
    store: Store,
    task: Task,
    *,
    batch_size: int | None = None,
    sample: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> dict[str, float]:
    """Return the task's scores, by metric key, of one pass over the images of a split.

    Args:
        network: From uint8 images to :class:`~vrm.contract.Outputs`. It is evaluated in eval mode; afterwards each of
            its modules is in the mode it had before.
        store: The split.
        task: What the network was trained for.
        batch_size: Images in one forward pass; by default as many as have ``PIXELS``, at most 250.
        sample: Use only this many images, spread evenly over the split.
        on_batch: Called after each batch with its number of images.
        stopping: Asked after each batch whether to end early; once true, it stays true.
        world: The processes that divide the images among them; all get the same result.

    Raises:
        Stopped: A process was asked to end early.
        ValueError: The network's logits are not those that the task expects for this split.
    """
    count = len(store) if sample is None else min(sample, len(store))
    device = store.targets.device
    chosen = torch.arange(*world.span(count), device=device) * len(store) // count
    height, width = store.image_size
    size = batch_size or max(1, min(LARGEST_BATCH, PIXELS[device.type] // (height * width)))
    sums = torch.zeros(len(task.metrics(store.num_classes)), dtype=torch.float64, device=device)
    with evaluation_mode(network):
        for index, images in store.read(torch.split(chosen, size) if len(chosen) else ()):
            outputs: Outputs = network(images)
            sums += task.batch_sums(outputs.logits, store.targets[index], store.num_classes)
            if on_batch is not None:
                on_batch(len(index))
            if stopping():
                break
    if world.any(stopping()):
        raise Stopped
    return task.scores(world.sum(sums), count, store.num_classes)
