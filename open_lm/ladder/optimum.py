"""Compute-optimal parameters and tokens for a budget of FLOPs, from a law or from IsoFLOP parabolas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from open_lm.errors import DataError
from open_lm.ladder.fitting import Fit, interval
from open_lm.ladder.laws import Array
from open_lm.ladder.points import FLOPS_PER_PARAM_TOKEN, Points

LEAST_ON_CURVE = 3
SAME_BUDGET = 0.10
"""Relative distance of compute within which runs count as one IsoFLOP curve."""


@dataclass(frozen=True)
class Optimum:
    """The best split of `flops`: `n` parameters trained on `d` tokens, and the loss they reach."""

    flops: float
    n: float
    d: float
    loss: float
    n_interval: tuple[float, float] | None = None
    """Of the resamples that have an optimum; `resamples_at_edge` is the share of those that have none."""
    edge: str | None = None
    """"smallest" or "largest" where the loss still falls at that end of the N that were tried: there is no optimum."""
    resamples_at_edge: float = 0.0

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.d / self.n


def compute_optimal(found: Fit, flops: float) -> Optimum:
    """The N and D = C / 6N of least predicted loss, on a fine grid over 12 orders of magnitude, refined twice."""
    best, side = _best_n(found, found.theta[None], flops)
    n = float(best[0])
    d = flops / (FLOPS_PER_PARAM_TOKEN * n)
    drawn, sides = _best_n(found, found.resampled, flops)
    inside = drawn[sides == 0]
    bounds = interval(inside) if len(inside) and not side[0] else None
    share = float((sides != 0).mean()) if len(drawn) else 0.0
    edge = {-1: "smallest", 0: None, 1: "largest"}[int(side[0])]
    return Optimum(flops, n, d, float(found.predict(n, d)[0]), bounds, edge, share)


def _best_n(found: Fit, theta_SP: Array, flops: float) -> tuple[Array, Array]:
    """N of least loss for each parameter vector, and -1 or 1 where it is the smallest or the largest tried, else 0."""
    sides = np.zeros(len(theta_SP))
    centre, width = np.full(len(theta_SP), np.log(np.sqrt(flops / (FLOPS_PER_PARAM_TOKEN * 20)))), 14.0
    for level in range(4):
        offsets = np.linspace(-width, width, 401)
        for row in range(len(theta_SP)):
            n = np.exp(centre[row] + offsets)
            losses = found.law.loss(theta_SP[row : row + 1], n, flops / (FLOPS_PER_PARAM_TOKEN * n))[0]
            lowest = int(np.argmin(losses))
            centre[row] += offsets[lowest]
            if level == 0:
                sides[row] = (lowest == len(offsets) - 1) - (lowest == 0)
        width /= 100
    return np.exp(centre), sides


@dataclass(frozen=True)
class IsoFlop:
    """A parabola of loss over log N at one budget, and where it is lowest."""

    flops: float
    n: float
    loss: float
    coefficients: tuple[float, float, float]
    points: Points
    inside: bool
    """Whether the lowest point lies between the smallest and the largest N: else it is extrapolated."""


@dataclass(frozen=True)
class IsoFlopFit:
    """The lowest points of all parabolas, and the power laws N = g·C^exponent and D = C / 6N through them."""

    curves: tuple[IsoFlop, ...]
    exponent: float
    scale: float
    skipped: tuple[float, ...]

    def optimum(self, flops: float) -> tuple[float, float]:
        """N and D at `flops`."""
        n = self.scale * flops**self.exponent
        return n, flops / (FLOPS_PER_PARAM_TOKEN * n)


def isoflop(points: Points, tolerance: float = SAME_BUDGET) -> IsoFlopFit:
    """IsoFLOP analysis (approach 2 of arXiv:2203.15556): group runs by compute, a parabola each, a line through minima.

    Raises:
        DataError: fewer than two budgets have three sizes and a parabola that opens upward.
    """
    curves, skipped = [], []
    for group in budgets(points, tolerance):
        curve = parabola(points.take(group))
        if curve is None:
            skipped.append(float(np.exp(np.log(points.flops[group]).mean())))
        else:
            curves.append(curve)
    if len(curves) < 2:
        raise DataError(
            f"IsoFLOP curves: {len(curves)} budgets have {LEAST_ON_CURVE} sizes around a minimum, {len(skipped)} have "
            "not. Train more sizes at equal compute, or widen --isoflop-tolerance."
        )
    exponent, log_scale = np.polyfit(np.log([c.flops for c in curves]), np.log([c.n for c in curves]), 1)
    return IsoFlopFit(tuple(curves), float(exponent), float(np.exp(log_scale)), tuple(skipped))


def budgets(points: Points, tolerance: float) -> list[Array]:
    """Indices of the points in each budget, where the first of a group sets what `tolerance` is measured from."""
    order = np.argsort(points.flops, kind="stable")
    groups: list[list[int]] = []
    for k in order:
        if groups and points.flops[k] <= points.flops[groups[-1][0]] * (1 + tolerance):
            groups[-1].append(int(k))
        else:
            groups.append([int(k)])
    return [np.array(group) for group in groups]


def parabola(points: Points) -> IsoFlop | None:
    """The parabola through the points of one budget; None with fewer than three sizes, or where it has no minimum."""
    if len(np.unique(points.n)) < LEAST_ON_CURVE:
        return None
    x = np.log(points.n)
    square, slope, level = np.polyfit(x, points.loss, 2)
    if square <= 0:
        return None
    lowest = -slope / (2 * square)
    flops = float(np.exp(np.log(points.flops).mean()))
    inside = bool(x.min() <= lowest <= x.max())
    loss = float(level - slope**2 / (4 * square))
    return IsoFlop(flops, float(np.exp(lowest)), loss, (float(square), float(slope), float(level)), points, inside)
