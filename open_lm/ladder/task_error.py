"""Task error as a function of loss: OpenLM's exponential decay and OLMo-ladder's sigmoid, chained behind a law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from open_lm.errors import ConfigError, DataError
from open_lm.ladder.fitting import Fit, draw_weights, interval
from open_lm.ladder.laws import Array
from open_lm.ladder.points import Points
from open_lm.ladder.science import scipy_optimize


def exponential(loss: Array, k: float, gamma: float, epsilon: float) -> Array:
    """ε - k e^(-γL) (arXiv:2403.08540): the error comes down from ε as the loss does."""
    return epsilon - k * np.exp(-gamma * loss)


def sigmoid(loss: Array, a: float, k: float, loss_0: float, b: float) -> Array:
    """1 - (a / (1 + e^(-k(L - L0))) + b) (arXiv:2412.04403): accuracy between chance and b, falling with the loss."""
    return 1 - (a / (1 + np.exp(-k * (loss - loss_0))) + b)


@dataclass(frozen=True)
class ErrorForm:
    """A form of error(loss), where to begin, and the range of each parameter."""

    name: str
    formula: str
    function: Callable[..., Array]
    names: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    starts: Callable[[Array, Array], list[list[float]]]


def _exponential_starts(loss: Array, error: Array) -> list[list[float]]:
    starts = []
    for gamma in np.geomspace(0.05, 5, 25):
        basis = np.stack([-np.exp(-gamma * loss), np.ones_like(loss)], axis=-1)
        k, epsilon = np.linalg.lstsq(basis, error, rcond=None)[0]
        starts.append([max(float(k), 1e-3), float(gamma), float(epsilon)])
    return starts


def _sigmoid_starts(loss: Array, error: Array) -> list[list[float]]:
    accuracy = 1 - error
    height = float(accuracy.min()) - 1
    middles = [0.9, float(loss.min()), float(np.median(loss)), float(loss.max())]
    return [[height, middle, k, 1.0] for middle in middles for k in (1.0, 3.0, 8.0)]


def _sigmoid_by_start(loss: Array, a: float, loss_0: float, k: float, b: float) -> Array:
    return sigmoid(loss, a, k, loss_0, b)


INF = float("inf")
MAX_STARTS = 5
MAX_EVALUATIONS = 200
FORMS = {
    "exponential": ErrorForm(
        "exponential", "Err(L) = epsilon - k e^(-gamma L)", exponential, ("k", "gamma", "epsilon"),
        (0.0, 0.0, -INF), (INF, INF, INF), _exponential_starts,
    ),
    "sigmoid": ErrorForm(
        "sigmoid", "Acc(L) = a / (1 + e^(-k (L - L0))) + b, Err = 1 - Acc", _sigmoid_by_start, ("a", "L0", "k", "b"),
        (-1.0, 0.0, 0.0, 0.0), (0.0, INF, INF, 1.0), _sigmoid_starts,
    ),
}  # fmt: skip
"""Error laws by the name that --error-law gives."""


@dataclass(frozen=True)
class ErrorFit:
    """An error law fitted to losses and errors; `resampled` are the parameters of bootstrap resamples."""

    form: ErrorForm
    theta: Array
    points: Points
    resampled: Array = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def parameters(self) -> dict[str, float]:
        return dict(zip(self.form.names, map(float, self.theta), strict=True))

    @property
    def at_bounds(self) -> tuple[str, ...]:
        """Parameters at an edge of their range."""
        edges = zip(self.form.names, self.theta, self.form.lower, self.form.upper, strict=True)
        return tuple(name for name, x, low, high in edges if np.isclose(x, low, atol=1e-9) or np.isclose(x, high))

    def predict(self, loss: Array) -> Array:
        return self.form.function(np.asarray(loss, dtype=np.float64), *self.theta)

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Bootstrap interval of each parameter; none where nothing was resampled."""
        if not len(self.resampled):
            return {}
        return {name: interval(column) for name, column in zip(self.form.names, self.resampled.T, strict=True)}

    def chained(self, found: Fit, n: float, d: float) -> tuple[float, tuple[float, float] | None]:
        """Error at N and D through the loss that `found` predicts, and its interval where both were resampled."""
        error = float(self.predict(found.predict(n, d))[0])
        if not len(found.resampled) or not len(self.resampled):
            return error, None
        losses = found.predict_all(n, d)[:, 0]
        rows = self.resampled[np.arange(len(losses)) % len(self.resampled)]
        drawn = np.array([self.form.function(loss, *row) for loss, row in zip(losses, rows, strict=True)])
        return error, interval(drawn)


def fit_error(
    name: str, points: Points, *, anchor: tuple[float, float] | None = None, resamples: int = 0, seed: int = 0
) -> ErrorFit:
    """The error law `name` through the points that have an error; `anchor` adds one artificial (loss, error).

    Raises:
        ConfigError: no such law.
        DataError: too few points have an error, or no start leads to a fit.
    """
    if name not in FORMS:
        raise ConfigError(f"--error-law {name}: no such form. Choose {' or '.join(FORMS)}.")
    form, scored = FORMS[name], points.take(np.isfinite(points.error))
    loss, error = scored.loss, scored.error
    if anchor is not None:
        loss, error = np.append(loss, anchor[0]), np.append(error, anchor[1])
    if len(loss) < len(form.names):
        raise DataError(f"{len(loss)} points have a task error: the {name} law has {len(form.names)} parameters.")
    theta = _least_squares(form, loss, error, form.starts(loss, error))
    if theta is None:
        raise DataError(f"the {name} law does not fit these errors from any start: look at the points.")
    drawn = _resample(form, loss, error, theta, resamples, seed) if resamples else np.empty((0, len(theta)))
    return ErrorFit(form, theta, scored, drawn)


def _resample(form: ErrorForm, loss: Array, error: Array, theta: Array, resamples: int, seed: int) -> Array:
    weights = draw_weights(len(loss), len(theta), resamples, seed)
    if weights is None:
        return np.empty((0, len(theta)))
    rows = (np.repeat(np.arange(len(loss)), row.astype(int)) for row in weights)
    drawn = (_least_squares(form, loss[row], error[row], [list(theta)]) for row in rows)
    return np.array([found for found in drawn if found is not None])


def _least_squares(form: ErrorForm, loss: Array, error: Array, starts: list[list[float]]) -> Array | None:
    """The best of the fits from the most promising starts, None where none converges."""
    optimize, best, value = scipy_optimize(), None, INF
    low, high = np.array(form.lower), np.array(form.upper)
    inner_low = np.where(np.isfinite(low), low + 1e-9, low)
    inner_high = np.where(np.isfinite(high), high - 1e-9, high)
    inside = [np.clip(start, inner_low, inner_high) for start in starts]
    with np.errstate(all="ignore"):
        inside.sort(
            key=lambda start: float(np.nan_to_num(np.square(form.function(loss, *start) - error).sum(), nan=INF))
        )
        for start in inside[:MAX_STARTS]:
            found = optimize.least_squares(
                lambda x: form.function(loss, *x) - error, start, bounds=(low, high), x_scale="jac",
                ftol=1e-14, xtol=1e-12, gtol=1e-14, max_nfev=MAX_EVALUATIONS,
            )  # fmt: skip
            if np.isfinite(found.cost) and found.cost < value * (1 - 1e-9):
                best, value = found.x, found.cost
    return best


def tasks_above_chance(scores: Array, chance: Array, margin: float) -> Array:
    """Mask of the tasks (T) that any of the runs (R, T) solves more than `margin` above chance."""
    return np.asarray((scores > chance + margin).any(axis=0))
