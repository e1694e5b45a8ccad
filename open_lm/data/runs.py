"""How samples are shuffled on disk: files sorted by random keys, any part of their merged order read alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from open_lm import storage

N_BINS = 1 << 16


def write_sorted(path: str, samples: np.ndarray, keys: np.ndarray) -> None:
    """One file: the keys in order, then the samples in that order."""
    order = np.argsort(keys, kind="stable")
    with storage.open_atomic(path) as file:
        file.write(keys[order].tobytes())
        for start in range(0, len(order), 4096):
            file.write(samples[order[start : start + 4096]].tobytes())


@dataclass(frozen=True)
class SortedRuns:
    """All samples of a job in their final order, read from the sorted files of its blocks."""

    folder: str
    names: tuple[str, ...]
    counts: tuple[int, ...]
    sample_tokens: int
    dtype: str

    def count_bins(self) -> np.ndarray:
        """How many samples have a key below each of 65536 equal steps: where to look for the n-th sample."""
        bins = np.zeros(N_BINS, np.int64)
        for name, n in zip(self.names, self.counts, strict=True):
            if n:
                bins += np.bincount((self._keys(name, n) >> np.uint64(48)).astype(np.int64), minlength=N_BINS)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(bins)])

    def read(self, start: int, stop: int, below: np.ndarray) -> np.ndarray:
        """Samples `start` to `stop` of the final order; `below` is what `count_bins` gave."""
        low = int(np.searchsorted(below, start, side="right")) - 1
        high = int(np.searchsorted(below, stop, side="left"))
        keys, owners, rows = [], [], []
        for owner, (name, n) in enumerate(zip(self.names, self.counts, strict=True)):
            if not n:
                continue
            mine = self._keys(name, n)
            first = int(np.searchsorted(mine, np.uint64(low << 48)))
            last = n if high >= N_BINS else int(np.searchsorted(mine, np.uint64(high << 48)))
            if last > first:
                keys.append(np.array(mine[first:last]))
                owners.append(np.full(last - first, owner))
                rows.append(np.arange(first, last))
        order = np.argsort(np.concatenate(keys), kind="stable")[start - below[low] : stop - below[low]]
        return self._gather(np.concatenate(owners)[order], np.concatenate(rows)[order])

    def _keys(self, name: str, n: int) -> np.ndarray:
        return np.memmap(os.path.join(self.folder, f"{name}.bin"), np.uint64, "r", 0, (n,))

    def _gather(self, owners: np.ndarray, rows: np.ndarray) -> np.ndarray:
        samples = np.empty((len(rows), self.sample_tokens), self.dtype)
        for owner in np.unique(owners):
            places, name, n = np.flatnonzero(owners == owner), self.names[owner], self.counts[owner]
            path, shape = os.path.join(self.folder, f"{name}.bin"), (n, self.sample_tokens)
            samples[places] = np.memmap(path, self.dtype, "r", 8 * n, shape)[rows[places]]
        return samples
