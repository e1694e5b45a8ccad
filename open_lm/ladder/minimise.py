"""Minimisation of a law's residuals: many starts or resamples at once by Levenberg-Marquardt, one by L-BFGS-B.

Shapes: S parameter vectors, P parameters of a law, K points; each vector may have its own losses and weights (S, K).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from open_lm.ladder.laws import Array, Law
from open_lm.ladder.science import scipy_optimize

HUBER_DELTA = 1e-3
OBJECTIVES = ("huber-log", "log-squares", "least-squares")


@dataclass(frozen=True)
class Problem:
    """A law, points, and what is minimised: the weighted sum of squared or Huber residuals, of losses or their logs."""

    law: Law
    n: Array
    d: Array
    objective: str

    @property
    def delta(self) -> float:
        """Residuals beyond this count by their absolute value."""
        return HUBER_DELTA if self.objective == "huber-log" else float("inf")

    def residuals(self, theta_SP: Array, loss_SK: Array) -> Array:
        """Prediction minus loss, or the difference of their logs, (S, K)."""
        predicted = self.law.loss(theta_SP, self.n, self.d)
        if self.objective == "least-squares":
            return predicted - loss_SK
        return np.log(np.maximum(predicted, 1e-300)) - np.log(loss_SK)

    def jacobian(self, theta_SP: Array) -> Array:
        """Derivative of the residuals, (S, K, P)."""
        slopes = self.law.jacobian(theta_SP, self.n, self.d)
        if self.objective == "least-squares":
            return slopes
        return slopes / np.maximum(self.law.loss(theta_SP, self.n, self.d), 1e-300)[..., None]

    def value(self, theta_SP: Array, loss_SK: Array, weight_SK: Array) -> Array:
        """The objective of each vector, (S,); not finite counts as infinite."""
        with np.errstate(all="ignore"):
            total = (weight_SK * huber(self.residuals(theta_SP, loss_SK), self.delta)).sum(axis=1)
        return np.where(np.isfinite(total), total, np.inf)

    def clipped(self, theta_SP: Array) -> Array:
        return np.clip(theta_SP, self.law.lower, self.law.upper)


def huber(residual: Array, delta: float) -> Array:
    """r²/2 up to `delta`, a straight line beyond; an infinite `delta` is least squares."""
    size = np.abs(residual)
    if not np.isfinite(delta):
        return 0.5 * size * size
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta))


def descend(problem: Problem, theta_SP: Array, loss_SK: Array, weight_SK: Array, n_iterations: int = 200) -> Array:
    """Each vector moved towards its minimum: damped Gauss-Newton, with Huber's weights recomputed at every step."""
    theta = problem.clipped(theta_SP)
    loss, weight = (np.broadcast_to(x, (len(theta), len(problem.n))) for x in (loss_SK, weight_SK))
    best, damping = problem.value(theta, loss, weight), np.full(len(theta), 1e-3)
    open_rows = np.arange(len(theta))
    for _ in range(n_iterations):
        now, rows = theta[open_rows], open_rows
        trial = problem.clipped(now - _step(problem, now, loss[rows], weight[rows], damping[rows]))
        value = problem.value(trial, loss[rows], weight[rows])
        better = value < best[rows]
        gain = np.where(better, best[rows] - value, np.inf)
        theta[rows[better]], damping[rows] = trial[better], damping[rows] * np.where(better, 0.3, 4.0)
        done = (gain <= 1e-13 * best[rows]) | (damping[rows] > 1e12)
        best[rows[better]] = value[better]
        open_rows = rows[~done]
        if not len(open_rows):
            break
    return theta


def _step(problem: Problem, theta_SP: Array, loss_SK: Array, weight_SK: Array, damping_S: Array) -> Array:
    with np.errstate(all="ignore"):
        residual, slopes = problem.residuals(theta_SP, loss_SK), problem.jacobian(theta_SP)
        pull = weight_SK * np.minimum(1.0, problem.delta / np.maximum(np.abs(residual), 1e-300))
        gradient = np.einsum("skp,sk->sp", slopes, pull * residual)
        curvature = np.matmul(slopes.transpose(0, 2, 1), slopes * pull[..., None])
    held = ((theta_SP <= problem.law.lower) & (gradient > 0)) | ((theta_SP >= problem.law.upper) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    curvature = np.where(held[:, :, None] | held[:, None, :], 0.0, curvature)
    diagonal = np.einsum("spp->sp", curvature)
    size = np.maximum(diagonal.max(axis=1, keepdims=True), 1e-300)
    np.einsum("spp->sp", curvature)[...] += damping_S[:, None] * diagonal + 1e-14 * size + held * size
    usable = np.isfinite(curvature).all(axis=(1, 2)) & np.isfinite(gradient).all(axis=1)
    curvature[~usable] = np.eye(theta_SP.shape[1])
    gradient[~usable] = 0.0
    return np.linalg.solve(curvature, gradient[..., None])[..., 0]


def polish(problem: Problem, theta_P: Array, loss_K: Array, weight_K: Array) -> Array:
    """One vector at its minimum to all digits: L-BFGS-B, started again until it gains nothing more."""
    minimize, ones = scipy_optimize().minimize, np.ones((1, len(loss_K)))
    scale = 1.0 / max(float(problem.value(theta_P[None], loss_K[None], weight_K[None])[0]), 1e-300)
    size = np.maximum(np.abs(theta_P), 1e-3)

    def objective(x: Array) -> tuple[float, Array]:
        theta = (x * size)[None]
        residual, slopes = problem.residuals(theta, loss_K[None]), problem.jacobian(theta)[0]
        value = float((weight_K * ones * huber(residual, problem.delta)).sum())
        pull = weight_K * np.clip(residual[0], -problem.delta, problem.delta)
        return value * scale, (slopes.T @ pull) * size * scale

    bounds = list(zip(np.array(problem.law.lower) / size, np.array(problem.law.upper) / size, strict=True))
    x, value = theta_P / size, float("inf")
    for _ in range(20):
        found = minimize(
            objective, x, jac=True, method="L-BFGS-B", bounds=bounds,
            options={"ftol": 0.0, "gtol": 1e-10, "maxiter": 20_000, "maxfun": 50_000, "maxcor": 20},
        )  # fmt: skip
        if not found.fun < value * (1 - 1e-12):
            break
        x, value = found.x, found.fun
    return problem.clipped((x * size)[None])[0]


def best_of_grid(
    problem: Problem, loss_K: Array, weight_K: Array, *, n_descents: int = 64, n_polished: int = 4
) -> Array:
    """The global minimum as far as a grid of starts shows it: the best starts descend, and the best of those again."""
    starts = problem.clipped(problem.law.starts(problem.n, problem.d, loss_K))
    values = problem.value(starts, loss_K[None], weight_K[None])
    chosen = starts[np.argsort(values, kind="stable")[:n_descents]]
    moved = descend(problem, chosen, loss_K[None], weight_K[None])
    order = np.argsort(problem.value(moved, loss_K[None], weight_K[None]), kind="stable")
    polished = np.stack([polish(problem, moved[k], loss_K, weight_K) for k in order[:n_polished]])
    polished = np.concatenate([polished, moved[order[:1]]])
    return polished[int(np.argmin(problem.value(polished, loss_K[None], weight_K[None])))]
