"""Measuring a step: what takes its turn, what is counted, what is found equal, what is listed as failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import record_function

from vrm import methods
from vrm.bench import naive_vrm as explicit
from vrm.bench import step_profile as shares_of
from vrm.bench import step_time as bench
from vrm.bench.step_profile import PARTS, profiled_step, shares_of_kernels, shares_of_time
from vrm.bench.step_time import Bare, Settings, Subject, Turns, clock, measure, ready, resolve, split_words
from vrm.config import ConfigError, Run, checked, parse_words
from vrm.contract import DataInfo, Losses, Method, Needs, Phase, Probe, Term, Views
from vrm.divergences import cross_entropy
from vrm.engine.cuda_graphs import WARMUP

QUIET = Console(quiet=True)
TINY = ("pair=resnet8/resnet8", "data.labels_per_class=2", "batch_size=8", "threads=1")
FEW = {"rounds": 1, "steps": 1, "warmup": 0, "memory": False}


def settings(*words: str) -> Settings:
    """Settings from words, as the command line makes them."""
    return checked(Settings, parse_words(words))


def measured(*words: str, **more: Any) -> dict[str, Any]:
    """A small measurement on the digits."""
    own, rest = split_words(words)
    chosen = checked(Settings, {**FEW, **parse_words(own), **more})
    given_keys = {word.partition("=")[0] for word in rest}
    return measure(
        "digits", [*(w for w in TINY if w.partition("=")[0] not in given_keys), *rest], chosen, console=QUIET
    )


def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name."""
    return {row["name"]: row for row in found["rows"]}


