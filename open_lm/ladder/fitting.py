"""Fits of a law to points, with bootstrap intervals, bounds that were hit, and errors on points held out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from open_lm.errors import DataError
from open_lm.ladder.laws import Array, Law
from open_lm.ladder.minimise import Problem, best_of_grid, descend
from open_lm.ladder.points import Points

LEAST_RATIO_SPREAD = 0.03
"""Spread of log(D / N), in that of log N, below which the ratio is one: whole batches leave about half of it."""
BOUND_TOLERANCE = 1e-6
MAX_REDRAWS = 200
LEAST_EFFECT = 1e-6
"""Change of the log loss, for a change of a parameter by its own size, below which the points do not see it."""
LEAST_INDEPENDENCE = 1e-5
"""Ratio of singular values below which parameters replace each other; ladders of 4 sizes x 2 lengths have 1e-3."""


@dataclass(frozen=True)
class Fit:
    """A law with the parameters that fit `points` best; `resampled` (R, P) are those of bootstrap resamples."""

    law: Law
    theta: Array
    objective: str
    value: float
    points: Points
    resampled: Array = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def parameters(self) -> dict[str, float]:
        """Each parameter by name, then what is derived of them."""
        found = dict(zip(self.law.names, map(float, self.theta), strict=True))
        return found | self.law.derived(self.theta)

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Bootstrap interval of each parameter; empty without resamples."""
        if not len(self.resampled):
            return {}
        rows = [dict(zip(self.law.names, row, strict=True)) | self.law.derived(row) for row in self.resampled]
        return {name: interval([row[name] for row in rows], level) for name in rows[0]}

    def predict(self, n: Any, d: Any) -> Array:
        """Loss at N and D."""
        n, d = _pair(n, d)
        return self.law.loss(self.theta[None], n, d)[0]

    def predict_all(self, n: Any, d: Any) -> Array:
        """Loss at N and D by each resample, (R, K)."""
        n, d = _pair(n, d)
        return self.law.loss(self.resampled, n, d) if len(self.resampled) else np.empty((0, len(n)))

    @property
    def at_bounds(self) -> tuple[str, ...]:
        """Parameters that lie at an edge of the range they were sought in: the points do not determine them."""
        edges = zip(self.law.names, self.theta, self.law.lower, self.law.upper, strict=True)
        return tuple(name for name, x, low, high in edges if _near(x, low) or _near(x, high))

    @property
    def undetermined(self) -> tuple[str, ...]:
        """Parameters that can change together, or alone, without a change of the loss at the points.

        So with one size, with a single D, or with D proportional to N: other values fit as well, and what the law
        says away from the points depends on where the search began.
        """
        slopes = Problem(self.law, self.points.n, self.points.d, "log-squares").jacobian(self.theta[None])[0]
        sizes = [1.0 if name in self.law.logs else abs(x) for name, x in zip(self.law.names, self.theta, strict=True)]
        effects = slopes * np.array(sizes)
        strength = np.sqrt(np.square(effects).mean(axis=0))
        open_ = [k for k, name in enumerate(self.law.names) if name not in self.at_bounds]
        found = {k for k in open_ if not strength[k] >= LEAST_EFFECT}
        seen = [k for k in open_ if k not in found]
        if seen:
            values, directions = np.linalg.svd(effects[:, seen] / np.linalg.norm(effects[:, seen], axis=0))[1:]
            values = np.append(values, np.zeros(len(seen) - len(values)))
            loose = directions[values < LEAST_INDEPENDENCE * values[0]]
            found |= {k for column, k in enumerate(seen) if (abs(loose[:, column]) > 0.1).any()}
        if _one_ratio(self.points):  # the terms of N and of D can change places, however well each is determined
            found |= {self.law.names.index(name) for name in self.law.exchangeable}
        return tuple(self.law.names[k] for k in sorted(found))

    def bound_shares(self) -> dict[str, float]:
        """Share of the resamples in which a parameter lies at a bound, where that is any: it cuts its interval off."""
        limits = zip(self.law.names, self.resampled.T, self.law.lower, self.law.upper, strict=False)
        shares = {
            name: float(np.mean([_near(x, low) or _near(x, high) for x in column]))
            for name, column, low, high in limits
            if len(column)
        }
        return {name: share for name, share in shares.items() if share}

    @property
    def relative_residuals(self) -> Array:
        """Prediction over loss, minus 1, at each point of the fit."""
        return self.predict(self.points.n, self.points.d) / self.points.loss - 1


