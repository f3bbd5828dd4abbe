"""Charts as inline SVG: lines with bands, and dots on a common scale. The page's style sheet gives the colours.

Each chart is a complete ``<svg>`` with a title and a description for those who do not see it. Hue is never the only
sign: lines are named at their ends, and differ in dashes and in the marker at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

HUES = 8
"""The number of colours in the style sheet; ``--hue0`` is the emphasised one."""
DASHES = ("", "7 4", "2 3", "9 3 2 3")
"""Dash patterns: solid and three others; each goes with a marker of its own."""
TEXT = 12.5
LINE = 16
CHARACTER = 7.2
"""Mean width of a character at ``TEXT`` pixels; sans-serif faces lie between 6.2 and 7.2."""
LONGEST = 32
SAMPLE = 36
"""Length of the piece of a line in a legend: two periods of the longest dashes."""


@dataclass(frozen=True)
class Look:
    """A hue (an index into the palette) and a rank within it, which chooses dashes and marker."""

    hue: int
    rank: int = 0

    @property
    def css(self) -> str:
        """The classes of the style sheet that draw it."""
        return f"hue{self.hue}" + (" lead" if self.hue == 0 else "")

    def marker(self, x: float, y: float, *, size: float = 4.0, kind: str = "mark") -> str:
        """Return the marker at a point: a disc, a square, a diamond or a triangle, by rank."""
        css = f'class="{kind} hue{self.hue}"'
        if self.rank == 0:
            return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
        if self.rank == 3:
            corners = (
                f"{x:.1f},{y - 1.2 * size:.1f} {x + 1.1 * size:.1f},{y + size:.1f} {x - 1.1 * size:.1f},{y + size:.1f}"
            )
            return f'<polygon {css} points="{corners}"/>'
        turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if self.rank == 2 else ""
        side = size * 1.75
        corner = f'x="{x - side / 2:.1f}" y="{y - side / 2:.1f}"'
        return f'<rect {css} {corner} width="{side:.1f}" height="{side:.1f}"{turn}/>'

    def line(self, *, faint: bool = False) -> str:
        """Return the attributes of its lines: classes, and the dash pattern if they are not solid."""
        dash = DASHES[2] if faint else DASHES[self.rank]
        return f'class="line {self.css}{" faint" * faint}"' + (f' stroke-dasharray="{dash}"' if dash else "")

    def sample(self, x: float, y: float, *, faint: bool = False) -> str:
        """Return ``SAMPLE`` pixels of its line from a point to the right, with the marker at the end, for a legend."""
        end = x + SAMPLE - 6
        ends = f'x1="{x:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        return f"<line {self.line(faint=faint)} {ends}/>" + self.marker(end, y, size=2.5 if faint else 4.0)


@dataclass(frozen=True)
class Series:
    """A line of a chart: its points, and a band around it where it is a mean of several runs."""

    label: str
    look: Look
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()
    """``(x, low, high)``."""
    faint: bool = False
    """Draw the line thin, for a run without an end; only its tooltip names it unless it has a ``label``."""
    tooltip: str = ""


@dataclass(frozen=True)
class Level:
    """A dashed line across the chart at one value."""

    label: str
    value: float


@dataclass(frozen=True)
class Dots:
    """A line of a dot plot: for each run a filled dot and a hollow one for its second value, and the mean."""

    label: str
    look: Look
    values: Sequence[float]
    hollow: Sequence[float]
    names: Sequence[str]
    mean: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...] = field(default=())

    def __call__(self, value: float) -> float:
        """Return the position of a value in pixels."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def round_ticks(low: float, high: float, *, count: int = 6) -> tuple[float, ...]:
    """Return about ``count`` multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high`` (``low < high``)."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(step * i for i in range(first, last + 1))


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the ticks as text, with as many decimals as their step needs."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:,.{decimals}f}".replace("-", "−") for tick in ticks]


def spread(targets: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Return the positions nearest to ``targets`` (least squares) that are ``gap`` apart, between ``low`` and ``high``.

    The order of the targets is kept. ``ValueError`` if they cannot all have room.
    """
    if (len(targets) - 1) * gap > high - low + 1e-9:
        raise ValueError(f"{len(targets)} labels with a gap of {gap} do not fit between {low} and {high}")
    order = sorted(range(len(targets)), key=lambda i: targets[i])
    blocks: list[tuple[float, int]] = []  # isotonic regression of target - rank * gap, by pooling neighbours that clash
    for rank, i in enumerate(order):
        total, size = targets[i] - rank * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / size:
            total, size = total + blocks[-1][0], size + blocks.pop()[1]
        blocks.append((total, size))
    ceiling = high - (len(targets) - 1) * gap
    flat = [min(max(total / size, low), ceiling) for total, size in blocks for _ in range(size)]
    result = [0.0] * len(targets)
    for rank, i in enumerate(order):
        result[i] = flat[rank] + rank * gap
    return result