class Example(Method):
    """Learns from a teacher in two phases; refuses wide teachers; breaks in a step if asked to."""

    title, venue, year, family = "Example", "-", 2026, "logit"

    def __init__(self, refuse: bool = False, breaks: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.refuse, self.breaks, self.scale = refuse, breaks, scale
        self.weight = nn.Parameter(torch.ones(()))

    @property
    def phases(self) -> tuple[Phase, ...]:
        return Phase("alone", epochs=1, trained=("method",)), Phase("main")

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        if self.refuse:
            raise ValueError("this pair is too wide for it")

    def forward(self, student: Views, teacher: Views, batch: Any, progress: Any) -> Losses:
        if self.breaks:
            raise RuntimeError("shapes do not fit\nand more of that")
        far = (self.weight * student.real.logits - teacher.real.logits).square().mean()
        return Losses(ce=Term(cross_entropy(student.real.logits, batch.target), role="task"), far=Term(far, self.scale))


class Alone(Method):
    """Cross entropy under another name."""

    title, venue, year, family = "Alone", "-", 2026, "logit"

    @property
    def needs(self) -> Needs:
        return Needs(teacher=False)

    def forward(self, student: Views, teacher: Views, batch: Any, progress: Any) -> Losses:
        return Losses(ce=Term(cross_entropy(student.real.logits, batch.target), role="task"))


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods more, which are also the references."""
    known: dict[str, type[Method]] = {"example": Example, "alone": Alone}
    load, names = methods.load, methods.names()
    monkeypatch.setattr(methods, "load", lambda name: known.get(name) or load(name))
    monkeypatch.setattr(methods, "names", lambda: tuple(sorted({*names, *known})))
    monkeypatch.setattr(bench, "REFERENCES", ("alone", "example"))


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_settings_are_words() -> None:
    assert settings("methods=vrm").methods == ("vrm",)
    assert settings("methods=[kd,kd,ce]").methods == ("kd", "ce")
    assert settings("methods=all").methods == methods.names()
    assert settings("against=explicit").against == ("explicit",)
    assert settings("against=[compile=true,batch_size=8]").against == ("compile=true", "batch_size=8")
    own, rest = split_words(["methods=kd", "steps=3", "batch_size=8", "pair=a/b"])
    assert (own, rest) == (["methods=kd", "steps=3"], ["batch_size=8", "pair=a/b"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["methods=[kdd]"], "methods=kdd: did you mean 'kd'"),
        (["methods=[]"], "methods=: name one, or all"),
        (["against=fast"], "against=fast: give explicit, or settings"),
        (["against=compile=true+fast"], r"against=compile=true\+fast: give explicit, or settings"),
        (["rounds=0"], "rounds=0"),
        (["warmup=-1"], "warmup=-1"),
        (["round=3"], "unknown key 'round'.*did you mean 'rounds'"),
    ],
)
def test_settings_that_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(*words)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run=runs/a", "run has no effect on a step"),
        ("epochs=3", "epochs has no effect"),
        ("checkpoint.every=3", "checkpoint.every has no effect"),
        ("teacher.cache=here", "teacher.cache has no effect"),
        ("method=kd", r"methods=\[..\]"),
        ("method.alpha=3", "NAME.alpha=VALUE"),
        ("pair=resnet8", "pair=TEACHER/STUDENT"),
        ("batch_sise=8", "did you mean 'batch_size'"),
        ("precision=float3", "precision"),
        ("samples=4", "make no batch of 8"),
    ],
)
def test_words_that_cannot_be(word: str, message: str) -> None:
    base = ["pair=resnet8/resnet8", "batch_size=8"]
    own, rest = split_words([word])
    kept = [w for w in base if w.partition("=")[0] != word.partition("=")[0]]
    chosen = settings("methods=[kd]", "memory=false", "rounds=1", *own)
    if own:
        found = measure("cifar100", [*kept, *rest], chosen, console=QUIET)
        assert not found["rows"]
        assert all(message in each["reason"] for each in found["failed"])
        return
    with pytest.raises(ConfigError, match=message):
        measure("cifar100", [*kept, *rest], chosen, console=QUIET)


def test_a_changed_setting_may_not_be_one_without_effect() -> None:
    with pytest.raises(ConfigError, match="no effect"):
        measured("methods=[kd]", "against=[epochs=3]")


@pytest.mark.parametrize(
    "word", ["device=cpu", "data=digits", "data.size=16", "data.labels_per_class=3", "ema=0.9+device=cpu"]
)
def test_what_all_steps_share_cannot_be_changed_for_one(word: str) -> None:
    with pytest.raises(ConfigError, match=r"the same .*; measure twice"):
        measured("methods=[kd]", f"against=[{word}]")


def test_images_may_lie_elsewhere_for_one(examples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: dict[str, str] = {}
    original = bench.step_of

    def look(assembly: Any, position: int = 0) -> Any:
        placed[assembly.run.data.placement] = type(assembly.data.train).__name__
        return original(assembly, position)

    monkeypatch.setattr(bench, "step_of", look)
    assert len(rows(measured("methods=[alone]", "against=[data.placement=host]"))) == 4
    assert placed == {"device": "ImageStore", "host": "HostStore"}


def test_any_pair_and_options_by_method(examples: None) -> None:
    words = ["pair=resnet14/resnet8", "example.scale=3"]
    run = resolve("cifar100", words, "example")
    assert (run.teacher.name, run.student.name) == ("resnet14", "resnet8")  # type: ignore[union-attr]
    assert run.method == {"name": "example", "refuse": False, "breaks": False, "scale": 3.0}
    alone = resolve("cifar100", words, "alone")
    assert alone.teacher is None
    assert alone.method == {"name": "alone"}
    with pytest.raises(ConfigError, match="needs a teacher: give pair="):
        resolve("cifar100", ["student=resnet8"], "example")


# ---- what steps work on ----------------------------------------------------------------------------------------------


def test_made_up_images_differ_and_have_every_class() -> None:
    store = bench.made_up(300, 10, 12)
    assert store.images.shape == (300, 3, 12, 12)
    assert torch.equal(store.targets.bincount(), torch.full((10,), 30))
    means = store.images.float().mean((2, 3))
    assert len(torch.unique(store.images.flatten(1), dim=0)) == 300
    assert float(means.std(0).min()) > 10
    assert torch.equal(store.images, bench.made_up(300, 10, 12).images)


def test_made_up_data_are_those_of_the_recipe() -> None:
    run = resolve("cifar100", ["pair=resnet8/resnet8"], "kd")
    chosen = settings("samples=500")
    data = bench.load(run.data, chosen, QUIET)
    assert (len(data.train), data.num_classes, data.image_size, data.view_policy) == (500, 100, (32, 32), "cifar")
    wider = run.data.model_copy(update={"size": 20, "labels_per_class": 2})
    data = bench.load(wider, settings("samples=60", "classes=7"), QUIET)
    assert (len(data.train), data.num_classes, data.image_size) == (14, 7, (20, 20))
    cropped = run.data.model_copy(update={"views": "imagenet", "size": 256})
    assert bench.load(cropped, settings("samples=3", "classes=3"), QUIET).image_size == (224, 224)
    with pytest.raises(ConfigError, match="has only"):
        bench.load(wider, settings("samples=10", "classes=7"), QUIET)
    with pytest.raises(ConfigError, match=r"data\.root"):
        bench.load(run.data.model_copy(update={"name": "folder"}), settings(), QUIET)
    assert bench.load(run.data.model_copy(update={"name": "folder"}), settings("classes=3", "samples=9"), QUIET)


def test_a_random_teacher_has_different_finite_logits(tmp_path: Path) -> None:
    run = resolve("cifar100", ["pair=resnet20/resnet8"], "kd")
    data = bench.load(run.data, settings("samples=64"), QUIET)
    teacher = bench.with_weights(run.teacher, data, tmp_path)  # type: ignore[arg-type]
    from vrm import models

    network = models.create("resnet20", num_classes=100)
    assert teacher.weights is not None
    models.load_weights(network, teacher.weights)
    logits = network.eval()(models.Preprocess(data.mean, data.std)(data.train.images)).detach()
    assert torch.isfinite(logits).all()
    assert 0.1 < float(logits.std(0).mean()) < 100
    assert bench.with_weights(teacher, data, tmp_path) is teacher


# ---- turns -----------------------------------------------------------------------------------------------------------


def test_the_clock_tells_milliseconds_of_each_call() -> None:
    pauses = iter((0.02, 0.04, 0.02))
    found = clock(lambda: time.sleep(next(pauses)), torch.device("cpu"), times=3)
    assert len(found) == 3
    assert found[0] >= 20
    assert found[1] >= 40
    assert max(found) < 400


def run_of(*words: str) -> Run:
    """Settings of a run."""
    return resolve("digits", ["pair=resnet8/resnet8", *words], "kd")


def test_turns_leave_out_what_warms_up_and_count_their_calls() -> None:
    numbers: list[int] = []
    turns = Turns(numbers.append, run_of())
    for _ in range(3):
        turns.take(torch.device("cpu"), steps=2, warmup=1)
    assert numbers == [0, 1, 2] * 3
    assert [len(each) for each in turns.rounds] == [2, 2, 2]
    assert len(turns.every) == 6


rounds = st.lists(st.lists(st.floats(0.1, 100), min_size=1, max_size=5), min_size=1, max_size=5)


@given(rounds, st.floats(0.1, 50))
def test_a_ratio_is_blind_to_drift(found: list[list[float]], factor: float) -> None:
    """Each round may be as slow as it likes, if it is so for both."""
    run = run_of()
    one = Turns(lambda number: None, run, found)
    other = Turns(lambda number: None, run, [[factor * value for value in values] for values in found])
    assert other.over(one) == pytest.approx(factor)
    assert one.over(other) == pytest.approx(1 / factor)
    assert one.over(one) == 1
    assert one.over(None) is None


# ---- bare networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("views", "passes"), [(1, 1), (2, 2)])
def test_bare_networks_make_the_steps_passes_and_nothing_else(
    examples: None, tmp_path: Path, views: int, passes: int
) -> None:
    from tests.runs.own import Net, Pixels, own

    assembly = own(tmp_path, Net(), Pixels(), method="example", views=views)
    student, teacher = assembly.student.network, assembly.teacher.teacher.network  # type: ignore[union-attr]
    step, _, because = bench.step_of(assembly, 1)
    assert because == "there are no CUDA graphs on cpu"
    batch = bench.whole_batches(assembly, 1)[0]
    images = step.views(*batch)
    assert len(images) == passes
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, network in (("student", student), ("teacher", teacher)):
        network.register_forward_pre_hook(lambda module, inputs, name=name: seen[name].append(inputs[0]))
    Bare(assembly, images, step.autocast)()
    bare = {name: list(tensors) for name, tensors in seen.items()}
    assert all(p.grad is None for p in student.parameters())
    for tensors in seen.values():
        tensors.clear()
    step(*batch)
    assert {name: len(tensors) for name, tensors in seen.items()} == {"student": passes, "teacher": passes}
    for name, tensors in seen.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, bare[name], strict=True))


def test_bare_networks_follow_the_phase(examples: None, tmp_path: Path) -> None:
    from tests.runs.own import Net, Pixels, own

    for position, trains in ((0, False), (1, True)):
        assembly = own(tmp_path, Net(), Pixels(), method="example")
        step, phase, _ = bench.step_of(assembly, position)
        bare = Bare(assembly, step.views(*bench.whole_batches(assembly, 1)[0]), step.autocast)
        assert bool(bare.parameters) is trains
        assert ("student" in phase.trained) is trains
        bare()


# ---- shares ----------------------------------------------------------------------------------------------------------


def span(name: str, start: float, end: float, parent: Any = None) -> Any:
    """An event as the profiler has them."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
        cpu_parent=parent,
    )


