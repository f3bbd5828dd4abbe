"""Relations in closed form against Algorithm 1 with explicit edges, and pruning."""

from __future__ import annotations

import contextlib
import math
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vrm.methods.vrm import vrm_feature_loss, vrm_loss
from vrm.relations import (
    EntropyThreshold,
    class_distributions,
    joint_entropy,
    kth_smallest,
    match_relations,
    matching,
    predictions,
    prune_edges,
    pruning,
)

from . import algorithm_1 as explicit

EPS_32 = torch.finfo(torch.float32).eps
Logits = explicit.Vertices


def draw(seed: int, *shape: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda scale=1.0: scale * torch.randn(*shape, generator=generator)


def four(make: Callable[[], Tensor]) -> Logits:
    return make(), make(), make(), make()


def plain(seed: int, num_samples: int, num_classes: int, dtype: torch.dtype = torch.float64) -> Logits:
    normal = draw(seed, num_samples, num_classes)
    return four(lambda: normal(3.0).to(dtype))


# What a training run meets, and what it should not: (student real, student virtual, teacher real, teacher virtual).


def near_views(normal: Callable[..., Tensor], step: float) -> Logits:
    s, t = normal(3.0), normal(3.0)
    return s, s + normal(step), t, t + normal(step)


def at_initialisation(normal: Callable[..., Tensor]) -> Logits:
    t = normal(3.0)
    return normal(1e-3), normal(1e-3), t, t + normal()


def saturated(normal: Callable[..., Tensor], scale: float) -> Logits:
    one_hot = scale * (normal().argsort(1) == 0).float()
    return one_hot / 2 + normal(), one_hot / 2 + normal(), one_hot + normal(), one_hot + normal()


def with_duplicates(normal: Callable[..., Tensor]) -> Logits:
    logits = four(lambda: normal(3.0))
    for z in logits:
        z[1::2] = z[0].clone()
    return logits


def partly_the_same(normal: Callable[..., Tensor]) -> Logits:
    """Every second image looks the same in both views."""
    logits = four(lambda: normal(6.0))
    for real, virtual in (logits[:2], logits[2:]):
        virtual[::2] = real[::2]
    return logits


def one_class(normal: Callable[..., Tensor]) -> Logits:
    """Every prediction is certain, and of the same class."""
    certain = torch.zeros_like(normal())
    certain[:, 0] = 18.0
    return four(lambda: certain + normal())


def matched(normal: Callable[..., Tensor]) -> Logits:
    real, virtual = normal(3.0), normal(3.0)
    return real + normal(1e-3), virtual + normal(1e-3), real, virtual


def offset(normal: Callable[..., Tensor]) -> Logits:
    return normal(3.0) + 1e3, normal(3.0) + 1e3, normal(3.0) - 1e3, normal(3.0) + 1e3


CASES: dict[str, Callable[[Callable[..., Tensor]], Logits]] = {
    "views 1e-2 apart": lambda normal: near_views(normal, 1e-2),
    "views 1e-4 apart": lambda normal: near_views(normal, 1e-4),
    "views 1e-6 apart": lambda normal: near_views(normal, 1e-6),
    "same views": lambda normal: near_views(normal, 0.0),
    "at initialisation": at_initialisation,
    "saturated": lambda normal: saturated(normal, 20.0),
    "saturated, doubled": lambda normal: saturated(normal, 40.0),
    "duplicates": with_duplicates,
    "partly the same": partly_the_same,
    "one class": one_class,
    "matched": matched,
    "offset": offset,
}


def gradients(
    loss: Callable[[Logits], Tensor], logits: Sequence[Tensor], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, and gradients for the student's real and virtual logits, of the loss evaluated in ``dtype``."""
    leaves = [z.to(dtype, copy=True).requires_grad_(i < 2) for i, z in enumerate(logits)]
    value = loss((leaves[0], leaves[1], leaves[2], leaves[3]))
    real, virtual = torch.autograd.grad(value, leaves[:2])
    return value.detach().double(), real.double(), virtual.double()


def ours(graph: int, **options: Any) -> Callable[[Logits], Tensor]:
    return lambda logits: vrm_loss(*logits, keep=1.0, **options)[graph]


def theirs(graph: int, temperature: float, *, redundant: bool = False) -> Callable[[Logits], Tensor]:
    def loss(logits: Logits) -> Tensor:
        vertices = explicit.predictions(logits, temperature)
        keep = None
        if graph == 1:
            vertices = explicit.transpose(vertices)
        if redundant:
            vertices, keep = explicit.redundant(vertices, dim=graph)
        return explicit.match(vertices, keep)

    return loss


@contextlib.contextmanager
def products() -> Iterator[None]:
    """Small graphs by products, as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "SMALL_GRAPH", 0)
        yield


@contextlib.contextmanager
def never_looking() -> Iterator[None]:
    """Exact products for every tile, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching.FromProducts, "add_ordinary", lambda *_: None)
        yield


def use_tiles(patch: pytest.MonkeyPatch, num_rows: int) -> None:
    """Divide every graph into tiles of so many rows."""
    for module in (matching, pruning):
        patch.setattr(
            module,
            "row_tiles",
            lambda n, *_, **__: [slice(i, min(i + num_rows, n)) for i in range(0, n, num_rows)],
        )


def scales(exact: Sequence[Tensor], logits: Logits, graph: int, temperature: float) -> list[tuple[float, float]]:
    """What errors of value and of each gradient are measured by, and the share of it that is float64's own rounding.

    The largest magnitude of the tensor; but one that vanishes in exact arithmetic (all edges of two classes are
    parallel, and those of one sample's classes have no direction; a student equals its teacher) has no scale. For the
    gradient that is then what the shortest edge could have, one over its length, of which float64 resolves 1e-13.
    """
    samples = explicit.predictions((*logits[:2], *logits[:2]), temperature)
    real, virtual, *_ = (x.double() for x in (samples if graph == 0 else explicit.transpose(samples)))
    length = torch.linalg.vector_norm(real[None] - virtual[:, None], dim=-1)
    slope = float(length.clamp_min(1e-8).reciprocal().max()) / length.numel()
    found = []
    for tensor, floor in zip(exact, (1e-12, 1e-9 * slope, 1e-9 * slope), strict=True):
        scale = float(tensor.abs().max()) + floor
        found.append((scale, 1e-13 * slope / scale))
    return found


@settings(max_examples=100)
@given(
    case=st.sampled_from(sorted(CASES)),
    shape=st.tuples(st.integers(1, 24), st.integers(2, 24))
    | st.sampled_from([(40, 50), (64, 100), (7, 130), (100, 10), (2, 200), (200, 2), (1, 300)]),
    temperature=st.sampled_from([1.0, 4.0]),
    redundant=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_float32_is_no_worse_than_explicit_edges_and_float64_exact(
    case: str, shape: tuple[int, int], temperature: float, redundant: bool, seed: int
) -> None:
    """With and without looking at lengths (a GPU does not), in one piece and in tiles of which few have short edges."""
    logits = CASES[case](draw(seed, *shape))
    for graph in (0, 1):
        reference = theirs(graph, temperature, redundant=redundant)
        loss = ours(graph, temperature=temperature, prune_redundant=not redundant)
        exact, naive = gradients(reference, logits), gradients(reference, logits, torch.float32)
        in_double, *found = gradients(loss, logits), gradients(loss, logits, torch.float32)
        with products(), pytest.MonkeyPatch.context() as patch:
            use_tiles(patch, 16)
            found.append(gradients(loss, logits, torch.float32))
            with never_looking():
                found.append(gradients(loss, logits, torch.float32))
        for i, (scale, noise) in enumerate(scales(exact, logits, graph, temperature)):
            errors = [float((x[i] - exact[i]).abs().max() / scale) for x in (naive, in_double, *found)]
            assert max(errors[2:]) <= max(2 * errors[0], 16 * EPS_32), (graph, i, errors)
            assert errors[1] <= 1e-9 + noise, (graph, i, errors)


def test_features_of_nearly_identical_views_are_exact_in_float32() -> None:
    """Float32 features carry no rounding of a softmax, so differences of a few last places count."""
    normal = draw(0, 12, 30)
    s, t = normal().abs() + 1, normal().abs() + 1
    features = (s, s + normal(1e-6), t, t + normal(1e-6))
    assert (features[1] - features[0]).abs().max() > 0

    def loss(x: Logits) -> Tensor:
        return vrm_feature_loss(*x, keep=1.0)[0]

    exact = gradients(loss, features)
    with products():
        single = gradients(loss, features, torch.float32)
    for x, y in zip(single, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2 * EPS_32 * float(y.abs().max()))


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 3e38])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extremes_are_finite(value: float, dtype: torch.dtype) -> None:
    if value > torch.finfo(dtype).max:
        value = torch.finfo(dtype).max
    logits = draw(0, 6, 5)().to(dtype).clone()
    logits[1, 2] = value
    logits[3] = value
    student = [logits.clone().requires_grad_(), logits.flip(0).requires_grad_()]
    isv, icv = vrm_loss(*student, logits, logits.flip(0), temperature=1.0)
    for x in (isv, icv, *torch.autograd.grad(isv + icv, student)):
        assert x.isfinite().all()


