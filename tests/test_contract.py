"""The contract and the pairing of taps: what a method can rely on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vrm import methods
from vrm.contract import (
    Losses,
    Method,
    Outputs,
    Phase,
    Probe,
    Progress,
    Term,
    Views,
)
from vrm.pairing import match_stages, pair_taps


def progress(epoch: int = 1) -> Progress:
    return Progress(torch.tensor(epoch), torch.tensor(0), 10, 100)


def network(name: str, strides: tuple[int, ...], **shapes: tuple[int, ...]) -> Probe:
    """A network of these strides on 64x64 images, with further taps."""
    stages = {f"stage{k}": (8 * k, 64 // stride, 64 // stride) for k, stride in enumerate(strides, start=1)}
    return Probe(name, (64, 64), 3, {"stem": (4, 64, 64), **stages, "pooled": (4,), "logits": (3,), **shapes})


def test_defaults_are_one_ordinary_run() -> None:
    assert Method().phases == (Phase("main", None, ("student", "method"), None, "run", True),)


def test_each_view_in_order() -> None:
    real, *virtual = (Outputs(torch.full((1, 2), float(k))) for k in range(4))
    assert Views(real, tuple(virtual)).each() == (real, *virtual)


def test_total_by_role_and_name() -> None:
    losses = Losses(
        ce=Term(torch.tensor(2.0), 0.5, "task"),
        kd=Term(torch.tensor(3.0), torch.tensor(2.0)),
        hint=Term(torch.tensor(5.0)),
    )
    assert losses.total().item() == 12
    assert losses.total(role="task").item() == 1
    assert losses.total(role="distillation").item() == 11
    assert losses.total(names=("hint", "ce")).item() == 6
    assert losses.total(role="distillation", names=("hint", "ce")).item() == 5
    with pytest.raises(ValueError, match="no loss term with role 'task'"):
        losses.total(role="task", names=("kd",))
    with pytest.raises(KeyError):
        losses.total(names=("nothing",))


def test_total_carries_gradients_of_values_and_weights() -> None:
    value, weight = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    Losses(a=Term(value, weight), b=Term(value * 0.5)).total().backward()
    assert (value.grad, weight.grad) == (torch.tensor(3.5), torch.tensor(2.0))


@given(st.integers(1, 300), st.integers(0, 50))
def test_ramp(epoch: int, epochs: int) -> None:
    ramp = progress(epoch=epoch).ramp(epochs)
    assert ramp.item() == pytest.approx(min(epoch / max(epochs, 1), 1.0))
    assert ramp.ndim == 0


def test_resolve() -> None:
    probe = network("net", (8, 16), **{"stage1:pre": (8, 8, 8), "stage2:pre": (16, 4, 4), "layer.3.act": (9, 8, 8)})
    assert probe.stages == ("stage1", "stage2")
    assert probe.resolve(["stages"]) == ("stage1", "stage2")
    assert probe.resolve(["stages:pre", "stem"]) == ("stage1:pre", "stage2:pre", "stem")
    assert probe.resolve(["last", "stage2", "last:pre"]) == ("stage2", "stage2:pre")
    assert probe.resolve(["pooled", "layer.3.act"]) == ("pooled", "layer.3.act")
    assert probe.resolve([]) == ()


@pytest.mark.parametrize(
    ("selector", "near"), [("stage3", "stage1"), ("steem", "stem"), ("layer.3.ac", "layer.3.act"), ("poled", "pooled")]
)
def test_resolve_names_the_nearest(selector: str, near: str) -> None:
    probe = network("net", (8, 16), **{"layer.3.act": (9, 8, 8)})
    with pytest.raises(ValueError, match=rf"net has no tap '{selector}'; did you mean [^?]*{near}"):
        probe.resolve([selector])


@pytest.mark.parametrize("selector", ["last", "stages"])
def test_resolve_without_stages(selector: str) -> None:
    with pytest.raises(ValueError, match=f"has no tap '{selector}'"):
        network("net", ()).resolve([selector])


def test_channels_and_strides() -> None:
    probe = network("net", (8,), tokens=(17, 12))
    assert [probe.channels(tap) for tap in ("stage1", "tokens", "pooled")] == [8, 12, 4]
    assert [probe.stride(tap) for tap in ("stem", "stage1", "tokens", "pooled")] == [1, 8, 16, 64]


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        pytest.param((2, 4, 8), (2, 4, 8), [(1, 1), (2, 2), (3, 3)], id="alike"),
        pytest.param((2, 4, 8), (1, 2, 4), [(1, 1), (2, 2), (3, 3)], id="as many, half the scale: by position"),
        pytest.param((2, 4, 8, 16), (2, 4, 8, 8), [(1, 1), (2, 2), (3, 3), (4, 4)], id="vgg13 to mobilenetv2"),
        pytest.param((2, 4, 8, 8), (1, 2, 4), [(1, 2), (2, 3)], id="resnet32x4 to vgg8"),
        pytest.param((1, 2, 4), (2, 4, 8, 8), [(2, 1), (3, 2)], id="vgg13 to resnet8x4"),
        pytest.param((4, 4, 8), (4, 4, 4, 8), [(1, 2), (2, 3), (3, 4)], id="the last of a stride first"),
        pytest.param((4, 8, 16, 32), (16, 16, 16, 16), [(3, 4)], id="vision transformer to network of four stages"),
        pytest.param((16, 16), (4, 8), [(1, 1), (2, 2)], id="as many, no stride in common: by position"),
        pytest.param((2, 4), (16, 16, 32), [(1, 2), (2, 3)], id="no stride in common: by position from the end"),
    ],
)
def test_match_stages(student: tuple[int, ...], teacher: tuple[int, ...], pairs: list[tuple[int, int]]) -> None:
    s, t = network("student", student), network("teacher", teacher)
    assert match_stages(s, t) == tuple((f"stage{a}", f"stage{b}") for a, b in pairs)
    assert match_stages(s, t, pre=True) == tuple((f"stage{a}:pre", f"stage{b}:pre") for a, b in pairs)


@given(
    st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=5).map(sorted),
    st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=5).map(sorted),
)
def test_match_stages_is_a_monotone_matching(student: list[int], teacher: list[int]) -> None:
    s, t = network("student", tuple(student)), network("teacher", tuple(teacher))
    pairs = match_stages(s, t)
    assert pairs
    assert pairs == tuple(sorted(pairs))
    for names in zip(*pairs, strict=True):
        assert list(names) == sorted(set(names))
    assert match_stages(t, s) == tuple((b, a) for a, b in pairs)


def test_match_stages_without_stages() -> None:
    for pair in ((network("mlp", ()), network("net", (8,))), (network("net", (8,)), network("mlp", ()))):
        with pytest.raises(ValueError, match="mlp has no known stages"):
            match_stages(*pair)


def test_pair_taps() -> None:
    pre = {"stage1:pre": (8, 32, 32), "stage2:pre": (16, 16, 16)}
    s, t = network("student", (2, 4), **pre), network("teacher", (2, 4), **pre, block=(3, 16, 16))
    assert pair_taps(s, t, ["stages"], ["stages:pre"]) == (("stage1", "stage1:pre"), ("stage2", "stage2:pre"))
    assert pair_taps(s, t, ["stem", "stages"], ["stem", "stages"])[0] == ("stem", "stem")
    assert pair_taps(s, t, ["last", "stage1"], ["block", "last:pre"]) == (("stage2", "block"), ("stage1", "stage2:pre"))
    assert pair_taps(s, t, ["pooled"], ["logits"]) == (("pooled", "logits"),)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (["stem", "stages"], ["stages"], r"but there are 2 .stem, stages. and 1 .stages."),
        (["stages"], ["last"], "'stages' is 2 taps of student, but 'last' is 1 of teacher"),
        (["stages:pre"], ["stages"], "student has no tap 'stage1:pre'"),
        (["stem"], ["blok"], "teacher has no tap 'blok'"),
    ],
)
def test_pair_taps_says_what_does_not_fit(student: list[str], teacher: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_taps(network("student", (2, 4)), network("teacher", (2, 4, 8)), student, teacher)


def test_pair_taps_explains_missing_pre_activations() -> None:
    linear = Probe("mobile", (64, 64), 3, {"stage1": (8, 32, 32)}, signed=frozenset({"stage1"}))
    relu = network("net", (2,), **{"stage1:pre": (8, 32, 32)})
    with pytest.raises(ValueError, match=r"mobile has no pre-activation taps .*student_taps=\[stages\]"):
        pair_taps(linear, relu, ["stages:pre"], ["stages:pre"])
    with pytest.raises(ValueError, match=r"mobile has no pre-activation taps .*teacher_taps=\[stages\]"):
        pair_taps(relu, linear, ["stages:pre"], ["stages:pre"])
    assert pair_taps(linear, relu, ["stages"], ["stages:pre"]) == (("stage1", "stage1:pre"),)


def test_signed_with_pre_activations_is_no_obstacle() -> None:
    """Wide residual networks: signed stages, whose pre-activations are the next batch norm's output."""
    shapes = {"stage1": (8, 32, 32), "stage1:pre": (8, 32, 32)}
    wide = Probe("wide", (64, 64), 3, shapes, signed=frozenset(shapes))
    assert pair_taps(wide, wide, ["stages:pre"], ["stages:pre"]) == (("stage1:pre", "stage1:pre"),)