LABELS = st.sampled_from(["vrm/views", "vrm/student", "vrm/loss", "vrm/unheard-of", "aten::mm"])
TREES: st.SearchStrategy[list[tuple[str, float, list[Any]]]] = st.recursive(
    st.lists(st.tuples(LABELS, st.floats(0, 1), st.just([])), max_size=3),
    lambda inner: st.lists(st.tuples(LABELS, st.floats(0, 1), inner), max_size=3),
    max_leaves=8,
)


def laid_out(tree: list[Any], start: float, parent: Any, gap: float) -> tuple[list[Any], float, dict[str, float]]:
    """Events of a tree one after the other; where they end; each one's own time, by name."""
    events, own = [], {}
    for name, time_of_its_own, inner in tree:
        event = span(name, start, start, parent)
        below, end, times = laid_out(inner, start, event, gap)
        end += time_of_its_own
        first = start
        event.time_range = SimpleNamespace(start=first, end=end, elapsed_us=lambda first=first, end=end: end - first)
        for key, value in times.items():
            own[key] = own.get(key, 0.0) + value
        own[name] = own.get(name, 0.0) + time_of_its_own + gap * len(inner)
        events += [event, *below]
        start = end + gap
    return events, start, own


@given(TREES, st.floats(0.01, 1))
def test_shares_of_time_are_each_parts_own_and_add_up(tree: list[Any], gap: float) -> None:
    whole = span("bench/step", 0.0, 0.0)
    events, end, own = laid_out(tree, 0.0, whole, gap)
    end += 0.5
    whole.time_range = SimpleNamespace(start=0.0, end=end, elapsed_us=lambda: end)
    spans = [e for e in events if e.name.startswith("vrm/")]
    found = shares_of_time([whole, *spans])
    assert tuple(found) == PARTS
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) > -1e-9
    if not any(name == "aten::mm" for name in own):
        for part in ("views", "student", "loss"):
            assert found[part] == pytest.approx(own.get(f"vrm/{part}", 0.0) / end, abs=1e-9)


