"""USKD: its case, and what the contract suite does not test."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vrm.contract import NO_TEACHER, NO_TEACHER_PROBE, Batch, DataInfo, Method, Outputs, Probe, Progress, Views
from vrm.methods import uskd

from ..harness import Case, Golden, Outcome
from ..objective import Objective, maps


def reproduce(golden: Golden) -> Outcome:
    """USKD: the loss of hard or soft labels, through the weak classifier."""
    target = golden["target"] if "in.target" in golden.tensors else golden["target_prob"]
    features = golden["feat_mid_student"]
    weak = torch.nn.Linear(features.shape[1], golden["logits_student"].shape[1])
    golden.load(weak, {f"weak_fc.{name}": name for name in ("weight", "bias")})
    weights = {name: golden.hyperparameters[name] for name in ("alpha", "beta", "mu")}
    return {"out.loss": uskd.uskd_loss(golden["logits_student"], weak(features), target, **weights)}


TARGET = torch.tensor([0, 2, 1])
SOFT = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0, 1.0, 0, 0], [0.1, 0.5, 0, 0.4, 0]], dtype=torch.float64)
CASE = Case(
    "uskd",
    golden=reproduce,
    variants=({}, {"alpha": 0.0, "rank_by": "probability", "tap": "pooled"}),
    alternatives={
        "rank_by": ({}, {"rank_by": "probability"}),
        "tap": ({"tap": "stage1"}, {"tap": "last"}),
    },
    legal=({"beta": 0.0}, {"rank_by": "probability"}),
    illegal=({"rank_by": "logit"},),
    invariances=("sample_order", "logit_shift"),
    constants=("soft_target",),
    functions=(
        lambda s, t: uskd.target_loss(s.flatten(1), TARGET),
        lambda s, t: uskd.nontarget_loss(s.flatten(1), t.flatten(1), TARGET),
        lambda s, t: uskd.weak_loss(s.flatten(1), TARGET),
    ),
)


def by_hand(s_BC: Tensor, w_BC: Tensor, target: Tensor, *, rank_by: str = "log_probability") -> dict[str, Tensor]:
    """Sample by sample and class by class, as the specification writes it."""
    num_samples, num_classes = s_BC.shape
    hard = target.ndim == 1
    value_BC = F.one_hot(target, num_classes).to(s_BC.dtype) if hard else target
    chosen = [sorted(range(num_classes), key=lambda c: -value_BC[b, c])[: 1 if hard else 2] for b in range(num_samples)]
    p_BC, w_BC = s_BC.softmax(1), w_BC.softmax(1)
    terms: dict[str, list[Tensor]] = {"target": [], "nontarget": [], "weak": []}
    for b, classes in enumerate(chosen):
        loss = torch.zeros((), dtype=s_BC.dtype)
        for k, c in enumerate(classes):
            mean = torch.stack([p_BC[i, chosen[i][k]] ** 2 for i in range(num_samples)]).mean()
            if value_BC[b, c] != 0:
                loss = loss - (p_BC[b, c] ** 2 + value_BC[b, c] - mean).detach() * p_BC[b, c].log()
        terms["target"].append(loss)
        of_student = p_BC[b].log() if rank_by == "log_probability" else p_BC[b]
        score = sum(x / (1 - x[classes].sum() + 1e-6) for x in (w_BC[b], of_student))
        ranked = sorted(range(num_classes), key=lambda c: -score[c])
        others = [c for c in range(num_classes) if c not in classes]
        zipf = torch.tensor([1 / (1 + ranked.index(c)) for c in others], dtype=s_BC.dtype)
        terms["nontarget"].append(-(zipf / zipf.sum() * s_BC[b, others].log_softmax(0)).sum())
        terms["weak"].append(-((0.9 * value_BC[b] + 0.1 / num_classes) * w_BC[b].log()).sum())
    return {name: torch.stack(losses).mean() for name, losses in terms.items()}


@pytest.mark.parametrize("rank_by", ["log_probability", "probability"])
@pytest.mark.parametrize("target", [TARGET, SOFT], ids=["hard", "soft"])
def test_uskd_by_hand(target: Tensor, rank_by: uskd.RankBy) -> None:
    """Value and gradient of each term, and their sum."""
    s, w = (x.requires_grad_() for x in maps((3, 5), (3, 5)))
    expected = by_hand(s, w, target, rank_by=rank_by)
    actual = {
        "target": uskd.target_loss(s, target),
        "nontarget": uskd.nontarget_loss(s, w, target, rank_by=rank_by),
        "weak": uskd.weak_loss(w, target),
    }
    for name, term in actual.items():
        assert term.item() == pytest.approx(expected[name].item(), rel=1e-12), name
        (of_term, of_expected) = (torch.autograd.grad(x, w if name == "weak" else s)[0] for x in (term, expected[name]))
        torch.testing.assert_close(of_term, of_expected, rtol=1e-10, atol=1e-12)
    weights = {"alpha": 0.7, "beta": 3.0, "mu": 0.2}
    total = uskd.uskd_loss(s, w, target, rank_by=rank_by, **weights).item()
    assert total == pytest.approx(
        sum(weight * expected[name].item() for weight, name in zip(weights.values(), expected, strict=True)), rel=1e-12
    )


def test_uskd_ranks_of_code_and_paper() -> None:
    """The first class is the target and the first in rank. Scores of the others, of probabilities and of logarithms:

    0.67, 0.58, 0.75 and -0.65, -0.90, -0.73.
    """
    p, w = torch.tensor([[0.5, 0.25, 0.125, 0.125]]), torch.tensor([[0.4, 0.1, 0.2, 0.3]])
    for rank_by, ranks in (("probability", [3, 4, 2]), ("log_probability", [2, 4, 3])):
        (labels,) = uskd.zipf_labels(p.log(), w.log(), torch.tensor([[0]]), rank_by=rank_by).tolist()
        assert labels == pytest.approx([0, *(1 / rank / (1 / 2 + 1 / 3 + 1 / 4) for rank in ranks)])


def test_uskd_of_equal_scores_ranks_in_the_order_of_classes() -> None:
    """Of 300 classes, which an unstable sort would not leave in their order."""
    logits = torch.zeros(1, 300)
    (labels,) = uskd.zipf_labels(logits, logits, torch.tensor([[1]])).tolist()
    expected = [0 if c == 1 else 1 / (c + 1) for c in range(300)]
    assert labels == pytest.approx([x / sum(expected) for x in expected])


def test_uskd_ranks_beside_a_certain_target() -> None:
    """Nothing is left for the other classes, or so little that the 1e-6 in the denominator counts.

    Scores of the second case are -0.16 and -0.51; they would be -0.88 and -0.69 with 1e-3.
    """
    for w, p, ranks in (
        ([1.0, 0.0, 0.0, 0.0], [0.5, 0.1, 0.15, 0.25], [4, 3, 2]),
        ([0.9999, 8e-5, 2e-5], [0.5, 0.2, 0.3], [2, 3]),
    ):
        (labels,) = uskd.zipf_labels(torch.tensor([p]).log(), torch.tensor([w]).log(), torch.tensor([[0]])).tolist()
        assert labels == pytest.approx([0, *(1 / rank / sum(1 / rank for rank in ranks) for rank in ranks)])


def test_uskd_labels_of_the_target_are_constants_of_mean_value() -> None:
    """Their mean over the batch is that of the values; a sample alone has its value; no value has no label."""
    s, _ = maps((3, 5), (3, 5))
    labels = uskd.soft_target(s.requires_grad_(), *uskd.target_classes(TARGET))
    assert not labels.requires_grad
    assert labels.std() > 0.01
    assert labels.mean().item() == pytest.approx(1, rel=1e-12)
    assert uskd.soft_target(s[:1], *uskd.target_classes(TARGET[:1])).item() == 1
    assert (uskd.soft_target(s, *uskd.target_classes(SOFT)) == 0).tolist() == [
        [False, False],
        [False, True],
        [False] * 2,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uskd_of_two_classes_has_no_others(dtype: torch.dtype) -> None:
    """One class, or none of soft labels, is left: value and gradient are 0, for logits of any size."""
    soft = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.5, 0.5]])
    for target in (torch.tensor([0, 1, 1]), soft):
        for scale in (1.0, 1e4):
            s, w = maps((3, 2), (3, 2), dtype=dtype)
            s = (scale * s).requires_grad_()
            loss = uskd.nontarget_loss(s, scale * w, target)
            (grad,) = torch.autograd.grad(loss, s)
            assert loss.item() == 0
            assert not grad.any()


def of_pooled(features: Mapping[str, Tensor]) -> Tensor:
    """The default tap of three stages, averaged over positions."""
    return features["stage2"].mean((2, 3))


@pytest.mark.parametrize("rank_by", ["log_probability", "probability"])
def test_uskd_objective(rank_by: str) -> None:
    options = {"alpha": 0.7, "beta": 3.0, "mu": 0.2}

    def expected(method: Method, s: Outputs, t: Outputs, target: Tensor) -> Tensor:
        terms = by_hand(s.logits, method.get_submodule("weak")(of_pooled(s.taps)), target, rank_by=rank_by)
        distillation = sum(weight * terms[name] for weight, name in zip(options.values(), terms, strict=True))
        return 0.5 * F.cross_entropy(s.logits, target) + distillation

    Objective(CASE, {"ce_weight": 0.5, "rank_by": rank_by, **options}).check(expected)


def probe(**shapes: tuple[int, ...]) -> Probe:
    """A network of these taps."""
    return Probe("network", (16, 16), 3, {**shapes, "pooled": (7,), "logits": (3,)})


def built(student: Probe, tap: str = "stages") -> uskd.USKD:
    """The method on a student of three classes."""
    method = uskd.USKD(tap=tap)
    method.build(student, NO_TEACHER_PROBE, DataInfo(4, 3, 4, torch.arange(4) % 3))
    return method


def test_uskd_reads_the_last_stage_but_one() -> None:
    student = probe(stage1=(4, 8, 8), stage2=(5, 4, 4), stage3=(6, 2, 2))
    for tap, chosen, width in (
        ("stages", "stage2", 5), ("stage1", "stage1", 4), ("last", "stage3", 6), ("pooled", "pooled", 7)
    ):  # fmt: skip
        method = built(student, tap)
        assert method.needs.student_taps == (chosen,)
        assert method.weak.weight.shape == (3, width)
    assert built(probe(stage1=(4, 8, 8), stage2=(6, 2, 2))).tap == "stage1"


def test_uskd_averages_tokens_without_those_before_the_grid() -> None:
    method = built(probe(stage1=(10, 4), stage2=(10, 4)))
    tokens, target = torch.randn(2, 10, 4), torch.tensor([0, 2])
    outputs = Outputs(torch.zeros(2, 3), None, {"stage1": tokens})
    at = Progress(torch.tensor(1), torch.tensor(0), 1, 1)
    losses = method(Views(outputs), NO_TEACHER, Batch(target, target), at)
    expected = uskd.weak_loss(method.weak(tokens[:, 1:].mean(1)), target)
    assert losses["weak"].value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_uskd_refuses_a_student_without_a_middle() -> None:
    with pytest.raises(ValueError, match="has a single one; set tap"):
        built(probe(stage1=(4, 8, 8)))
    with pytest.raises(ValueError, match="has no tap 'stage4'"):
        built(probe(stage1=(4, 8, 8)), "stage4")


def test_uskd_says_which_option_acts_on_nothing() -> None:
    assert uskd.USKD().unused_options() == {}
    assert uskd.USKD(beta=0.0).unused_options().keys() == {"rank_by"}
