"""How sure a mean is: its bootstrap interval (Efron 1979), drawn in large blocks.  Shapes: R resamples, N values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS_AT_ONCE = 1 << 22
"""Values drawn in one go: 32 MiB of indices."""


@dataclass(frozen=True)
class Bootstrap:
    """Which intervals are asked for, and how they are drawn."""

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
    sorted_N = values_N.double().sort().values
    means_R = resampled_means(sorted_N, settings.n_resamples, settings.max_population, settings.seed)
    low, high = torch.quantile(means_R, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def resampled_means(values_N: Tensor, n_resamples: int, max_population: int | None, seed: int) -> Tensor:
    """The mean of each resample, (R,)."""
    generator = torch.Generator().manual_seed(seed)
    size = min(len(values_N), max_population or len(values_N))
    rows = max(1, DRAWS_AT_ONCE // size)
    sums_R = torch.zeros(n_resamples, dtype=torch.float64)
    for first in range(0, n_resamples, rows):
        last = min(first + rows, n_resamples)
        for start in range(0, size, DRAWS_AT_ONCE):
            shape = (last - first, min(DRAWS_AT_ONCE, size - start))
            sums_R[first:last] += values_N[torch.randint(len(values_N), shape, generator=generator)].sum(-1)
    return sums_R / size