def test_labels_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the profiler has spans of labels, also of PyTorch's own, as if they had been launched."""

    def event(name: str, where: str, start: float, end: float, *launched: tuple[str, float]) -> Any:
        found = span(name, start, end)
        found.device_type = SimpleNamespace(name=where)
        found.is_user_annotation = "::" not in name and name != "gemm"
        found.kernels = [SimpleNamespace(name=name, duration=duration) for name, duration in launched]
        return found

    own = "Optimizer.step#SGD.step"
    events = [
        event("bench/step", "CPU", 0, 9, ("bench/step", 7)),
        event("vrm/optimizer", "CPU", 1, 8, ("vrm/optimizer", 6)),
        event(own, "CPU", 2, 8, (own, 5)),
        event("aten::mm", "CPU", 3, 4, ("gemm", 4), (own, 5)),
        *(event(name, "CUDA", 3, 8) for name in ("bench/step", "vrm/optimizer", own)),
        event("gemm", "CUDA", 4, 8),
    ]
    watched = contextlib.nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(shares_of, "profile", lambda activities: watched)
    shares, launches = profiled_step(lambda number: None, torch.device("cuda"), repeats=1)
    assert launches == 1
    assert shares["optimizer"] == 1


@given(st.lists(st.tuples(st.floats(0, 12), st.floats(0, 5)), max_size=10), st.floats(0, 5))
def test_shares_of_kernels_go_to_the_part_that_launched_them(
    launched: list[tuple[float, float]], unseen: float
) -> None:
    """Also those of other threads, as a backward pass has them; and those nobody launched in a part go to the rest."""
    whole = span("bench/step", 0, 12)
    student = span("vrm/student", 1, 5, whole)
    spans = [whole, student, span("vrm/loss", 3, 4, student), span("vrm/backward", 6, 10, whole)]
    busy = sum(duration for _, duration in launched) + unseen + 1e-3
    found = shares_of_kernels(spans, launched, busy)
    assert sum(found.values()) == pytest.approx(1)
    inside = {
        "loss": lambda t: 3 <= t <= 4,
        "student": lambda t: 1 <= t <= 5 and not 3 <= t <= 4,
        "backward": lambda t: 6 <= t <= 10,
    }
    for part, belongs in inside.items():
        expected = sum(duration for moment, duration in launched if belongs(moment))
        assert found[part] * busy == pytest.approx(expected, abs=1e-9)


