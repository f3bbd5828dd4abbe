"""Top-1 and top-5 accuracy on a split, whole or a sample of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm.contract import Outputs
from vrm.data import Store
from vrm.engine.distribution import ALONE, World


@torch.no_grad()
def evaluate(
    network: nn.Module,
    store: Store,
    *,
    batch_size: int = 250,
    sample: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    world: World = ALONE,
) -> dict[str, float]:
    """``top1`` and ``top5`` in percent and the mean cross entropy ``loss`` in nats, over every image of ``store`` once.

    With fewer than five classes top-5 is taken over all of them. Logits with a NaN are wrong, and make ``loss`` NaN.

    Args:
        network: From uint8 images to :class:`~vrm.contract.Outputs`; it is evaluated in eval mode, and each of its
            modules is left in the mode it had.
        store: The split.
        batch_size: Images at a time.
        sample: Only so many images, spread evenly over the split.
        on_batch: Called with the number of images of each batch.
        world: The processes that share the work, each image in one of them; all get the same result.

    Raises:
        ValueError: the network's logits are not one for each class of the split.
    """
    count = len(store) if sample is None else min(sample, len(store))
    device = store.targets.device
    chosen = torch.arange(*world.span(count), device=device) * len(store) // count
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with _evaluating(network):
        for index, images in store.read(torch.split(chosen, batch_size) if len(chosen) else ()):
            outputs: Outputs = network(images)
            sums += _score(outputs.logits.float(), store.targets[index], store.num_classes)
            if on_batch is not None:
                on_batch(len(index))
    top1, top5, loss = (world.sum(sums) / count).tolist()
    return {"top1": 100 * top1, "top5": 100 * top5, "loss": loss}


def _score(logits_BC: Tensor, target_B: Tensor, num_classes: int) -> Tensor:
    if logits_BC.shape[1] != num_classes:
        raise ValueError(
            f"the network gives {logits_BC.shape[1]} logits, but the data have {num_classes} classes; give a network "
            "with one logit for each class"
        )
    best = logits_BC.topk(min(5, num_classes), dim=1).indices == target_B[:, None]
    best = best & ~logits_BC.isnan().any(1, keepdim=True)  # NaN sorts first, whatever the class
    loss = F.cross_entropy(logits_BC, target_B, reduction="sum")
    return torch.stack([best[:, 0].sum(), best.sum(), loss]).double()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module is in its own mode again, also those that were set apart from the rest."""
    modes = [(module, module.training) for module in network.modules()]
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
        for module, mode in modes:
            module.training = mode