@pytest.mark.parametrize("kind", ["mask", "all", "none"])
@pytest.mark.parametrize("small", [0, 1 << 16])
def test_edges_to_oneself_do_not_count(kind: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the mask says of them; and whether they have length zero."""
    monkeypatch.setattr(matching, "SMALL_GRAPH", small)
    use_tiles(monkeypatch, 3)
    vertices = [x.softmax(1) for x in plain(4, 7, 5, torch.float32)]
    own = torch.eye(7, dtype=torch.bool)
    mask = {"mask": own | (torch.arange(49).view(7, 7) % 3 == 0), "all": torch.ones(7, 7, dtype=torch.bool)}.get(kind)
    others = ~own if mask is None else mask & ~own
    for a, b, c, d in (vertices, [vertices[0], vertices[0], vertices[2], vertices[2]]):
        found = match_relations(a, b, c, d, keep=mask, without_diagonal=True)
        assert found == match_relations(a, b, c, d, keep=others)
    if mask is not None:
        assert mask.diagonal().all(), "a mask is nobody else's to change"


def test_edges_of_length_zero_count_as_zero_vectors() -> None:
    p = predictions(draw(0, 5, 4)(), temperature=1.0)
    for dtype in (torch.float32, torch.float64):
        c = p.clone().requires_grad_()
        with products():
            loss = match_relations(p[:1], p[:1], c[:1], c[:1], dtype=dtype)
            # the teacher has a direction, the student none: 1/2 |u_T|^2
            half = match_relations(p[:1], p[1:2], p[:1], p[:1], dtype=dtype)
        assert loss == 0
        assert torch.autograd.grad(loss, c)[0].abs().max() == 0
        torch.testing.assert_close(half, half.new_tensor(0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("prune_redundant", [True, False])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_lifted_before_anything_else(
    dtype: torch.dtype, autocast: torch.dtype, *, prune_redundant: bool
) -> None:
    halves = [z.to(dtype) for z in plain(0, 8, 6)]
    singles = [z.float() for z in halves]
    for loss in (vrm_loss, vrm_feature_loss):
        with torch.autocast("cpu", dtype=autocast):
            lifted = loss(*halves, keep=1.0, prune_redundant=prune_redundant)
        for x, y in zip(lifted, loss(*singles, keep=1.0, prune_redundant=prune_redundant), strict=True):
            assert x.dtype == torch.float32
            assert x == y


@pytest.mark.parametrize(
    "options", [{"eps": 0.3}, {"eps": 0.3, "matching": "huber", "delta": 0.2, "prune_redundant": False}]
)
def test_gradcheck_of_edges_below_eps(options: dict[str, Any]) -> None:
    logits = plain(3, 4, 5)
    student = [z.requires_grad_() for z in logits[:2]]
    assert torch.autograd.gradcheck(
        lambda *s: vrm_loss(*s, *logits[2:], temperature=2.0, **({"keep": 1.0, "eps": 0.3} | options)), student
    )
    assert torch.autograd.gradcheck(
        lambda *s: vrm_feature_loss(*s, *logits[2:], logits[:2], **({"keep": 1.0, "eps": 0.3} | options)), student
    )


def test_gradient_is_a_first_derivative() -> None:
    logits = plain(0, 4, 5)
    student = logits[0].requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(vrm_loss(*logits)[0], student, create_graph=True)


def test_huber() -> None:
    logits = plain(1, 6, 5)
    vertices = explicit.predictions(logits, 2.0)
    for delta in (0.05, 0.5):
        expected = explicit.match(vertices, delta=delta)
        actual = vrm_loss(*logits, temperature=2.0, keep=1.0, matching="huber", delta=delta)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    squared = vrm_loss(*logits, keep=1.0)[0]
    torch.testing.assert_close(vrm_loss(*logits, keep=1.0, matching="huber", delta=2.0)[0], squared)


def test_redundant_graph() -> None:
    logits = plain(2, 5, 4)
    samples, mask = explicit.redundant(explicit.predictions(logits, 4.0))
    expected = explicit.match(samples, mask)
    entropy = explicit.mixture_entropy(*samples[:2])
    pruned = mask & (entropy <= entropy[mask].quantile(0.7))
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        inputs = [z.to(dtype) for z in logits]
        isv, _ = vrm_loss(*inputs, keep=1.0, prune_redundant=False)
        torch.testing.assert_close(isv.double(), expected, rtol=rtol, atol=0)
        isv, _ = vrm_loss(*inputs, keep=0.7, prune_redundant=False)
        torch.testing.assert_close(isv.double(), explicit.match(samples, pruned), rtol=rtol, atol=0)


# Pruning


@st.composite
def distributions(draw_from: Any) -> tuple[Tensor, Tensor]:
    seed, num_real, num_virtual = (draw_from(st.integers(1, 9)) for _ in range(3))
    scale = draw_from(st.sampled_from([0.01, 1.0, 30.0]))
    p, q = draw(seed, num_real, 6)(scale), draw(seed + 1, num_virtual, 6)(scale)
    return predictions(p, temperature=1.0), predictions(q, temperature=1.0)


@settings(max_examples=40)
@given(distributions())
def test_joint_entropies(pair: tuple[Tensor, Tensor]) -> None:
    p, q = pair
    mean = (p[None] + q[:, None]) / 2
    entropy_p, entropy_q = (torch.special.entr(x).sum(1) for x in pair)
    expected = {
        "mixture": torch.special.entr(mean).sum(-1),
        "cross": -torch.xlogy(q[:, None], p[None]).sum(-1),
        "independent": entropy_p + entropy_q[:, None],
        "collision": -mean.square().sum(-1).log(),
    }
    for kind, value in expected.items():
        torch.testing.assert_close(joint_entropy(p, q, kind=kind), value, rtol=1e-10, atol=1e-12)
    # What the paper asks of it: their own uncertainty when they agree, more the more they differ.
    for kind in ("mixture", "collision"):
        agree = joint_entropy(p, p, kind=kind).diagonal()
        own = entropy_p if kind == "mixture" else -p.square().sum(1).log()
        torch.testing.assert_close(agree, own, rtol=1e-10, atol=1e-12)
    both = (entropy_p + entropy_q[:, None]) / 2
    assert (joint_entropy(p, q) >= both - 1e-12).all()
    assert (joint_entropy(p, q) <= both + math.log(2) + 1e-12).all()


@settings(max_examples=40)
@given(pair=distributions(), keep=st.floats(0.01, 0.99))
def test_kept_edges_are_those_up_to_the_quantile(pair: tuple[Tensor, Tensor], keep: float) -> None:
    entropy = joint_entropy(*pair)
    mask = prune_edges(*pair, keep=keep)
    assert isinstance(mask, Tensor)
    assert torch.equal(mask, entropy <= entropy.flatten().quantile(keep, interpolation="lower"))
    assert mask.sum() >= math.floor(keep * (entropy.numel() - 1)) + 1
    assert prune_edges(*pair, keep=1) is None


KINDS = ["mixture", "cross", "independent", "collision"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 4), (64, 100), (37, 130)])
@pytest.mark.parametrize("classes", [False, True])
def test_ties_stay_together(kind: Any, dtype: torch.dtype, shape: tuple[int, int], classes: bool) -> None:
    """Those of a student whose classifier starts at zero: of even predictions, whose sums are rounded."""
    p = predictions(torch.zeros(shape), temperature=1.0)
    if classes:
        p = class_distributions(p)
    mask = prune_edges(p, p, keep=0.2, kind=kind, dtype=dtype)
    assert isinstance(mask, Tensor)
    assert mask.all()


def test_a_class_that_no_one_predicts_is_pruned_by_the_formula() -> None:
    """Its predictions have vanished, and its distribution sums to 0."""
    p, q = (predictions(z, temperature=1.0) for z in plain(0, 6, 5)[:2])
    p[:, 2] = 0
    p, q = class_distributions(p), class_distributions(q)
    collision = -((p[None] + q[:, None]) / 2).square().sum(-1).log()
    torch.testing.assert_close(joint_entropy(p, q, kind="collision"), collision, rtol=1e-12, atol=1e-12)
    single = pruning.EntropyScores(p, q, "collision", torch.float32)
    torch.testing.assert_close(single.entropy(single[:]), collision.float(), rtol=1e-5, atol=1e-6)


def repeated(seed: int, scale: float, classes: bool, num_vertices: int, length: int) -> tuple[Tensor, Tensor]:
    """Vertices of both views, each one of three, over and over: samples, or classes."""
    found = []
    for normal in (draw(seed, 3, length), draw(seed + 1, 3, length)):
        logits = normal(scale)[torch.arange(num_vertices) % 3]
        p = predictions(logits.T.contiguous() if classes else logits, temperature=1.0)
        found.append(class_distributions(p) if classes else p)
    return found[0], found[1]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    classes=st.booleans(),
    shape=st.sampled_from([(5, 3), (33, 20), (64, 100), (100, 64), (131, 7)]),
    keep=st.floats(0.05, 0.95),
    tile=st.sampled_from([1, 3, 7, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_edges_of_duplicates_stay_or_go_together(
    seed: int,
    kind: Any,
    scale: float,
    classes: bool,
    shape: tuple[int, int],
    keep: float,
    tile: int,
    dtype: torch.dtype,
) -> None:
    p, q = repeated(seed, scale, classes, *shape)
    with pytest.MonkeyPatch.context() as patch:
        use_tiles(patch, tile)
        mask = prune_edges(p, q, keep=keep, kind=kind, dtype=dtype)
    assert isinstance(mask, Tensor)
    groups = [mask[m::3, n::3] for m in range(3) for n in range(3)]
    assert all(group.all() or not group.any() for group in groups)
    if dtype == torch.float64 and scale == 1.0:  # where entropies differ by more than their rounding, no more stay
        distinct = torch.stack([joint_entropy(p[:3], q[:3], kind=kind)[m, n] for m in range(3) for n in range(3)])
        sizes = torch.tensor([group.numel() for group in groups])
        order = distinct.argsort()
        needed = int((sizes[order].cumsum(0) < math.floor(keep * (mask.numel() - 1)) + 1).sum()) + 1
        assert sum(bool(group.any()) for group in groups) == needed


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(KINDS),
    gap=st.sampled_from([1e-12, 1e-9, 1e-3]),
    keep=st.floats(0.01, 0.99),
)
def test_edges_that_differ_do_not_stay_with_the_last(seed: int, kind: Any, gap: float, keep: float) -> None:
    """Entropies a little apart, by more than they are rounded: exactly as many stay as the quantile says."""
    normal = draw(seed, 6)
    z, q = normal().double(), torch.softmax(normal().double(), 0)[None]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    p = torch.softmax(z * (1 + gap * order.double()[:, None]), 1)
    entropy = joint_entropy(p, q, kind=kind)
    assume(entropy.flatten().sort().values.diff().min() > gap * 1e-2)
    mask = prune_edges(p, q, keep=keep, kind=kind)
    assert isinstance(mask, Tensor)
    assert mask.sum() == math.floor(keep * 39) + 1
    if gap == 1e-3:
        assert torch.equal(mask, entropy <= entropy.flatten().quantile(keep))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_processes", [2, 3, 7])
def test_what_counts_as_rounding_is_the_same_for_every_process(
    kind: Any, dtype: torch.dtype, num_processes: int
) -> None:
    """Of processes without rows, too; and of very different rows."""
    logits = plain(0, 5, 9)
    logits[1][0] *= 1e-4
    p, q = (predictions(z, temperature=1.0) for z in logits[:2])
    number = torch.tensor(-0.3, dtype=dtype)
    whole = pruning.EntropyScores(p, q, kind, dtype)
    parts = [
        pruning.EntropyScores(p, q, kind, dtype, slice(5 * i // num_processes, 5 * (i + 1) // num_processes))
        for i in range(num_processes)
    ]
    assert {float(part.rounding(number)) for part in parts} == {float(whole.rounding(number))}
    torch.testing.assert_close(torch.cat([part[:] for part in parts]), whole[:])


@pytest.mark.parametrize("kind", ["mixture", "cross", "independent", "collision"])
def test_float32_entropies_of_a_new_student_still_tell_edges_apart(kind: Any) -> None:
    """Its predictions are all but uniform: float32 entropies as they are written all round to the same."""
    p, q = (predictions(1e-3 * z, temperature=4.0) for z in plain(0, 40, 30)[:2])
    exact, single = (prune_edges(p, q, keep=0.7, kind=kind, dtype=x) for x in (torch.float64, torch.float32))
    assert isinstance(exact, Tensor)
    assert isinstance(single, Tensor)
    assert (exact != single).sum() <= 4
    mean = ((p[None] + q[:, None]) / 2).float()
    naive = torch.special.entr(mean).sum(-1)
    assert ((naive <= naive.flatten().quantile(0.7)) != prune_edges(p, q, keep=0.7)).sum() > 100


@pytest.mark.parametrize("kind", ["collision", "cross", "independent"])
@pytest.mark.parametrize("without_diagonal", [False, True])
def test_a_graph_too_large_to_store_is_pruned_alike(
    kind: Any, without_diagonal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q = (predictions(z, temperature=1.0) for z in plain(0, 40, 7)[:2])
    if without_diagonal:
        q = p
    vertices = [predictions(z, temperature=1.0) for z in plain(1, 40, 7)]

    def evaluate() -> tuple[Any, Tensor, Tensor]:
        keep = prune_edges(p, q, keep=0.8, kind=kind, without_diagonal=without_diagonal)
        student = vertices[2].clone().requires_grad_()
        virtual = student if without_diagonal else vertices[3]
        teacher = (vertices[0], vertices[0] if without_diagonal else vertices[1])
        loss = match_relations(*teacher, student, virtual, keep=keep, without_diagonal=without_diagonal)
        return keep, loss, torch.autograd.grad(loss, student)[0]

    stored, loss, gradient = evaluate()
    monkeypatch.setattr(pruning, "MAX_STORED_EDGES", 100)
    tiled, tiled_loss, tiled_gradient = evaluate()
    assert isinstance(tiled, EntropyThreshold)
    assert torch.equal(tiled[slice(0, 40)], stored)
    torch.testing.assert_close(tiled_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(tiled_gradient, gradient, rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match="use joint_entropy='collision'"):
        prune_edges(p, q, keep=0.8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    vertices = [predictions(z, temperature=2.0) for z in plain(4, 9, 5)]

    def evaluate() -> tuple[Tensor, Tensor]:
        student = vertices[2].clone().requires_grad_(), vertices[3].clone().requires_grad_()
        keep = prune_edges(vertices[2], vertices[3], keep=0.7)
        loss = match_relations(*vertices[:2], *student, keep=keep, dtype=dtype)
        return loss, torch.stack(torch.autograd.grad(loss, student))

    monkeypatch.setattr(matching, "SMALL_GRAPH", 0)
    whole = evaluate()
    use_tiles(monkeypatch, 2)
    for x, y in zip(evaluate(), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    share=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])),
    distinct=st.sampled_from([1e-3, 1, 3, 1 << 20]),
    many=st.sampled_from([100, 2000]),
)
def test_selection_is_exact(seed: int, dtype: torch.dtype, share: float, distinct: float, many: int) -> None:
    values = (draw(seed, 1000)(distinct).round() / 7).to(dtype)
    values[::97] = math.inf
    k = 1 + int(share * 999)
    expected = values.sort().values[k - 1]
    assert kth_smallest.kth_smallest_of_tiles(lambda: values.split(300), k, values, None) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kth_smallest, "FEW_VALUES", 0)
        patch.setattr(kth_smallest, "MANY_VALUES", many)
        patch.setattr(kth_smallest, "SAMPLE_STRIDE", 7)
        for order in (values, values.sort().values, values.sort(descending=True).values):
            assert kth_smallest.kth_smallest(order, k) == expected
            assert kth_smallest.search_near_sample(order, k) in (None, expected)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e3, 1e9])
def test_features_of_another_size_lose_no_accuracy(scale: float) -> None:
    """One product serves both networks' vertices: the larger ones' rounding must not be the smaller ones' loss."""
    normal = draw(13, 40, 30)
    a, b, c, d = (normal() for _ in range(4))
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [(scale * x).requires_grad_() for x in (c, d)]
        with products():
            loss = match_relations(a, b, *leaves, eps=1e-30, dtype=dtype)
        found.append((loss.detach().double(), *torch.autograd.grad(loss, leaves)))
    for exact, x in zip(*found, strict=True):
        tolerance = EPS_32 if x.dim() == 0 else 1e-14  # only the value is rounded to float32
        assert float((x - exact).abs().max()) <= tolerance * float(exact.abs().max())


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("scale", [1e3, 1e7, 1e15])
def test_features_of_many_sizes_lose_no_accuracy(scale: float, *, look: bool) -> None:
    """Where lengths of the student's and the teacher's vertices do not go together, nothing may be added up."""
    normal = draw(14, 40, 30)
    sizes = 10 ** (math.log10(scale) * (2 * torch.rand(4, 40, 1, generator=torch.Generator().manual_seed(0)) - 1))
    rows = [size * normal().double() for size in sizes]
    outliers = [normal().double() for _ in range(4)]
    outliers[1][-1] *= scale  # the student's, in the virtual view
    outliers[2][-1] *= scale  # the teacher's, in the real one

    def loss(x: Logits) -> Tensor:
        return vrm_feature_loss(*x, keep=1.0)[0]

    for features in (rows, outliers):
        exact, naive = gradients(loss, features), gradients(loss, features, torch.float32)
        with products(), contextlib.nullcontext() if look else never_looking():
            found = gradients(loss, features, torch.float32)
        for x, y, z in zip(found, exact, naive, strict=True):
            bound = max(2 * float((z - y).abs().max()), 16 * EPS_32 * float(y.abs().max()))
            assert float((x - y).abs().max()) <= bound


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize(("size", "eps"), [(1.0, 1e-30), (1.0, 1e-150), (1e8, 1e-8)])
def test_students_of_no_length_count_however_small_eps_is(size: float, eps: float, *, look: bool) -> None:
    """Half the square of the teacher's relation: what rounding hides of a short edge is far above ``eps``."""
    normal = draw(15, 12, 10)
    student, teacher_real, teacher_virtual = (size * normal() for _ in range(3))
    vertices = teacher_real, teacher_virtual, student, student
    expected = match_relations(*(x.double() for x in vertices), eps=eps)
    with products(), contextlib.nullcontext() if look else never_looking():
        found = match_relations(*vertices, eps=eps)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


# What the loss does not depend on


def test_invariances() -> None:
    logits = plain(5, 7, 6)
    before = vrm_loss(*logits)
    samples, classes = torch.randperm(7), torch.randperm(6)
    for other in (
        [z[samples] for z in logits],
        [z[:, classes] for z in logits],
        [z + torch.arange(7.0, dtype=z.dtype)[:, None] for z in logits],
        [logits[1], logits[0], logits[3], logits[2]],  # the views change places: every edge turns round
    ):
        for x, y in zip(vrm_loss(*other), before, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prune_redundant", [True, False])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(
    dtype: torch.dtype, prune_redundant: bool
) -> None:
    _, _, *logits = plain(5, 40, 30, dtype)
    for virtual in (logits[1], logits[0] + 1e-4, logits[0]):
        logits[1] = virtual
        for graph in (0, 1):
            found = gradients(ours(graph, prune_redundant=prune_redundant), (*logits, *logits), dtype)
            assert all(not x.any() for x in found)


def test_relations_that_are_alike_do_not_hide_the_loss_of_edges_below_eps() -> None:
    """Both networks are certain of the same classes: the loss, of 1e-16, is that of the edges within a class."""
    normal = draw(0, 33, 47)
    certain = 40 * (normal().argsort(1) == 0).float()
    real_s, virtual_s, real_t, virtual_t = (certain + normal() for _ in range(4))
    logits = real_s, virtual_s, real_t, virtual_t
    exact = gradients(theirs(1, 1.0, redundant=True), logits)
    assert 0 < exact[0] < 1e-12
    single = gradients(ours(1, temperature=1.0, prune_redundant=False), logits, torch.float32)
    for x, y in zip(single, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=16 * EPS_32 * float(y.abs().max()))


@pytest.mark.parametrize(("small", "kind"), [(0, "mixture"), (1 << 16, "collision")])
def test_compiles_to_one_graph(small: int, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SMALL_GRAPH", small)
    dtype = torch.float32
    logits = plain(6, 6, 5, dtype)

    def loss(x: Logits) -> Tensor:
        isv, icv = vrm_loss(*x, joint_entropy=kind)
        return isv + icv

    eager = gradients(loss, logits, dtype)
    compiled = gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), logits, dtype)
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9)


