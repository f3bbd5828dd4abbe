"""CRD: its case, and what the contract suite does not test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vrm import randomness
from vrm.contract import Batch, DataInfo, Outputs, Probe, Progress, Views
from vrm.methods._page import needs_in_words, page
from vrm.methods.crd import CRD, ROUNDS, contrast_loss, contrast_scores, log_normaliser, shuffled, updated_rows

from ..harness import Case, Golden, Outcome


def reproduce(golden: Golden) -> Outcome:
    """CRD: several steps by its pure functions, with the file's negatives; memories and normalisers as they evolve."""
    settings = golden.hyperparameters
    num_data, embed, outcome, total, log_z = settings["num_data"], {}, {}, [], None
    for network in ("student", "teacher"):
        embed[network] = torch.nn.Linear(settings[f"{network}_dim"], settings["embed_dim"])
        golden.load(embed[network], {f"embed_{network}.{name}": name for name in ("weight", "bias")})
    memory = {network: golden.tensors[f"state.memory_{network}"] for network in embed}
    for step in range(settings["steps"]):
        index, contrast = golden[f"step{step}.index"], golden[f"step{step}.contrast_index"]
        value = {n: F.normalize(embed[n](golden[f"step{step}.feat_{n}"].flatten(1)), dim=1) for n in embed}
        scores = {
            network: contrast_scores(value[network], memory[other], contrast, temperature=settings["temperature"])
            for network, other in (("student", "teacher"), ("teacher", "student"))
        }
        log_z = log_z or {n: log_normaliser(scores[n], num_data=num_data) for n in embed}
        losses = {n: contrast_loss(scores[n], log_z[n], num_data=num_data, eps=settings["eps"]) for n in embed}
        total.append(losses["student"] + losses["teacher"])
        outcome[f"out.step{step}.loss"] = total[-1]
        for n in embed:
            rows = updated_rows(memory[n], index, value[n].detach(), momentum=settings["momentum"])
            memory[n] = memory[n].index_copy(0, index, rows)
            outcome[f"out.step{step}.loss_{n}_anchor"] = losses[n]
            outcome[f"out.step{step}.score_{n}"] = (scores[n] - log_z[n]).exp()
            outcome[f"out.z_{n}"] = log_z[n].exp()
            outcome[f"after.step{step}.memory_{n}"] = memory[n]
    return {**outcome, "out.loss": torch.stack(total).sum()}


CASE = Case(
    "crd",
    golden=reproduce,
    small={"embed_dim": 4, "num_negatives": 12},
    variants=({}, {"num_negatives": 2}, {"num_negatives": 40}, {"positive": "relax"}),
    alternatives={"positive": ({}, {"positive": "relax"})},
    legal=({"embed_dim": 1}, {"num_negatives": 1}, {"temperature": 0.01}, {"momentum": 0.0}),
    illegal=(
        {"embed_dim": 0},
        {"num_negatives": 0},
        {"temperature": 0.0},
        {"momentum": -0.1},
        {"momentum": 1.0},
        {"positive": "any"},
    ),
    invariances=("sample_order", "logit_shift"),
)


TARGETS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 1, 0, 2, 2])  # classes of 3, 3 and 6 samples
STEPS = 400


def make(targets: torch.Tensor = TARGETS, **options: object) -> CRD:
    probe = Probe("network", (8, 8), 3, {"pooled": (5,), "logits": (3,)})
    method = CRD(**{"embed_dim": 4, "num_negatives": 5, **options})
    torch.manual_seed(0)
    method.build(probe, probe, DataInfo(len(targets), 3, 4, targets))
    return method


def at(step: int, view: int = 0) -> Progress:
    return Progress(torch.tensor(1), torch.tensor(step), 1, STEPS, seed=7, view=view)


def outputs(size: int, seed: int) -> Views:
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(size, 5, generator=generator)
    return Views(Outputs(torch.randn(size, 3, generator=generator), pooled, {"pooled": pooled}))


def drawn(method: CRD) -> tuple[torch.Tensor, torch.Tensor]:
    """Positives (steps, N) and negatives (steps, N, K) of all samples, in an order that is not the samples'."""
    index = torch.randperm(len(TARGETS), generator=torch.Generator().manual_seed(0))
    rows = torch.stack([method.draw(Batch(index, TARGETS[index]), at(step)) for step in range(STEPS)])
    rows = rows[:, index.argsort()]
    return rows[:, :, 0], rows[:, :, 1:]