def test_pooled_is_demanded_where_it_is_missing() -> None:
    with pytest.raises(ValueError, match="no pooled vector"):
        Outputs(torch.zeros(1, 2)).require_pooled()


def test_unknown_method_names_the_near() -> None:
    for name in methods.names():
        with pytest.raises(ValueError, match=f"unknown method '{name}x'; did you mean .*{name}"):
            methods.load(name + "x")


def test_published_settings_come_general_first() -> None:
    class Published(Method):
        published = {"cifar100": {"*": {"a": 1}, "t/s": {"a": 2}, "b=y": {"t/s": {"a": 3}}}}  # noqa: RUF012

        def __init__(self, a: int = 0, b: str = "x") -> None: ...

    general, of_pair, of_option = ("cifar100/*", {"a": 1}), ("cifar100/t/s", {"a": 2}), ("cifar100/b=y/t/s", {"a": 3})
    for data, pair, chosen, found in (
        ("cifar100", "t/s", {}, [general, of_pair]),
        ("cifar100", None, {}, [general]),
        ("cifar100", "x/y", {"b": "y"}, [general]),
        ("cifar100", "t/s", {"b": "y"}, [general, of_pair, of_option]),
        ("imagenet", "t/s", {"b": "y"}, []),
    ):
        assert list(methods.published(Published, data, pair, chosen)) == found