def fit(law: Law, points: Points, *, objective: str | None = None, resamples: int = 0, seed: int = 0) -> Fit:
    """`law` fitted to `points`; with `resamples` bootstrap draws of whole points.

    Raises:
        DataError: there are fewer points than parameters.
    """
    if len(points) < len(law.names):
        raise DataError(
            f"{len(points)} points do not determine the {len(law.names)} parameters of the {law.name} law: "
            "give more sizes or lengths, or another --law."
        )
    objective = objective or law.objective
    problem = Problem(law, points.n, points.d, objective)
    ones = np.ones(len(points))
    theta = best_of_grid(problem, points.loss, ones)
    value = float(problem.value(theta[None], points.loss[None], ones[None])[0])
    drawn = _bootstrap(problem, points, theta, resamples, seed) if resamples else np.empty((0, len(theta)))
    return Fit(law, theta, objective, value, points, drawn)


def _bootstrap(problem: Problem, points: Points, theta: Array, resamples: int, seed: int) -> Array:
    """Parameters of resamples with replacement, each descended to from the fit and from the best of the grid.

    None where nearly every resample would hold too few different points to determine the law.
    """
    weights = draw_weights(len(points), len(theta) + 1, resamples, seed)
    if weights is None:
        return np.empty((0, len(theta)))
    found = descend(problem, np.repeat(theta[None], resamples, axis=0), points.loss[None], weights)
    other = _second_starts(problem, points, weights)
    again = descend(problem, other, points.loss[None], weights)
    values = [problem.value(t, points.loss[None], weights) for t in (found, again)]
    return np.where((values[1] < values[0])[:, None], again, found)


def _second_starts(problem: Problem, points: Points, weights: Array) -> Array:
    starts = problem.clipped(problem.law.starts(points.n, points.d, points.loss))
    with np.errstate(all="ignore"):
        sizes = np.nan_to_num(np.abs(problem.residuals(starts, points.loss[None])), nan=1e6, posinf=1e6)
    return starts[np.argmin(weights @ np.minimum(sizes, 1e6).T, axis=1)]


def draw_weights(n_points: int, least_distinct: int, resamples: int, seed: int) -> Array | None:
    """Number of draws of each point in each resample, (R, K), every one with `least_distinct` different points."""
    if n_points <= least_distinct:
        return None
    generator, kept = np.random.default_rng(seed), np.empty((0, n_points))
    for _ in range(MAX_REDRAWS):
        drawn = generator.multinomial(n_points, np.full(n_points, 1 / n_points), size=resamples).astype(np.float64)
        kept = np.concatenate([kept, drawn[(drawn > 0).sum(axis=1) >= least_distinct]])
        if len(kept) >= resamples:
            return kept[:resamples]
    return None


def interval(values: Any, level: float = 0.95) -> tuple[float, float]:
    """The percentiles that leave out (1 - level) / 2 on either side."""
    finite = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(finite[np.isfinite(finite)], [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _one_ratio(points: Points) -> bool:
    sizes, ratios = np.log(points.n), np.log(points.d / points.n)
    return bool(sizes.std() > 0 and ratios.std() < LEAST_RATIO_SPREAD * sizes.std())


def _near(x: float, bound: float) -> bool:
    return bool(np.isfinite(bound) and abs(x - bound) <= BOUND_TOLERANCE * max(1.0, abs(bound)))


def _pair(n: Any, d: Any) -> tuple[Array, Array]:
    n_K, d_K = np.broadcast_arrays(np.atleast_1d(np.asarray(n, float)), np.atleast_1d(np.asarray(d, float)))
    return n_K, d_K