def test_a_profiled_step_tells_its_parts_and_operators() -> None:
    x = torch.ones(4, 4)

    def call(number: int) -> None:
        with record_function("vrm/views"):
            time.sleep(0.02)
        with record_function("vrm/student"):
            time.sleep(0.01)
            with record_function("vrm/loss"):
                F.linear(x, x).sum()  # two operators, with others within
                time.sleep(0.04)
        time.sleep(0.01)
        x.mul(2)

    found, operators = profiled_step(call, torch.device("cpu"), repeats=2)
    assert operators == 3
    assert sum(found.values()) == pytest.approx(1)
    assert found["loss"] > found["views"] > found["student"] > found["backward"] == 0
    assert found["other"] > 0.05


# ---- VRM's explicit form ---------------------------------------------------------------------------------------------


def outputs(seed: int, views: int) -> Views:
    from vrm.contract import Outputs

    generator = torch.Generator().manual_seed(seed)
    made = [
        Outputs((2 * torch.randn(9, 7, generator=generator, dtype=torch.float64)).requires_grad_())
        for _ in range(1 + views)
    ]
    return Views(made[0], tuple(made[1:]))


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": 1.0}, {"keep": 0.5, "temperature": 2.0}, {"num_virtual_views": 2}, {"virtual_cross_entropy": False}],
)
def test_the_explicit_form_has_the_closed_forms_values_and_gradients(options: dict[str, Any]) -> None:
    from vrm.contract import Batch, Progress

    closed = methods.load("vrm")(**options)
    student, teacher = (outputs(seed, closed.needs.virtual_views) for seed in (0, 1))
    one = torch.ones((), dtype=torch.int64)
    told = Batch(torch.arange(9), torch.arange(9) % 7), Progress(one, one, 1, 1)
    found = []
    for form in (closed, explicit.ExplicitVRM(closed)):
        losses = form(student, teacher, *told)
        leaves = [view.logits for view in student.each()]
        found.append((losses, torch.autograd.grad(losses.total(), leaves)))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert list(ours) == list(theirs)
    for name in ours:
        assert (ours[name].weight, ours[name].role) == (theirs[name].weight, theirs[name].role)
        assert ours[name].value.item() == pytest.approx(theirs[name].value.item(), rel=1e-9)
    for mine, its in zip(our_gradients, their_gradients, strict=True):
        assert torch.allclose(mine, its, rtol=1e-8, atol=1e-12)
    assert explicit.disagreement(closed, student, teacher, *told) < 1e-9


