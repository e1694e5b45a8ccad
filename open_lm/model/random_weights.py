"""First values of large weights: numbers that follow from a seed and their place, so that any part can be made alone.

A rank makes its share of a weight without the rest, threads make parts side by side, and all come to the same bits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from math import erf, sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 23
"""Weights with at least so many numbers are made this way; smaller ones from torch's generator, one after the other."""
CHUNK = 1 << 15
"""Numbers from one key of the generator; as many as torch computes with in one thread."""
CUT = 3.0
"""Standard deviations at which the normal distribution is cut."""


class NormalWeight(NamedTuple):
    """A weight of normally distributed numbers, cut at three standard deviations."""

    std: float
    seed: int

    def fill(self, out: Tensor, first: int = 0) -> None:
        """Write the numbers from place `first` of the flattened weight on into `out`, 1-D in fp32 on the CPU."""
        chunks = range(first // CHUNK, -(-(first + len(out)) // CHUNK))
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(lambda number: self._copy_chunk(number, out, first), chunks))

    def _copy_chunk(self, number: int, out: Tensor, first: int) -> None:
        start, stop = max(number * CHUNK, first), min((number + 1) * CHUNK, first + len(out))
        out[start - first : stop - first] = self._chunk(number)[start - number * CHUNK : stop - number * CHUNK]

    def _chunk(self, number: int) -> Tensor:
        """By the inverse of the normal distribution, from uniform numbers of Philox (doi 10.1145/2063384.2063405)."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, number]))
        uniform = torch.from_numpy(generator.random(CHUNK, dtype=np.float32))
        bound = erf(CUT / sqrt(2))
        values = uniform.mul_(2 * bound).sub_(bound).erfinv_().mul_(self.std * sqrt(2))
        return values.clamp_(-CUT * self.std, CUT * self.std)
