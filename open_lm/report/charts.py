"""Charts of the report: lines over tokens as a small SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 14, 40


@dataclass(frozen=True)
class Series:
    """One line: its points in order of x, and the class that colours it. With `dots` each point is marked."""

    name: str
    points: Sequence[Point]
    style: str
    dots: bool = False


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
    """An `<svg>` with one polyline per series, ticks at round numbers, and a tooltip on every dot.

    `label` says in words what is shown, for those who cannot see it.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return '<p class="absent">nothing was logged</p>'
    heights = [y for _, y in points] + [rule.y for rule in rules if rule.y is not None]
    x_range = (0.0, max(x for x, _ in points))
    y_range = _padded(0.0 if from_zero else min(heights), max(heights))
    scale = _Scale(x_range, y_range, width, height)
    parts = [
        *_grid(scale, x_name, write_x, write_y),
        *(_rule(rule, scale) for rule in rules),
        *(_series(one, scale, write_x, write_y) for one in series),
    ]
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class _Scale:
    """From the ranges of the figures to places in the picture."""

    x_range: Point
    y_range: Point
    width: int
    height: int

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / ((high - low) or 1) * (self.width - LEFT - RIGHT)

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


def _grid(scale: _Scale, x_name: str, write_x: Callable[[float], str], write_y: Callable[[float], str]) -> list[str]:
    left, right, bottom = LEFT, scale.width - RIGHT, scale.height - BOTTOM
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


def _rule(rule: Rule, scale: _Scale) -> str:
    right, bottom = scale.width - RIGHT, scale.height - BOTTOM
    name = escape(rule.name)
    if rule.y is not None:
        y = scale.y(rule.y)
        line = f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        return f'{line}<text class="rule-name" x="{right - 4}" y="{y - 6:.1f}" text-anchor="end">{name}</text>'
    x = scale.x(rule.x or 0.0)
    line = f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
    return f'{line}<text class="rule-name" x="{x + 6:.1f}" y="{bottom - 8}">{name}</text>'


def _series(one: Series, scale: _Scale, write_x: Callable[[float], str], write_y: Callable[[float], str]) -> str:
    places = [(scale.x(x), scale.y(y)) for x, y in one.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline class="line {one.style}" points="{line}"/>'
    if not one.dots:
        return drawn
    tips = (escape(f"{one.name} {write_y(y)} at {write_x(x)}") for x, y in one.points)
    dots = "".join(
        f'<circle class="dot {one.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{tip}</title></circle>'
        for (x, y), tip in zip(places, tips, strict=True)
    )
    return drawn + dots