@pytest.mark.parametrize(
    "options",
    [{"vertices": "features"}, {"matching": "huber"}, {"joint_entropy": "collision"}, {"prune_redundant": False}],
)
def test_the_explicit_form_refuses_what_it_is_not_written_for(options: dict[str, Any]) -> None:
    closed = methods.load("vrm")(**options)
    with pytest.raises(ConfigError, match=f"vrm.{next(iter(options))}="):
        explicit.ExplicitVRM(closed)


def test_forms_that_disagree_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    methods.load("vrm")
    original = explicit.graph_loss
    monkeypatch.setattr(explicit, "graph_loss", lambda *a, **k: original(*a, **k) * (1 + 1e-5))
    found = measured("methods=[vrm]", "against=explicit")
    assert [each["name"] for each in found["failed"]] == ["vrm explicit"]
    assert "disagree by 1e-05" in found["failed"][0]["reason"]
    assert "vrm" in rows(found)


def test_both_forms_take_turns() -> None:
    methods.load("vrm")
    found = rows(measured("methods=[vrm]", "against=explicit", "vrm.keep=0.5"))
    assert found["vrm explicit"]["disagreement_of_forms"] < 1e-9
    assert found["vrm"]["disagreement_of_forms"] is None
    assert found["vrm explicit"]["over_unchanged"] > 0
    assert found["vrm explicit"]["options"]["keep"] == 0.5
    with pytest.raises(ConfigError, match="name it in methods"):
        measured("methods=[kd]", "against=explicit")


# ---- all of it -------------------------------------------------------------------------------------------------------


