"""Measure each loss on logits or maps against its released formula written plainly, in turns within one run.

    python benchmarks/losses.py [--sizes 64x100,256x1000] [--threads 1] [--seconds 1] [--out FILE]

Every case is forward and backward from float32 tensors, the same for both forms, and both must give the same value.
Sizes are batch x classes; ICKD and SDD work on maps of 256 channels, 8 x 8. The ratio is that of the medians: how many
times as fast our form is. Results are written to ``benchmarks/results/losses-cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from arguments import at_least
from torch import Tensor, nn

from vrm.contract import Progress
from vrm.engine.devices import processor_name
from vrm.methods import crld, dist, ickd, kd, lskd, nkd, sdd, ttm, uskd, wttm

Loss = Callable[[], Tensor]
CHANNELS, PIXELS = 256, 8


def plain_kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """KL of softened predictions by row, as most released code has it."""
    log_p = F.log_softmax(s / temperature, dim=1)
    return F.kl_div(log_p, F.softmax(t / temperature, dim=1), reduction="none").sum(1) * temperature**2


def plain_nkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Target and non-target cross entropies; the target is removed by a boolean mask."""
    q, log_p = F.softmax(t, dim=1), F.log_softmax(s, dim=1)
    others = torch.ones_like(s).scatter_(1, y[:, None], 0).bool()
    rest_s, rest_t = (x[others].reshape(len(x), -1) for x in (s, t))
    target = -(q.gather(1, y[:, None]) * log_p.gather(1, y[:, None])).mean()
    return target - 1.5 * (F.softmax(rest_t, dim=1) * F.log_softmax(rest_s, dim=1)).sum(1).mean()


def plain_lskd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """KD of standardised logits."""

    def z(x: Tensor) -> Tensor:
        return (x - x.mean(dim=-1, keepdims=True)) / (1e-7 + x.std(dim=-1, keepdims=True))

    return plain_kl(z(s), z(t), 2.0).mean()


def plain_wttm(s: Tensor, t: Tensor, y: Tensor, *, weighted: bool = True) -> Tensor:
    """The teacher's probabilities to a power, normalised by their sum."""
    powered = F.softmax(t, dim=1) ** 0.2
    total = powered.sum(1)
    rows = F.kl_div(F.log_softmax(s, dim=1), powered / total[:, None], reduction="none").sum(1)
    return ((total if weighted else 1) * rows).mean()