def shorten(text: str, length: int = LONGEST) -> str:
    """Return at most ``length`` characters of a text, cut in its middle: settings differ at their two ends."""
    if len(text) <= length:
        return text
    return text[: length // 2].rstrip() + "…" + text[len(text) - (length - length // 2 - 1) :].lstrip()


def _text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    tooltip = f"<title>{escape(words)}</title>" if len(words) > LONGEST else ""
    return (
        f'<text x="{x:.1f}" y="{y + TEXT * 0.35:.1f}" class="{css}" text-anchor="{anchor}">'
        f"{tooltip}{escape(shorten(words))}</text>"
    )


def _frame(identity: str, title: str, description: str, width: float, height: float, body: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-labelledby="{identity}-title {identity}-text" style="max-width:{width:.0f}px">'
        f'<title id="{identity}-title">{escape(title)}</title><desc id="{identity}-text">{escape(description)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _grid(axis: Axis, left: float, right: float) -> list[str]:
    """Return horizontal lines at the ticks of a vertical axis, with their labels."""
    parts = []
    for tick, label in zip(axis.ticks, tick_labels(axis.ticks), strict=True):
        y = axis(tick)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 9, y, label, "tick", "end"))
    return parts


def _baseline(axis: Axis, y: float, unit: str, *, title_below: float = 36) -> list[str]:
    """Return a horizontal axis with its ticks and its unit."""
    parts = [f'<line class="axis" x1="{axis.start:.1f}" x2="{axis.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>']
    for tick, label in zip(axis.ticks, tick_labels(axis.ticks), strict=True):
        x = axis(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 5:.1f}"/>')
        parts.append(_text(x, y + 16, label, "tick", "middle"))
    parts.append(_text((axis.start + axis.end) / 2, y + title_below, unit, "unit", "middle"))
    return parts


def _epochs(series: Sequence[Series], start: float, end: float, count: int) -> Axis:
    values = [x for line in series for x, _ in line.points]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step_at_least_one = min(count, max(1, math.floor(high - low)))
    ticks = [t for t in round_ticks(low, high, count=step_at_least_one) if t == round(t)]
    return Axis(low, high, start, end, tuple(ticks))


def value_axis(values: Sequence[float], start: float, end: float, *, ceiling: float = math.inf, count: int = 6) -> Axis:
    """Return an axis that holds all values with a margin, but does not go beyond ``ceiling``."""
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or max(abs(high) * 0.02, 0.5)
    low, high = low - air, min(high + air, max(ceiling, high))
    return Axis(low, high, start, end, round_ticks(low, high, count=count))


def _values(series: Sequence[Series]) -> list[float]:
    """Return all values of lines and bands."""
    points = [y for line in series for _, y in line.points]
    return points + [y for line in series for _, low, high in line.band for y in (low, high)]


def _lines(series: Sequence[Series], across: Axis, up: Axis) -> list[str]:
    """Return bands, then lines with a marker at their ends, the first on top."""
    parts = []
    for line in series:
        if line.band:
            outline = [(across(x), up(high)) for x, _, high in line.band]
            outline += [(across(x), up(low)) for x, low, _ in reversed(line.band)]
            parts.append(f'<path class="band hue{line.look.hue}" d="{_path(outline)}Z"/>')
    for line in reversed(series):
        points = [(across(x), up(y)) for x, y in line.points]
        tooltip = f"<title>{escape(line.tooltip or line.label)}</title>"
        parts.append(f'<path {line.look.line(faint=line.faint)} d="{_path(points)}">{tooltip}</path>')
        parts.append(line.look.marker(*points[-1], size=2.5 if line.faint else 4))
    return parts


