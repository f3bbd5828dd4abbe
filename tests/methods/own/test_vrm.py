"""VRM across processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vrm import models
from vrm.contract import Batch, DataInfo, Outputs, Progress, Views
from vrm.methods.vrm import VRM

PER_PROCESS = 3


def logits() -> list[Tensor]:
    """Student's real and virtual logits, then the teacher's, of two processes' samples."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2 * PER_PROCESS, 5, generator=generator, dtype=torch.float64) for _ in range(4)]


def relations(parts: list[Tensor], *, gather: bool) -> Tensor:
    """The distillation terms of VRM."""
    method = VRM(gather=gather)
    student, teacher = (Views(Outputs(a), (Outputs(b),)) for a, b in (parts[:2], parts[2:]))
    batch = Batch(torch.arange(len(parts[0])), torch.zeros(len(parts[0]), dtype=torch.int64))
    losses = method(student, teacher, batch, Progress(torch.tensor(1), torch.tensor(0), 1, 1))
    return losses.total(role="distillation")


def work(rank: int, folder: str) -> None:
    """One process: the terms on its own samples, with and without gathering."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = [x[rank * PER_PROCESS : (rank + 1) * PER_PROCESS] for x in logits()]
    values = {str(gather): relations(mine, gather=gather) for gather in (True, False)}
    torch.save(values, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gathered_relations_span_all_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = relations(logits(), gather=False)
    torch.testing.assert_close((ranks[0]["True"] + ranks[1]["True"]) / 2, whole, rtol=1e-12, atol=0)
    apart = (ranks[0]["False"] + ranks[1]["False"]) / 2
    assert abs(float(apart - whole)) > 1e-3


@pytest.mark.parametrize(
    ("samples", "batch", "left"), [(30, 10, None), (32, 10, None), (33, 10, 3), (30, 9, 9), (3, 10, 3), (4, 10, None)]
)
def test_shares_that_differ_in_size_cannot_be_gathered(
    monkeypatch: pytest.MonkeyPatch, samples: int, batch: int, left: int | None
) -> None:
    """Else the processes would wait for rows that never come."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    probe = models.probe(models.create("resnet8", num_classes=10), name="resnet8", input_size=(8, 8))
    data = DataInfo(samples, 10, batch, torch.zeros(samples, dtype=torch.int64))
    VRM(gather=False).build(probe, probe, data)
    if left is None:
        VRM(gather=True).build(probe, probe, data)
    else:
        with pytest.raises(ValueError, match=f"{samples} samples in batches of {batch} give one of {left}; choose"):
            VRM(gather=True).build(probe, probe, data)
