"""Draw the figures of docs/relations.md: ``python docs/figures/relations.py`` writes SVG files beside this script."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.relations import joint_entropy, match_relations, matching

FOLDER = Path(__file__).parent
plt.rcParams.update({"svg.hashsalt": "vrm", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(FOLDER / f"relations-{name}.svg", bbox_inches="tight", metadata={"Date": None})


def picture_of_edges() -> None:
    """Draw the vertices of two networks and their real-virtual edges."""
    real = torch.tensor([[0.2, 0.8], [0.8, 0.9], [0.6, 0.2]])
    virtual = real + torch.tensor([[0.12, -0.1], [-0.1, -0.14], [0.1, 0.14]])
    turn = torch.tensor([[0.92, 0.38], [-0.38, 0.92]])
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for axis, title, (a, b) in (
        (axes[0], "teacher: 9 edges", (real, virtual)),
        (axes[1], "student: the same 9", (real @ turn * 0.6 + 0.1, virtual @ turn * 0.6 + 0.1)),
    ):
        for m in range(3):
            for n in range(3):
                arrow = {"arrowstyle": "->", "color": "0.5", "shrinkA": 4, "shrinkB": 4}
                axis.annotate("", a[n].tolist(), b[m].tolist(), arrowprops=arrow)
        axis.scatter(*b.T, s=50, marker="s", color="C1", label="virtual view", zorder=3)
        axis.scatter(*a.T, s=50, color="C0", label="real view", zorder=3)
        axis.set_title(title)
        axis.set_xlabel("probability of class 1")
        axis.set_ylabel("probability of class 2")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.margins(0.12)
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)
    unit = F.normalize(real[None] - virtual[:, None], dim=-1).reshape(-1, 2)
    turned = unit @ turn
    axes[2].add_patch(plt.Circle((0, 0), 1, fill=False, color="0.85"))
    axes[2].scatter(*unit.T, s=22, color="C2", label="teacher", zorder=3)
    axes[2].scatter(*turned.T, s=22, marker="^", color="C3", label="student", zorder=3)
    for u, v in zip(unit, turned, strict=True):
        axes[2].plot([u[0], v[0]], [u[1], v[1]], color="0.5", linewidth=0.8)
    axes[2].set_aspect("equal")
    axes[2].set_axis_off()
    axes[2].legend(frameon=False, loc="center", fontsize=8)
    axes[2].set_title("relations: the edges' unit vectors")
    save(figure, "edges")


def explicit(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    student, teacher = (
        F.normalize(c[None] - d[:, None], dim=-1, eps=1e-8),
        F.normalize(a[None] - b[:, None], dim=-1, eps=1e-8),
    )
    return 0.5 * (student - teacher).square().sum(-1).mean()


def plain_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    def length(p: Tensor, q: Tensor) -> Tensor:
        return ((p * p).sum(1) + (q * q).sum(1)[:, None] - 2 * q @ p.T).clamp_min(1e-16).sqrt()

    both = (a * c).sum(1) + (b * d).sum(1)[:, None] - d @ a.T - b @ c.T
    return (1 - both / (length(a, b) * length(c, d))).mean()


def ours(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return match_relations(a, b, c, d, dtype=torch.float32)


def picture_of_errors() -> None:
    """Draw the error of the gradient for float32 logits as the two views approach each other."""
    matching.SMALL_GRAPH = 0  # compute from products, as in a large graph
    forms: dict[str, tuple[Callable[..., Tensor], torch.dtype]] = {
        "explicit edges, float32": (explicit, torch.float32),
        "products, float32": (plain_products, torch.float32),
        "products, float64": (plain_products, torch.float64),
        "products, split where short (vrm)": (ours, torch.float64),
    }
    distances = [10.0**-k for k in range(7)]
    generator = torch.Generator().manual_seed(0)
    s, e, t, f = (torch.randn(32, 20, generator=generator) for _ in range(4))

    def gradient(form: Callable[..., Tensor], dtype: torch.dtype, logits: list[Tensor]) -> Tensor:
        leaves = [z.clone().requires_grad_() for z in logits]
        return torch.autograd.grad(form(*(z.to(dtype).softmax(1) for z in leaves)), leaves[2])[0].double()

    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, (form, dtype) in forms.items():
        errors = []
        for distance in distances:
            logits = [t, t + distance * f, s, s + distance * e]
            exact = gradient(explicit, torch.float64, [z.double() for z in logits])
            errors.append(float((gradient(form, dtype, logits) - exact).abs().max() / exact.abs().max()))
        axis.loglog(distances, errors, marker="o", markersize=3, label=name)
    axis.set_xlabel("difference of the two views' logits")
    axis.set_ylabel("relative error of the gradient")
    axis.invert_xaxis()
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    save(figure, "errors")


def picture_of_entropies() -> None:
    """Draw the joint entropy, which makes an edge unreliable."""
    probability = torch.linspace(1e-4, 1 - 1e-4, 201, dtype=torch.float64)
    p = torch.stack([probability, 1 - probability], 1)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained", sharey=True)
    for axis, kind in zip(axes, ("mixture", "collision"), strict=True):
        entropy = joint_entropy(p, p, kind=kind)
        image = axis.imshow(entropy, origin="lower", extent=(0, 1, 0, 1), vmin=0, vmax=math.log(2))
        axis.contour(probability, probability, entropy, levels=[0.2, 0.4, 0.6], colors="white", linewidths=0.8)
        axis.set_title(kind)
        axis.set_xlabel("probability of class 1, real view")
    axes[0].set_ylabel("probability of class 1, virtual view")
    figure.colorbar(image, ax=axes, shrink=0.9, label="joint entropy, nats")
    save(figure, "entropies")


if __name__ == "__main__":
    picture_of_edges()
    picture_of_errors()
    picture_of_entropies()
