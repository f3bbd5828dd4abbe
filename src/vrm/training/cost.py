"""What methods cost beside the networks, on one reference pair: resnet32x4 to resnet8x4 on CIFAR-100, batch 64."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vrm import methods, models
from vrm.contract import DataInfo, Probe

TEACHER, STUDENT = "resnet32x4", "resnet8x4"


@dataclass(frozen=True)
class Cost:
    """What one method adds to a run.

    ``passes`` of the student for each image and epoch; ``parameters`` and ``memory`` (bytes) of the method's own;
    ``epochs`` that its phases add.
    """

    passes: int
    parameters: int
    memory: int
    epochs: int

    def __str__(self) -> str:
        """In words; what costs nothing is left out."""
        parts = [f"{self.passes} student pass{'es' * (self.passes > 1)}"]
        parts += [f"{self.parameters / 1e6:.2f} M parameters"] * bool(self.parameters)
        parts += [f"{self.memory / 1e6:.1f} MB of memory"] * (self.memory >= 1e5)
        parts += [f"{self.epochs} more epochs"] * bool(self.epochs)
        return ", ".join(parts)


@lru_cache(maxsize=1)
def _probes() -> tuple[Probe, Probe]:
    def probe(name: str) -> Probe:
        return models.probe(models.create(name, num_classes=100), name=name, input_size=(32, 32))

    with torch.random.fork_rng(devices=[]):
        return probe(STUDENT), probe(TEACHER)


def cost(name: str) -> Cost:
    """The cost of a method with its default options."""
    method = methods.load(name)()
    needs = method.needs
    if needs.teacher:
        with torch.random.fork_rng(devices=[]):
            method.build(*_probes(), DataInfo(50_000, 100, 64, torch.arange(50_000) % 100))
    return Cost(
        passes=1 + needs.virtual_views,
        parameters=sum(p.numel() for p in method.parameters()),
        memory=sum(b.numel() * b.element_size() for b in method.buffers()),
        epochs=sum(phase.epochs or 0 for phase in method.phases),
    )