def plain_dist(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation as the cosine of centred vectors, of rows and then of columns."""

    def pearson(a: Tensor, b: Tensor) -> Tensor:
        a, b = (x - x.mean(1).unsqueeze(1) for x in (a, b))
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)

    p, q = F.softmax(s / 4.0, dim=1), F.softmax(t / 4.0, dim=1)
    inter, intra = 1 - pearson(p, q).mean(), 1 - pearson(p.transpose(0, 1), q.transpose(0, 1)).mean()
    return 4.0**2 * (inter + intra)


def plain_crld(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Four divergences under two masks; the halves of the batch are the two views."""
    (weak_s, strong_s), (weak_t, strong_t) = s.chunk(2), t.chunk(2)
    weak, strong = (F.softmax(x, dim=1).max(dim=1)[0].ge(tau).to(s) for x, tau in ((weak_t, 0.9), (strong_t, 0.2)))
    within = (weak * (plain_kl(weak_s, weak_t, 4.0) + plain_kl(strong_s, strong_t, 4.0))).mean()
    return within + (strong * (plain_kl(strong_s, weak_t, 4.0) + plain_kl(weak_s, strong_t, 4.0))).mean()


def plain_uskd(s: Tensor, weak: Tensor, y: Tensor) -> Tensor:
    """Soft labels from squared probabilities, Zipf labels by two sorts, boolean masks, as released."""
    label, (batch, classes) = y[:, None], s.shape
    p, log_p, w = F.softmax(s, dim=1), F.log_softmax(s, dim=1), F.softmax(weak, dim=1)
    square = p.gather(1, label) ** 2
    target = -((square + 1 - square.mean()).detach() * log_p.gather(1, label)).mean()
    smooth = torch.zeros_like(s).scatter_(1, label, 0.9) + 0.1 / classes
    score = w / (1 - w.gather(1, label) + 1e-6) + log_p / (1 - log_p.gather(1, label) + 1e-6)
    rank = score.argsort(dim=1, descending=True).argsort(dim=1)
    others = torch.ones_like(s).scatter_(1, label, 0).bool()
    zipf = (1 / torch.arange(1, classes + 1)).repeat(batch, 1).gather(1, rank)[others].reshape(batch, -1)
    zipf = (zipf / zipf.sum(1, keepdim=True)).detach()
    rest = F.log_softmax(s[others].reshape(batch, -1), dim=1)
    weak_term = -(smooth * F.log_softmax(weak, dim=1)).sum(1).mean()
    return 0.1 * (target - (zipf * rest).sum(1).mean() + weak_term)


def plain_ickd(s_BDHW: Tensor, t_BDHW: Tensor) -> Tensor:
    """Squared differences of row-normalised channel products."""

    def rows(x: Tensor) -> Tensor:
        flat = x.view(x.size(0), x.size(1), -1)
        return F.normalize(torch.bmm(flat, flat.permute(0, 2, 1)).view(x.size(0) * x.size(1), -1), dim=1)

    return (rows(s_BDHW) - rows(t_BDHW)).square().sum() / (s_BDHW.size(0) * s_BDHW.size(1))


def plain_sdd(s_BDHW: Tensor, t_BDHW: Tensor, y: Tensor, heads: tuple[nn.Linear, nn.Linear]) -> Tensor:
    """KD of regions, with indices of the complementary and the consistent ones, as released."""
    logits = []
    for x, head in zip((s_BDHW, t_BDHW), heads, strict=True):
        finest = F.adaptive_avg_pool2d(x, (4, 4))
        pooled = [F.adaptive_avg_pool2d(finest, (k, k)).view(len(x), x.size(1), -1) for k in (1, 2)]
        logits.append(head(torch.cat(pooled, dim=2).permute(0, 2, 1).reshape(-1, x.size(1))))
    s, t = logits[0], logits[1].detach()
    rows = plain_kl(s, t, 4.0)
    right = (t.argmax(1) == y.repeat_interleave(5)).view(-1, 5)
    contradicting = torch.nonzero((right != right[:, :1]).flatten()).flatten()
    return (rows.sum() + rows[contradicting].sum()) / len(rows)


def cases(batch: int, classes: int) -> dict[str, tuple[tuple[Tensor, ...], Loss, Loss]]:
    """Return the tensors that get gradients, our loss and the plain one, for each method."""
    generator = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(batch, classes, generator=generator) for _ in range(2))
    maps = [torch.randn(batch, CHANNELS, PIXELS, PIXELS, generator=generator).relu() for _ in range(2)]
    y = torch.randint(classes, (batch,), generator=generator)
    heads = nn.Linear(CHANNELS, classes), nn.Linear(CHANNELS, classes)
    heads[1].requires_grad_(False)
    s.requires_grad_()
    maps[0].requires_grad_()
    two_s, two_t = s.chunk(2), t.chunk(2)
    epoch = torch.tensor(1)
    of_kd = kd.KD(kd_weight=1.0)

    def our_sdd() -> Tensor:
        regions = sdd.region_logits(maps[0], heads[0]), sdd.region_logits(maps[1], heads[1])
        weights = sdd.region_weights(regions[1], y)
        rows = of_kd.row_loss(*(x.flatten(0, 1) for x in regions), y.repeat_interleave(5), Progress(epoch, epoch, 1, 1))
        return sdd.sdd_loss(rows.view_as(weights), weights)

    return {
        "kd": ((s,), lambda: kd.kd_loss(s, t), lambda: plain_kl(s, t, 4.0).mean()),
        "nkd": ((s,), lambda: nkd.nkd_loss(s, t, y), lambda: plain_nkd(s, t, y)),
        "lskd": ((s,), lambda: lskd.lskd_loss(s, t), lambda: plain_lskd(s, t, y)),
        "ttm": ((s,), lambda: ttm.ttm_loss(s, t, gamma=0.2), lambda: plain_wttm(s, t, y, weighted=False)),
        "wttm": ((s,), lambda: wttm.wttm_loss(s, t), lambda: plain_wttm(s, t, y)),
        "dist": ((s,), lambda: sum(dist.dist_loss(s, t), torch.zeros(())), lambda: plain_dist(s, t, y)),
        "crld": ((s,), lambda: sum(crld.crld_loss(two_s, two_t), torch.zeros(())), lambda: plain_crld(s, t, y)),
        "uskd": ((s,), lambda: uskd.uskd_loss(s, t, y), lambda: plain_uskd(s, t, y)),
        "ickd": ((maps[0],), lambda: ickd.ickd_loss(*maps), lambda: plain_ickd(*maps)),
        "sdd": ((maps[0], *heads[0].parameters()), our_sdd, lambda: plain_sdd(*maps, y, heads)),
    }


def measure(leaves: tuple[Tensor, ...], forms: tuple[Loss, Loss], seconds: float) -> tuple[float, float]:
    """Return the median milliseconds of forward and backward of each form; they take turns for ``seconds``."""
    taken: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 5:
        for form, times in zip(forms, taken, strict=True):
            began = time.perf_counter()
            torch.autograd.grad(form(), leaves)
            times.append(time.perf_counter() - began)
    return tuple(1000 * statistics.median(times[1:]) for times in taken)


def main() -> None:
    """Measure all cases, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="64x100,256x1000", help="batch x classes, with commas between")
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "losses-cpu.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    print(f"{'loss':6}{'size':>10}{'ours ms':>10}{'plain ms':>10}{'ratio':>7}")
    for size in given.sizes.split(","):
        batch, classes = map(int, size.split("x"))
        for name, (leaves, ours, plain) in cases(batch, classes).items():
            torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-5)
            a, b = measure(leaves, (ours, plain), given.seconds)
            rows.append({"loss": name, "size": size, "ours_ms": a, "plain_ms": b, "ratio": b / a})
            print(f"{name:6}{size:>10}{a:10.3f}{b:10.3f}{b / a:7.2f}", flush=True)
    facts = {"device": processor_name(), "threads": given.threads, "torch": torch.__version__, "load": os.getloadavg()}
    given.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