def excess(*tables: torch.Tensor) -> float:
    """Chi-square of tables of counts, each of which should be flat, in standard deviations above its mean."""
    freedom = sum(len(counts) - 1 for counts in tables)
    mean = [counts.double().mean() for counts in tables]
    square = sum(float(((counts - m) ** 2 / m).sum()) for counts, m in zip(tables, mean, strict=True))
    return (square - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("options", [{}, {"replacement": True}, {"num_negatives": 8}], ids=["without", "with", "many"])
def test_negatives_are_uniform_over_other_classes(options: dict[str, object]) -> None:
    """No own class; no sample twice unless with replacement; every sample of the pool as often as any other."""
    positives, negatives = drawn(make(**options))
    assert (positives == torch.arange(len(TARGETS))).all()
    assert not (TARGETS[negatives] == TARGETS[:, None]).any()
    repeats = (negatives.sort(2).values.diff(dim=2) == 0).any()
    assert repeats == bool(options)  # "many": more than the pool of 6 holds
    pools = [(target != TARGETS).nonzero()[:, 0] for target in TARGETS]
    for columns in (negatives, negatives[:, :, :1], negatives[:, :, -1:]):
        rows = columns.transpose(0, 1).flatten(1)
        assert excess(*(torch.bincount(row, minlength=12)[pool] for row, pool in zip(rows, pools, strict=True))) < 4


def test_samples_of_a_class_keep_their_order() -> None:
    """Else negatives would depend on how a device sorts: an unstable sort moves equal targets, of 200 already."""
    targets = torch.arange(200) * 7 % 3
    expected = [sample for target in range(3) for sample in range(200) if targets[sample] == target]
    assert make(targets).order.tolist() == expected


def test_classes_without_samples() -> None:
    """In the middle and at the end: nothing is drawn of them."""
    targets = torch.tensor([0, 2, 2, 0, 2, 0])
    method = make(targets, num_negatives=3)
    rows = method.draw(Batch(torch.arange(6), targets), at(3))
    assert rows[:, 0].tolist() == list(range(6))
    for row, target in zip(rows.tolist(), targets.tolist(), strict=True):
        assert sorted(row[1:]) == [i for i in range(6) if targets[i] != target]


def test_class_is_its_functions() -> None:
    """Two steps: scored by the other's memory, normalisers of the first batch, rows of this forward's embeddings."""
    method = make(temperature=0.5, momentum=0.75, ce_weight=0.25, feature_weight=3.0)
    memory = {"student": method.memory_student.clone(), "teacher": method.memory_teacher.clone()}
    log_z: dict[str, torch.Tensor] = {}
    for step in range(2):
        index = torch.tensor([3, 7, 3, 0])  # one sample twice
        batch = Batch(index, TARGETS[index])
        student, teacher = outputs(4, 10 + step), outputs(4, 20 + step)
        contrast = method.draw(batch, at(step))
        value = {
            "student": F.normalize(method.embed_student(student.real.taps["pooled"]), dim=1).detach(),
            "teacher": F.normalize(method.embed_teacher(teacher.real.taps["pooled"]), dim=1).detach(),
        }
        expected = torch.zeros(())
        for network, other in (("student", "teacher"), ("teacher", "student")):
            scores = contrast_scores(value[network], memory[other], contrast, temperature=0.5)
            log_z.setdefault(network, log_normaliser(scores, num_data=12))
            expected = expected + contrast_loss(scores, log_z[network], num_data=12)
        losses = method(student, teacher, batch, at(step))
        torch.testing.assert_close(losses["crd"].value, expected)
        task = F.cross_entropy(student.real.logits, batch.target)
        torch.testing.assert_close(losses.total(), 0.25 * task + 3.0 * expected)
        method(outputs(4, 30), outputs(4, 31), batch, at(step, view=1))  # a virtual view leaves nothing behind
        with torch.no_grad():  # the optimiser's step comes before after_step
            method.embed_student.weight.mul_(1.5).add_(0.1)
        method.after_step(student, teacher, batch, at(step))
        for network in memory:
            rows = updated_rows(memory[network], index, value[network], momentum=0.75)
            assert torch.equal(rows[0], rows[2])
            torch.testing.assert_close(
                rows[2], F.normalize(0.75 * memory[network][3] + 0.25 * value[network][2], dim=0)
            )
            memory[network][index] = rows
        torch.testing.assert_close(method.memory_student, memory["student"])
        torch.testing.assert_close(method.memory_teacher, memory["teacher"])
        torch.testing.assert_close(method.log_z, torch.stack([log_z["student"], log_z["teacher"]]))


def test_both_ways_of_scoring_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    anchor, memory = torch.randn(3, 4, generator=generator), torch.randn(40, 4, generator=generator)
    contrast = torch.randint(40, (3, 20), generator=generator)
    few = contrast_scores(anchor, memory, contrast[:, :5], temperature=0.5)  # 5 * 4 < 40: rows are gathered
    torch.testing.assert_close(few, contrast_scores(anchor, memory, contrast, temperature=0.5)[:, :5])


def test_memories_start_with_expected_norm_one() -> None:
    method = make(torch.arange(3000) % 3)
    for memory in (method.memory_student, method.memory_teacher):
        assert float(memory.square().sum(1).mean()) == pytest.approx(1, abs=0.05)
        assert float(memory.abs().max()) <= (3 / 4) ** 0.5


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="all training samples are of one class"):
        make(torch.zeros(12, dtype=torch.long))
    method, views, batch = make(), (outputs(1, 0), outputs(1, 1)), Batch(torch.zeros(1).long(), TARGETS[:1])
    with pytest.raises(ValueError, match="call forward first"):
        method.after_step(*views, batch, at(0))
    method(*views, batch, at(0))
    method.after_step(*views, batch, at(0))
    with pytest.raises(ValueError, match="call forward first"):
        method.after_step(*views, batch, at(0))