# Across processes


def work(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, options in DISTRIBUTED.items():
        values, logits = [], plain(7, 6, 5)
        for dtype in (torch.float64, torch.float32):
            local = [z[3 * rank : 3 * rank + 3].to(dtype).requires_grad_() for z in logits]
            isv, icv = vrm_loss(*local, group=dist.group.WORLD, **options)
            values.append([isv, icv, *torch.autograd.grad(isv + 2 * icv, local[:2])])
        torch.save(values, f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


DISTRIBUTED: dict[str, dict[str, Any]] = {
    "plain": {"keep": 1.0},
    "mixture": {"keep": 0.7},
    "collision": {"keep": 0.7, "joint_entropy": "collision"},
    "redundant": {"keep": 0.7, "prune_redundant": False},
}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    for name, options in DISTRIBUTED.items():
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for i, (dtype, tolerance) in enumerate(((torch.float64, 1e-12), (torch.float32, 1e-5))):
            logits = [z.to(dtype).requires_grad_() for z in plain(7, 6, 5)]
            isv, icv = vrm_loss(*logits, **options)
            gradient = torch.autograd.grad(isv + 2 * icv, logits[:2])
            for j, whole in enumerate((isv, icv)):
                mean = (ranks[0][i][j] + ranks[1][i][j]) / 2
                torch.testing.assert_close(mean, whole, rtol=tolerance, atol=tolerance)
            for j, whole in enumerate(gradient):
                # DistributedDataParallel takes the mean, over two processes, of gradients of their own samples
                parts = torch.cat([ranks[0][i][2 + j], ranks[1][i][2 + j]]) / 2
                torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)


# What is refused


@pytest.mark.parametrize(
    ("real", "virtual", "message"),
    [
        (torch.ones(6, 5), torch.ones(6, 4), r"same number of coordinates; got vertices of \(6, 5\) and \(6, 4\)"),
        (torch.ones(6), torch.ones(6), r"floating-point matrix, one row each; got \(6,\)"),
        (torch.ones(3, 4, 5), torch.ones(3, 4, 5), r"floating-point matrix, one row each; got \(3, 4, 5\)"),
        (torch.ones(6, 5).long(), torch.ones(6, 5).long(), r"one row each; got \(6, 5\) of torch.int64"),
        (torch.ones(0, 5), torch.ones(0, 5), "has no edges"),
        (torch.ones(6, 0), torch.ones(6, 0), "edges without coordinates"),
    ],
)
def test_vertices_that_make_no_graph(real: Tensor, virtual: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_relations(real, virtual, real, virtual)
    with pytest.raises(ValueError, match=message):
        prune_edges(real, virtual, keep=0.9)
    with pytest.raises(ValueError, match=message):
        joint_entropy(real, virtual)


LOGITS = plain(0, 4, 3)
ALONE, FOUR = torch.ones(1, 5), torch.ones(4, 5)
OF_LOGITS = r"student_logits must be \(real, virtual\), each \(4, classes\)"
OF_MASKS = r"bool mask of the graph's rows, \(4, 1\)"


@pytest.mark.parametrize(
    ("function", "given", "options", "message"),
    [
        *(
            (vrm_loss, LOGITS, {"temperature": t}, f"above 0 and finite; got {t}")
            for t in (0.0, -1.0, math.nan, math.inf)
        ),
        (vrm_feature_loss, (*LOGITS, LOGITS[:2]), {"temperature": 0.0}, "temperature must be above 0"),
        (
            vrm_loss,
            [z.long() for z in LOGITS],
            {},
            r"logits must be a floating-point matrix.*\(8, 3\)",
        ),
        (vrm_loss, (*LOGITS[:3], LOGITS[3][:3]), {}, r"need the same shape.*\(3, 3\)"),
        (vrm_feature_loss, (*LOGITS, (LOGITS[0], LOGITS[1][:3])), {}, OF_LOGITS),
        (vrm_feature_loss, (*LOGITS, (LOGITS[0][:3], LOGITS[1][:3])), {}, OF_LOGITS),
        (vrm_feature_loss, (*LOGITS, LOGITS[0]), {}, OF_LOGITS),
        (vrm_feature_loss, (*LOGITS, LOGITS[:1]), {}, OF_LOGITS),
        (match_relations, (ALONE, FOUR, ALONE, FOUR), {"keep": torch.ones(1, 4, dtype=torch.bool)}, OF_MASKS),
        (match_relations, (ALONE, FOUR, ALONE, FOUR), {"keep": torch.ones(4, 1)}, OF_MASKS),
        (match_relations, (ALONE, FOUR, ALONE, FOUR), {"keep": [[True]] * 4}, OF_MASKS),
        (match_relations, (ALONE, FOUR, ALONE, FOUR), {"without_diagonal": True}, "without its diagonal"),
        (match_relations, (ALONE,) * 4, {"without_diagonal": True}, "has no edges"),
        (prune_edges, (ALONE, FOUR), {"keep": 0.9, "without_diagonal": True}, "without its diagonal"),
        (prune_edges, (ALONE, ALONE), {"keep": 0.9, "without_diagonal": True}, "has no edges"),
        *((prune_edges, (FOUR, FOUR), {"keep": k}, "keep, the share of edges") for k in (0.0, -0.1, 1.1, math.nan)),
    ],
)
def test_what_is_refused(function: Callable[..., Any], given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*given, **options)


# What has no edges


@pytest.mark.parametrize("small", [0, 1 << 16])
def test_the_mean_of_no_edges_is_zero(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SMALL_GRAPH", small)
    vertices = [z.softmax(1) for z in plain(0, 6, 5, torch.float32)]
    student = vertices[0].clone().requires_grad_()
    loss = match_relations(*vertices[2:], student, vertices[1], keep=torch.zeros(6, 6, dtype=torch.bool))
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("small", [0, 1 << 16])
def test_a_process_without_rows_of_its_own(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten classes on sixteen processes."""
    monkeypatch.setattr(matching, "SMALL_GRAPH", small)
    monkeypatch.setattr(matching, "own_rows", lambda *_: slice(6, 6))
    a, b, c, d = (z.softmax(1) for z in plain(0, 6, 5, torch.float32))
    student = c.clone().requires_grad_()
    for mask in (torch.zeros(0, 6, dtype=torch.bool), None):
        loss = match_relations(a, b, student, d, keep=mask)
        assert loss == 0
        assert not torch.autograd.grad(loss, student)[0].any()


def test_class_vertices_are_distributions_over_the_batch() -> None:
    p = predictions(draw(0, 5, 4)(), temperature=1.0)
    torch.testing.assert_close(class_distributions(p).sum(1), torch.ones(4, dtype=torch.float64))
    absent = class_distributions(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    assert absent.tolist() == [[1.0], [0.0]]


# The page


def test_the_page_shows_the_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    monkeypatch.syspath_prepend(str(docs))
    page = SimpleNamespace(**runpy.run_path(str(docs / "relations.py")))
    text = page.PAGE.read_text(encoding="utf-8")

    def filled(folder: Path) -> str:
        return page.filled(text, folder, page.TABLES, page.PAGE.name)

    assert filled(page.RESULTS) == text, "run python docs/relations.py"
    assert filled(tmp_path).count("Not measured yet: `python benchmarks/relations.py`") == len(page.TABLES)
