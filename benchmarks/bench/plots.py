"""Plots as inline SVG. Colours are CSS classes, so that one picture serves light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import msgspec

from benchmarks.bench.histogram import Histogram, middle_of

WIDTH = 720
LEFT = 190
RIGHT = 96
ROW = 26
AXIS = 34
TAIL_HEIGHT = 300
SMALLEST_SHARE = 1e-4


class Dot(msgspec.Struct, frozen=True):
    """One row of a dot plot: an arm's median, and the least and most of its rounds; ``kind`` is a CSS class."""

    label: str
    median: float
    low: float
    high: float
    kind: str


class Line(msgspec.Struct, frozen=True):
    """One arm's distribution; ``kind`` is a CSS class."""

    label: str
    histogram: Histogram
    kind: str


class Scale(msgspec.Struct, frozen=True):
    """Values to pixels, by their logarithm."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value is; those outside are at the edge."""
        value = min(max(value, self.low), self.high)
        return self.start + (self.end - self.start) * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each power of ten, or the powers alone where there are many."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = (1, 2, 5) if last - first <= 3 else (1,)
        values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]


def number(value: float) -> str:
    """Three digits that count, at most."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}".rstrip("0").rstrip(".")


def dot_plot(title: str, unit: str, dots: Sequence[Dot]) -> str:
    """A row for each arm, on a logarithmic axis: a dot for the median, a line for the spread of the rounds.

    Figures of 0 or less have no place on it and are left out.
    """
    dots = [dot for dot in dots if dot.low > 0]
    if not dots:
        return ""
    low, high = min(dot.low for dot in dots), max(dot.high for dot in dots)
    scale = Scale(low / 1.5, high * 1.5, LEFT, WIDTH - RIGHT)
    height = ROW * len(dots) + AXIS
    parts = [_axis(scale, 0, height - AXIS, unit)]
    for place, dot in enumerate(dots):
        y = ROW * place + ROW / 2
        parts.append(
            f'<g class="{dot.kind}"><text class="label" x="{LEFT - 12}" y="{y + 4}">{escape(dot.label)}</text>'
        )
        parts.append(
            f'<line class="spread" x1="{scale.at(dot.low):.1f}" x2="{scale.at(dot.high):.1f}" y1="{y}" y2="{y}"/>'
        )
        parts.append(f'<circle cx="{scale.at(dot.median):.1f}" cy="{y}" r="5"/>')
        parts.append(f'<text class="value" x="{WIDTH - RIGHT + 12}" y="{y + 4}">{number(dot.median)}</text></g>')
    return _svg(title, height, parts)


def tail_plot(title: str, lines: Sequence[Line]) -> str:
    """For each arm, which share of events (up) came later than so many milliseconds (right); both logarithmic."""
    lines = [line for line in lines if line.histogram.total]
    if not lines:
        return ""
    longest = max(line.histogram.largest for line in lines) / 1e6
    shortest = min(line.histogram.percentile(1) or 1 for line in lines) / 1e6
    across = Scale(max(shortest, 0.01) / 1.2, max(longest, 0.1) * 1.2, 60, WIDTH - 16)
    up = Scale(SMALLEST_SHARE, 1, TAIL_HEIGHT, 8)
    parts = [_axis(across, 8, TAIL_HEIGHT, "ms")]
    for share, text in ((1, "all"), (0.1, "10 %"), (0.01, "1 %"), (0.001, "0.1 %"), (0.0001, "0.01 %")):
        y = up.at(share)
        parts.append(f'<line class="grid" x1="60" x2="{WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="52" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for line in lines:
        points = " ".join(f"{across.at(ms):.1f},{up.at(share):.1f}" for ms, share in _tail(line.histogram))
        parts.append(
            f'<g class="{line.kind}"><polyline points="{points}"><title>{escape(line.label)}</title></polyline></g>'
        )
    return _svg(title, TAIL_HEIGHT + AXIS, parts) + _legend(lines)


def _tail(histogram: Histogram) -> list[tuple[float, float]]:
    """Milliseconds, and the share of events that came later than that."""
    total = left = histogram.total
    found = []
    for bucket in sorted(histogram.counts):
        found.append((middle_of(bucket) / 1e6, left / total))
        left -= histogram.counts[bucket]
    step = max(1, len(found) // 200)
    return [*found[:-20:step], *found[-20:]]


def _legend(lines: Sequence[Line]) -> str:
    entries = "".join(f'<li class="{line.kind}"><i></i>{escape(line.label)}</li>' for line in lines)
    return f'<ul class="legend">{entries}</ul>'


def _axis(scale: Scale, top: float, bottom: float, unit: str) -> str:
    parts = []
    for value in scale.ticks():
        x = scale.at(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>')
    parts.append(
        f'<text class="tick" x="{scale.end + 12:.1f}" y="{bottom + 30}" text-anchor="end">{escape(unit)}</text>'
    )
    return "".join(parts)


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
    return f"{head}{''.join(parts)}</svg>"