def test_methods_phases_and_changes_take_turns(examples: None) -> None:
    changes = ("precision=bfloat16", "example.scale=2+batch_size=3", "batch_size=4")
    found = measured("methods=[example]", f"against=[{','.join(changes)}]", "batch_size=6")
    of = rows(found)
    expected = ["alone", "example (alone)", "example (main)"]
    expected += [f"example ({phase}) {change}" for change in changes for phase in ("alone", "main")]
    assert list(of) == expected
    assert not found["failed"]
    for name, row in of.items():
        assert row["timed_steps"] == 1
        assert row["least_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["median_ms"])
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["launches"] > 50
        assert row["nonfinite_steps"] == 0
        assert not row["recorded"]
        assert (row["over_unchanged"] is not None) is any(change in name for change in changes)
    assert of["alone"]["over"]["alone"] == 1
    assert of["example (main)"]["over"]["example"] == 1
    assert of["example (main)"]["over"]["alone"] == pytest.approx(1 / of["alone"]["over"]["example"])
    assert of["alone"]["shares"]["teacher"] < 0.01 < of["example (main)"]["shares"]["teacher"]
    assert of["example (main) precision=bfloat16"]["precision"] == "bfloat16"
    assert of["example (main) batch_size=4"]["batch_size"] == 4
    both = of["example (main) example.scale=2+batch_size=3"]
    assert (both["batch_size"], both["options"]["scale"]) == (3, 2.0)
    assert of["example (main)"]["batch_size"] == 6
    assert found["pair"] == "resnet8/resnet8"
    assert not found["made_up_images"]
    assert found["environment"]["threads"] == torch.get_num_threads()


def test_what_cannot_be_measured_is_listed_with_its_reason(examples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured("methods=[example,alone]", "example.refuse=true")
    assert list(rows(found)) == ["alone"]
    assert {each["name"] for each in found["failed"]} == {"example (alone)", "example (main)"}
    assert all("too wide for it" in each["reason"] for each in found["failed"])
    found = measured("methods=[example,alone]", "example.breaks=true")
    assert {each["reason"] for each in found["failed"]} == {"RuntimeError: shapes do not fit"}
    assert list(rows(found)) == ["alone"]

    original, count = Turns.take, [0]

    def breaks_later(self: Turns, *arguments: Any, **options: Any) -> None:
        count[0] += 1
        if self.run.method["name"] == "example" and self.call.__name__ == "eager" and count[0] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        original(self, *arguments, **options)

    monkeypatch.setattr(Turns, "take", breaks_later)
    found = measured("methods=[example,alone]", rounds=3)
    assert list(rows(found)) == ["alone"]
    assert {each["reason"] for each in found["failed"]} == {"OutOfMemoryError: CUDA out of memory."}
    assert rows(found)["alone"]["over"] == {"alone": 1.0, "example": None}


def test_references_that_are_not_there_are_done_without(examples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "REFERENCES", ("alone", "lost"))
    found = rows(measured("methods=[example]"))
    assert found["example (main)"]["over"]["alone"] > 0
    assert found["example (main)"]["over"]["lost"] is None
    monkeypatch.setattr(bench, "REFERENCES", ("alone", "example"))
    found = rows(
        measure(
            "digits", ["student=resnet8", *TINY[1:]], checked(Settings, FEW | {"methods": ("alone",)}), console=QUIET
        )
    )
    assert list(found) == ["alone"]


def test_a_step_is_the_one_that_training_takes(examples: None, tmp_path: Path) -> None:
    """Its weights after a batch are those that the loop has after its first step."""
    from vrm.config import resolve as resolve_run
    from vrm.runs.assembly import assemble
    from vrm.runs.folder import RunFolder
    from vrm.runs.trainer import Training

    words = ["student=resnet8", "method=alone", "data.labels_per_class=2", "batch_size=8", "threads=1"]
    run = resolve_run("distill", "digits", [*words, "steps=1", "schedule.warmup_epochs=0", f"run={tmp_path / 'r'}"]).run
    assembly = assemble(run)
    step, _, _ = bench.step_of(assembly)
    step(*bench.whole_batches(assembly, 1)[0])
    trained = assemble(run)
    folder = RunFolder(run.run)
    Training(trained, folder, console=QUIET, quiet=True).train()
    folder.close()
    one, other = (each.student.network.state_dict() for each in (assembly, trained))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_steps_are_recorded_where_training_records_them(examples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recorder that notes what it is given, in the place of CUDA graphs."""
    kept: list[Callable[..., None]] = []
    replayed: list[int] = []

    class Tape:
        def __init__(self, device: torch.device) -> None:
            kept.clear()

        def run(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> None:
            function(*inputs)

        def record(self, function: Callable[..., None], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
            kept.append(function)

            def replay() -> None:
                replayed.append(1)
                function(*inputs)

            return replay

    monkeypatch.setattr(bench, "CudaGraphRecorder", Tape)
    monkeypatch.setattr(bench, "why_eager", lambda assembly: None)
    run = resolve("digits", TINY, "alone")
    dataset, _ = bench.kept_in_place(bench.load(run.data, settings(), QUIET), run)
    bares: bench.Bares = {}
    found = ready(Subject("alone", run), dataset, bares=bares)
    assert found.eager_because is None
    assert [type(function).__name__ for function in kept] == ["Step", "Bare"]
    assert len(replayed) == 2, f"the call that records, behind {WARMUP} that do not"
    found.turns.take(torch.device("cpu"), steps=3, warmup=1)
    assert len(replayed) == 6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is told by Linux")
def test_memory_is_that_of_a_process_of_its_own() -> None:
    words = ("pair=resnet8/resnet8", "data.labels_per_class=20", "threads=1")
    found = {}
    for batch in (16, 160):
        run = resolve("digits", [*words, f"batch_size={batch}", "data.size=32"], "ce")
        found[batch], note = bench.memory_of_process(Subject("ce", run), settings())
        assert note == ""
    activations = 144 * 32 * 32 * 16 * 4  # of one convolution alone
    assert found[160] - found[16] > activations  # type: ignore[operator]
    assert 0 < found[16] < 2**30  # type: ignore[operator]


def test_memory_that_cannot_be_told_is_explained() -> None:
    run = resolve("digits", TINY, "ce")
    lost = run.model_copy(update={"student": run.student.model_copy(update={"name": "resnet9"})})
    found, note = bench.memory_of_process(Subject("ce", lost), settings())
    assert found is None
    assert "unknown network 'resnet9'" in note