def line_chart(
    series: Sequence[Series],
    *,
    identity: str,
    title: str,
    description: str,
    unit: str,
    levels: Sequence[Level] = (),
    ceiling: float = math.inf,
    width: float = 892,
    height: float = 400,
) -> str:
    """Return a chart of lines over epochs, each named at its end beside a piece of its line."""
    named = [line for line in series if line.label]
    longest = max([len(shorten(label)) for label in [*(x.label for x in named), *(x.label for x in levels)]] or [0])
    top, left, right = 30.0, 58.0, width - 28 - SAMPLE - longest * CHARACTER
    height = max(height, (len(named) + len(levels)) * LINE + top + 60)
    bottom = height - 46
    across = _epochs(series, left, right, 8)
    up = value_axis([*_values(series), *(level.value for level in levels)], bottom, top, ceiling=ceiling)

    body = [*_grid(up, left, right), *_baseline(across, bottom, "epoch"), _text(left, 10, unit, "unit")]
    body += _lines(series, across, up)
    body += [
        f'<line class="level" x1="{left:.1f}" x2="{right:.1f}" y1="{up(lv.value):.1f}" y2="{up(lv.value):.1f}"/>'
        for lv in levels
    ]

    x, start, end = right + 26 + SAMPLE, right + 22, right + 16 + SAMPLE
    ends = [(across(line.points[-1][0]), up(line.points[-1][1])) for line in named]
    ends += [(right, up(level.value)) for level in levels]
    places = spread([y for _, y in ends], gap=LINE, low=top - 4, high=bottom) if ends else []
    for (end_x, end_y), y in zip(ends, places, strict=True):
        body.append(f'<path class="leader" d="{_path([(end_x + 6, end_y), (right + 8, end_y), (right + 18, y)])}"/>')
    for line, y in zip(named, places, strict=False):
        body.append(line.look.sample(start, y, faint=line.faint) + _text(x, y, line.label, f"name {line.look.css}"))
    for level, y in zip(levels, places[len(named) :], strict=True):
        body.append(f'<line class="level" x1="{start:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(x, y, level.label, "name level"))
    return _frame(identity, title, description, width, height, body)


def small_chart(series: Sequence[Series], *, identity: str, title: str, description: str) -> str:
    """Return a small chart of one setting on its own scale; the page writes the title above it."""
    width, height, top, left = 270.0, 170.0, 8.0, 44.0
    right, bottom = width - 8, height - 40
    across, up = _epochs(series, left, right, 4), value_axis(_values(series), bottom, top, count=4)
    body = [*_grid(up, left, right), *_baseline(across, bottom, "epoch", title_below=32)]
    body += _lines(series, across, up)
    return _frame(identity, title, description, width, height, body)


def dot_plot(
    lines: Sequence[Dots],
    *,
    identity: str,
    title: str,
    description: str,
    unit: str,
    levels: Sequence[Level] = (),
    width: float = 892,
    ceiling: float = math.inf,
) -> str:
    """Return a line of dots for each setting on one scale: both values of each run, the mean and its interval."""
    longest = max(len(shorten(line.label)) for line in lines)
    tallest = max(len(line.values) for line in lines)
    step = min(7.0, 42 / tallest)
    left, right, top = 20 + longest * CHARACTER, width - 64.0, 34.0
    row = max(34.0, (tallest - 1) * step + 22)
    bottom = top + row * len(lines)
    values = [v for line in lines for v in (*line.values, *line.hollow)] + [level.value for level in levels]
    across = value_axis(values, left, right, ceiling=ceiling, count=7)
    body = []
    for x in map(across, across.ticks):
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
    body += _baseline(across, bottom, unit)
    for level in levels:
        x = across(level.value)
        body.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{bottom:.1f}"/>')
        room = len(shorten(level.label)) * CHARACTER / 2
        body.append(_text(min(max(x, left + room), width - room), top - 16, level.label, "name level", "middle"))
    for i, line in enumerate(lines):
        y = top + row * (i + 0.5)
        body.append(_text(left - 12, y, line.label, f"name {line.look.css}", "end"))
        if line.interval:
            a, b = (min(max(across(v), left), right) for v in line.interval)
            body.append(f'<line class="reach hue{line.look.hue}" x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        centre = across(sum(line.values) / len(line.values))
        low, high = y - row * 0.34, y + row * 0.34
        stroke = f'x1="{centre:.1f}" x2="{centre:.1f}" y1="{low:.1f}" y2="{high:.1f}"'
        body.append(f'<line class="mean hue{line.look.hue}" {stroke}/>')
        for j, (value, hollow, name) in enumerate(zip(line.values, line.hollow, line.names, strict=True)):
            at = y + (j - (len(line.values) - 1) / 2) * step
            marks = line.look.marker(across(hollow), at, size=3.4, kind="hollow") + line.look.marker(across(value), at)
            body.append(f"<g><title>{escape(name)}</title>{marks}</g>")
        body.append(_text(width - 4, y, line.mean, "value", "end"))
    return _frame(identity, title, description, width, bottom + 46, body)
