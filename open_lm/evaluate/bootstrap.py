"""Bootstrap confidence intervals (Efron 1979), drawn in large blocks.  Shapes: R resamples, N values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

DRAWS_AT_ONCE = 1 << 20
"""Values drawn in one go: 8 MiB of indices."""


@dataclass(frozen=True)
class Bootstrap:
    """Confidence intervals that are asked for, and how they are drawn."""

    sequences: bool
    tokens: bool
    n_resamples: int
    max_population: int | None
    seed: int


def interval_95(values_N: Tensor, settings: Bootstrap) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the means of `n_resamples` samples drawn from the values with replacement.

    A sample has as many values as there are, `max_population` at most; fewer than all make the interval wider. The
    same values in any order, hence at any number of ranks, give the same interval.
    """
    sorted_N = np.sort(values_N.float().numpy())
    means_R = resampled_means(sorted_N, settings.n_resamples, settings.max_population, settings.seed)
    low, high = np.percentile(means_R, [2.5, 97.5]).tolist()
    return low, high


def resampled_means(values_N: np.ndarray, n_resamples: int, max_population: int | None, seed: int) -> np.ndarray:
    """The mean of each resample, (R,), in fp64."""
    generator = np.random.default_rng(seed)
    n_values = len(values_N)
    size = min(n_values, max_population or n_values)
    rows = max(1, DRAWS_AT_ONCE // size)
    sums_R = np.zeros(n_resamples)
    for first in range(0, n_resamples, rows):
        last = min(first + rows, n_resamples)
        for start in range(0, size, DRAWS_AT_ONCE):
            shape = (last - first, min(DRAWS_AT_ONCE, size - start))
            sums_R[first:last] += values_N.take(generator.integers(n_values, size=shape)).sum(-1, dtype=np.float64)
    return sums_R / size
