"""Top-1 and top-5 accuracy on a whole split."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm.contract import Outputs
from vrm.data import ImageStore


@torch.no_grad()
def evaluate(
    network: nn.Module, store: ImageStore, *, batch_size: int = 250, on_batch: Callable[[int], None] | None = None
) -> dict[str, float]:
    """``top1`` and ``top5`` in percent and the mean cross entropy ``loss`` in nats, over every image of ``store`` once.

    ``network`` maps uint8 images to :class:`~vrm.contract.Outputs`; it is evaluated in eval mode and left as it was.
    With fewer than five classes top-5 is taken over all of them.
    """
    training = network.training
    network.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=store.images.device)
    try:
        for start in range(0, len(store), batch_size):
            index = torch.arange(start, min(start + batch_size, len(store)), device=store.images.device)
            outputs: Outputs = network(store.batch(index))
            sums += _score(outputs.logits.float(), store.targets[index])
            if on_batch is not None:
                on_batch(len(index))
    finally:
        network.train(training)
    top1, top5, loss = (sums / len(store)).tolist()
    return {"top1": 100 * top1, "top5": 100 * top5, "loss": loss}


def _score(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    best = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices == target_B[:, None]
    loss = F.cross_entropy(logits_BC, target_B, reduction="sum")
    return torch.stack([best[:, 0].sum(), best.sum(), loss]).double()
