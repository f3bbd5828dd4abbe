"""Ticks, label places, and charts that are well-formed XML."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrm.report.svg import Dots, Level, Look, Series, dot_plot, line_chart, round_ticks, shorten, spread, tick_labels

SVG = "{http://www.w3.org/2000/svg}"


def test_ticks_by_hand() -> None:
    assert round_ticks(0.0, 1.0, count=5) == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1.0))
    assert round_ticks(73.0, 97.0, count=6) == (75.0, 80.0, 85.0, 90.0, 95.0)
    assert tick_labels((-0.5, 0.0, 0.5)) == ["−0.5", "0.0", "0.5"]
    assert tick_labels((1000.0, 2000.0)) == ["1,000", "2,000"]


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), st.integers(2, 9))
def test_ticks_are_round_and_inside(low: float, size: float, count: int) -> None:
    high = low + size
    ticks = round_ticks(low, high, count=count)
    assert len(ticks) <= count + 1
    step = min((b - a for a, b in pairwise(ticks)), default=size)
    assert all(low - 1e-6 * step <= tick <= high + 1e-6 * step for tick in ticks)
    if len(ticks) > 1:
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-4


def test_spread_by_hand() -> None:
    assert spread([10.0, 50.0], gap=16, low=0, high=100) == [10.0, 50.0]
    assert spread([50.0, 50.0], gap=16, low=0, high=100) == [42.0, 58.0]
    assert spread([99.0, 100.0, 20.0], gap=16, low=0, high=100) == [84.0, 100.0, 20.0]
    with pytest.raises(ValueError, match="do not fit"):
        spread([1.0, 2.0, 3.0], gap=16, low=0, high=20)


@given(st.lists(st.floats(0, 400), min_size=1, max_size=20))
def test_labels_never_overlap_nor_change_order(targets: list[float]) -> None:
    places = spread(targets, gap=16, low=0, high=400)
    ordered = sorted(places)
    assert all(b - a >= 16 - 1e-9 for a, b in pairwise(ordered))
    assert ordered[0] >= -1e-9
    assert ordered[-1] <= 400 + 1e-9
    assert sorted(range(len(targets)), key=lambda i: targets[i]) == sorted(range(len(places)), key=lambda i: places[i])


def test_shorten_keeps_beginning_and_end() -> None:
    assert shorten("x" * 32) == "x" * 32
    assert shorten("kd " + "y" * 50 + " temperature=4", 20) == "kd yyyyyyy…erature=4"


def chart(count: int, text: str = "name") -> ElementTree.Element:
    """A line chart of ``count`` lines that all end at the same value."""
    series = [
        Series(f"{text} {i}", Look(i % 8, i % 3), [(1.0, 10.0), (2.0, 90.0)], [(1.0, 9.0, 11.0), (2.0, 89.0, 91.0)])
        for i in range(count)
    ]
    return ElementTree.fromstring(
        line_chart(series, identity="c", title=text, description=text, unit="%", levels=[Level("teacher", 95.0)])
    )


@pytest.mark.parametrize("count", [1, 5, 40])
def test_every_line_is_named_apart(count: int) -> None:
    root = chart(count)
    names = [text for text in root.iter(f"{SVG}text") if "name" in text.attrib["class"].split()]
    assert {name.text for name in names} == {f"name {i}" for i in range(count)} | {"teacher"}
    heights = sorted(float(name.attrib["y"]) for name in names)
    assert all(b - a >= 15.9 for a, b in pairwise(heights))
    assert heights[-1] <= float(root.attrib["viewBox"].split()[3])


def test_any_characters_are_text() -> None:
    root = chart(1, "<b>&'\"]]>")
    assert root.findtext(f"{SVG}title") == "<b>&'\"]]>"
    assert root.findtext(f"{SVG}desc") == "<b>&'\"]]>"
    assert not list(root.iter(f"{SVG}b"))


def test_one_epoch_and_a_constant_have_axes() -> None:
    text = line_chart(
        [Series("a", Look(0), [(1.0, 50.0)])], identity="c", title="t", description="d", unit="%", ceiling=100
    )
    assert "nan" not in text
    labels = [e.text for e in ElementTree.fromstring(text).iter(f"{SVG}text") if e.attrib["class"] == "tick"]
    assert "1" in labels
    assert "50.0" in labels


def test_dots_lie_where_their_values_are() -> None:
    lines = [Dots("a", Look(0), [90.0, 92.0], [91.0, 93.0], ["s0", "s1"], "91.00", (80.0, 102.0))]
    root = ElementTree.fromstring(dot_plot(lines, identity="d", title="t", description="d", unit="%"))
    marks = [float(c.attrib["cx"]) for c in root.iter(f"{SVG}circle") if c.attrib["class"].startswith("mark")]
    rings = [float(c.attrib["cx"]) for c in root.iter(f"{SVG}circle") if c.attrib["class"].startswith("hollow")]
    assert rings[0] == pytest.approx((marks[0] + marks[1]) / 2, abs=0.2)
    mean = next(e for e in root.iter(f"{SVG}line") if e.attrib["class"].startswith("mean"))
    assert float(mean.attrib["x1"]) == pytest.approx((marks[0] + marks[1]) / 2, abs=0.2)
