"""Charts of the report: lines over tokens as a small SVG, coloured by the page's style sheet."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise

Point = tuple[float, float]
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 14, 40
"""Margins; the left one grows with the numbers that stand in it."""
DIGIT = 9.6
"""Width of a digit in the style sheet's ticks."""
N_BANDS = 160
"""Places at which hovering shows values."""


@dataclass(frozen=True)
class Series:
    """One line: its points in order of x, and the class that colours it. With `dots` each point is marked.

    A value that is not finite leaves a gap. What is not `hovered` has no value in the hover box.
    """

    name: str
    points: Sequence[Point]
    style: str
    dots: bool = False
    hovered: bool = True

    def segments(self) -> list[list[Point]]:
        """The runs of finite points."""
        found: list[list[Point]] = [[]]
        for x, y in self.points:
            if math.isfinite(y):
                found[-1].append((x, y))
            elif found[-1]:
                found.append([])
        return [segment for segment in found if segment]

    @property
    def finite(self) -> list[Point]:
        return [point for segment in self.segments() for point in segment]


@dataclass(frozen=True)
class Rule:
    """A dashed line across the chart with its name on it: at a height (`y`) or at a place (`x`)."""

    name: str
    x: float | None = None
    y: float | None = None


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_name: str,
    write_x: Callable[[float], str],
    write_y: Callable[[float], str],
    rules: Sequence[Rule] = (),
    width: int = 1000,
    height: int = 380,
    from_zero: bool = False,
) -> str:
    """An `<svg>` with a line per series, ticks at round numbers, and the values under the mouse in a box.

    `label` says in words what is shown, for those who cannot see it.
    """
    points = [point for one in series for point in one.finite]
    if not points:
        return '<p class="absent">nothing was logged</p>'
    heights = [y for _, y in points] + [rule.y for rule in rules if rule.y is not None]
    x_range = (0.0, max(x for x, _ in points))
    y_range = _padded(0.0 if from_zero else min(heights), max(heights))
    marks = [write_y(value) for value in ticks(*y_range, n_wanted=height // 55)]
    scale = _Axes(x_range, y_range, width, height, max(LEFT, 14 + round(DIGIT * max(map(len, marks), default=0))))
    parts = [
        *_grid(scale, x_name, write_x, write_y),
        *(_rule(rule, scale) for rule in rules),
        *(_series(one, scale) for one in series),
        *_hover(series, scale, lambda x: f"{write_x(x)} {x_name}", write_y),
    ]
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class _Axes:
    """From the ranges of the figures to places in the picture."""

    x_range: Point
    y_range: Point
    width: int
    height: int
    left: int = LEFT

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / ((high - low) or 1) * (self.width - self.left - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / ((high - low) or 1) * (self.height - TOP - BOTTOM)


def _padded(low: float, high: float) -> Point:
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    return (low - margin if low else 0.0), high + margin


def ticks(low: float, high: float, n_wanted: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) in [low, high], about `n_wanted` of them."""
    rough = (high - low) / max(n_wanted, 1)
    if rough <= 0 or not math.isfinite(rough):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(scale: _Axes, x_name: str, write_x: Callable[[float], str], write_y: Callable[[float], str]) -> list[str]:
    left, right, bottom = scale.left, scale.width - RIGHT, scale.height - BOTTOM
    lines = [f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>']
    for value in ticks(*scale.y_range, n_wanted=scale.height // 55):
        y = scale.y(value)
        lines.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(
            f'<text class="tick" x="{left - 9}" y="{y + 4:.1f}" text-anchor="end">{escape(write_y(value))}</text>'
        )
    for value in ticks(*scale.x_range, n_wanted=scale.width // 130):
        x = scale.x(value)
        lines.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(write_x(value))}</text>'
        )
    middle = (left + right) / 2
    lines.append(
        f'<text class="axis-name" x="{middle}" y="{scale.height - 4}" text-anchor="middle">{escape(x_name)}</text>'
    )
    return lines


def _rule(rule: Rule, scale: _Axes) -> str:
    right, bottom = scale.width - RIGHT, scale.height - BOTTOM
    name = escape(rule.name)
    if rule.y is not None:
        y = scale.y(rule.y)
        line = f'<line class="rule" x1="{scale.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        return f'{line}<text class="rule-name" x="{right - 4}" y="{y - 6:.1f}" text-anchor="end">{name}</text>'
    x = scale.x(rule.x or 0.0)
    line = f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
    return f'{line}<text class="rule-name" x="{x + 6:.1f}" y="{bottom - 8}">{name}</text>'


def _series(one: Series, scale: _Axes) -> str:
    drawn = []
    for segment in one.segments():
        places = [(scale.x(x), scale.y(y)) for x, y in segment]
        places = places if one.dots else _as_seen(places)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline class="line {one.style}" points="{line}"/>')
        if one.dots or len(segment) == 1:
            drawn += [f'<circle class="dot {one.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places]
    return "".join(drawn)


def _as_seen(places: list[Point]) -> list[Point]:
    """Of many points in one column of pixels the first, lowest, highest and last: the same picture."""
    if len(places) <= 4000:
        return places
    columns = (list(column) for _, column in groupby(places, key=lambda place: round(place[0])))
    return [
        place
        for column in columns
        for place in sorted({column[0], min(column, key=_height), max(column, key=_height), column[-1]})
    ]


def _height(place: Point) -> float:
    return place[1]


def _hover(
    series: Sequence[Series], scale: _Axes, write_x: Callable[[float], str], write_y: Callable[[float], str]
) -> list[str]:
    """Transparent bands side by side; the one under the mouse shows its line, and each series' value nearest to it.

    A value from outside the band says where it was measured.
    """
    shown = [(one, one.finite) for one in series if one.hovered and one.finite]
    xs = sorted({x for _, finite in shown for x, _ in finite})
    xs = xs[:: max(1, math.ceil(len(xs) / N_BANDS))]
    edges = [scale.left, *((scale.x(a) + scale.x(b)) / 2 for a, b in pairwise(xs)), scale.width - RIGHT]
    bands = []
    for x, (left, right) in zip(xs, pairwise(edges), strict=True):
        lines = [write_x(x)]
        for one, finite in shown:
            at, value = _nearest(finite, x)
            away = "" if left - 1 <= scale.x(at) <= right + 1 else f" (at {write_x(at)})"
            lines.append(f"{one.name} {write_y(value)}{away}")
        bands.append(_band(scale, scale.x(x), (left, right), lines))
    return bands


def _nearest(points: Sequence[Point], x: float) -> Point:
    at = bisect.bisect_left(points, (x, -math.inf))
    return min(points[max(at - 1, 0) : at + 2], key=lambda point: abs(point[0] - x))


def _band(scale: _Axes, x: float, edges: Point, lines: Sequence[str]) -> str:
    left, right = edges
    height, width = 20 * len(lines) + 12, 8.8 * max(map(len, lines)) + 20
    box_x = x + 10 if x + 10 + width < scale.width else x - 10 - width
    texts = "".join(
        f'<text x="{box_x + 10:.1f}" y="{TOP + 22 + 20 * k}">{escape(line)}</text>' for k, line in enumerate(lines)
    )
    return (
        f'<g class="hover"><rect class="band" x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.1):.1f}" '
        f'height="{scale.height - TOP - BOTTOM}"/><g class="tip">'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{scale.height - BOTTOM}"/>'
        f'<rect x="{box_x:.1f}" y="{TOP + 2}" width="{width:.0f}" height="{height}" rx="6"/>{texts}</g></g>'
    )