def below(word: int, size: int) -> int:
    """An integer below ``size`` by the upper 31 bits of a word."""
    return ((word % 2**64) >> 33) * size >> 31


def shuffle_by_hand(size: int, count: int, words: list[int]) -> list[int]:
    """Swap-or-not and a rotation, in integers without bounds."""
    places = []
    for place in range(count):
        for pivot, factor, offset in zip(*(words[i:-1:3] for i in range(3)), strict=True):
            partner = (below(pivot, size) - place) % size
            if (factor * max(place, partner) + offset) % 2**32 >= 2**31:
                place = partner
        places.append((place + below(words[-1], size)) % size)
    return places


@given(st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=3), st.integers(0, 2**40), st.integers(0, 6))
def test_shuffle_by_hand(sizes: list[int], seed: int, rounds: int) -> None:
    size = torch.tensor(sizes)
    count = min(*sizes, 20)
    bits = randomness.bits(seed, "test", torch.arange(len(sizes))[:, None], torch.arange(3 * rounds + 1))
    rows = shuffled(size, count, bits)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [shuffle_by_hand(n, count, row) for n, row in zip(sizes, bits.tolist(), strict=True)]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_negatives": 6}, {"num_negatives": 7}, {"replacement": True}, {"positive": "relax"}],
    ids=["few", "all", "too many", "with replacement", "relax"],
)
def test_draws_by_hand(options: dict[str, object]) -> None:
    """By seed, view, step and sample alone: the same in every later version, so that interrupted runs go on."""
    method = make(**options)
    assert method.independent == (options in ({"num_negatives": 7}, {"replacement": True}))
    index = torch.tensor([4, 9, 0, 2])
    rows = method.draw(Batch(index, TARGETS[index]), at(3, view=1)).tolist()
    for sample, row in zip(index.tolist(), rows, strict=True):

        def words(purpose: str, count: int, sample: int = sample) -> list[int]:
            return randomness.bits(7, purpose, 1, 3, sample, torch.arange(count)).tolist()

        by_class = [i for target in range(3) for i in range(12) if TARGETS[i] == target]
        pool = [i for i in by_class if TARGETS[i] != TARGETS[sample]]
        own = [i for i in by_class if TARGETS[i] == TARGETS[sample]]
        if method.independent:
            places = [below(word, len(pool)) for word in words("crd negatives", method.num_negatives)]
        else:
            places = shuffle_by_hand(len(pool), method.num_negatives, words("crd shuffle", 3 * ROUNDS + 1))
        word = int(randomness.bits(7, "crd positive", 1, 3, torch.tensor(sample)))
        positive = own[below(word, len(own))] if method.positive == "relax" else sample
        assert row == [positive, *(pool[place] for place in places)]


def test_loss_by_hand() -> None:
    """On probabilities, with a large eps, and with the default one."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    log_z = log_normaliser(scores.requires_grad_(), num_data=20)
    assert not log_z.requires_grad
    torch.testing.assert_close(log_z.exp(), 20 * scores.exp().mean())
    p, c = scores.exp() / log_z.exp(), 5 / 20
    for given_eps, eps in (({}, 1e-7), ({"eps": 0.25}, 0.25)):
        negatives = (c / (p[:, 1:] + c + eps)).log().sum(1)
        expected = -((p[:, 0] / (p[:, 0] + c + eps)).log() + negatives).mean()
        actual = contrast_loss(scores, log_z, num_data=20, **given_eps)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)


def test_state_is_what_cannot_be_had_from_the_data() -> None:
    embeddings = [f"embed_{who}.{what}" for who in ("student", "teacher") for what in ("weight", "bias")]
    method = make()
    assert method.state_dict().keys() == {*embeddings, "memory_student", "memory_teacher", "log_z", "started"}
    assert method.log_z.tolist() == [0, 0]
    assert not method.started
    assert method.embed_student.weight.shape == method.embed_teacher.weight.shape == (4, 5)
    assert not torch.equal(method.memory_student, method.memory_teacher)


def test_page_counts_memories_and_embeddings() -> None:
    """Two memories of 50,000 x 128 single floats and the samples by class, two embeddings of 256 to 128."""
    text = page("crd")
    assert f"- extra parameters: {2 * (256 * 128 + 128):,}\n" in text
    assert "- memory: 51.6 MB\n" in text
    assert needs_in_words(CRD()).endswith("extra parameters; memory")
