"""Shuffle on disk: files sorted by random keys; any part of their merged order can be read alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_lm import storage

N_BINS = 1 << 16
_AT_ONCE = 16
_MERGE_BYTES = 64 << 20


def write_sorted(path: str, samples: np.ndarray, keys: np.ndarray, numbers: np.ndarray | None = None) -> None:
    """One file: the keys in order, then the samples in that order. `numbers` says which sample each key is of."""
    order = np.argsort(keys, kind="stable")
    rows = order if numbers is None else numbers[order]
    with storage.open_atomic(path) as file:
        file.write(keys[order].tobytes())
        for start in range(0, len(rows), 4096):
            file.write(samples[rows[start : start + 4096]].tobytes())


@dataclass(frozen=True)
class SortedRuns:
    """All samples of a job in their final order, read from the sorted files of its blocks, which may be remote."""

    folder: str
    names: tuple[str, ...]
    counts: tuple[int, ...]
    sample_tokens: int
    dtype: str

    @property
    def size_bytes(self) -> int:
        """The size of the samples."""
        return sum(self.counts) * self.sample_tokens * np.dtype(self.dtype).itemsize

    def count_bins(self) -> np.ndarray:
        """Number of samples with a key below each of 65536 equal steps: where to look for the n-th sample."""
        bins = np.zeros(N_BINS, np.int64)
        for keys in self._for_each(range(len(self.names)), lambda owner: self._keys(owner, 0, self.counts[owner])):
            bins += np.bincount((keys >> np.uint64(48)).astype(np.int64), minlength=N_BINS)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(bins)])

    def read(self, start: int, stop: int, below: np.ndarray) -> np.ndarray:
        """Samples `start` to `stop` of the final order; `below` is what `count_bins` gave."""
        low = int(np.searchsorted(below, start, side="right")) - 1
        high = int(np.searchsorted(below, stop, side="left"))
        owners = [owner for owner, n in enumerate(self.counts) if n]
        found = list(self._for_each(owners, lambda owner: self._keys_between(owner, low, high)))
        keys = np.concatenate([mine for _, mine in found])
        owner_of = np.repeat(owners, [len(mine) for _, mine in found])
        row_of = np.concatenate([first + np.arange(len(mine)) for first, mine in found])
        order = np.argsort(keys, kind="stable")[start - below[low] : stop - below[low]]
        return self._gather(owner_of[order], row_of[order])

    def merge(self) -> Iterator[bytes]:
        """All keys in order, then all samples in that order, in pieces: the content of one sorted file for all."""
        found = [self._keys(owner, 0, n) for owner, n in enumerate(self.counts)]
        keys = np.concatenate(found) if found else np.zeros(0, np.uint64)
        owners = np.repeat(np.arange(len(self.counts)), self.counts)
        rows = np.concatenate([np.arange(n) for n in self.counts])
        order = np.argsort(keys, kind="stable")
        yield keys[order].tobytes()
        at_once = max(1, _MERGE_BYTES // (self.sample_tokens * np.dtype(self.dtype).itemsize))
        for start in range(0, len(order), at_once):
            mine = order[start : start + at_once]
            yield self._gather(owners[mine], rows[mine]).tobytes()

    def _keys_between(self, owner: int, low: int, high: int) -> tuple[int, np.ndarray]:
        """The keys of bins `low` to `high` and the place of the first: guessed from their even spread, then checked."""
        n = self.counts[owner]
        spare = 8 + 6 * math.isqrt(n)
        start, stop = max(0, n * low // N_BINS - spare), min(n, n * high // N_BINS + spare)
        keys = self._keys(owner, start, stop)
        begins_before = not start or bool(len(keys) and int(keys[0]) >> 48 < low)
        ends_after = stop == n or bool(len(keys) and int(keys[-1]) >> 48 >= high)
        if not (begins_before and ends_after):
            start, keys = 0, self._keys(owner, 0, n)
        first = int(np.searchsorted(keys, np.uint64(low << 48)))
        last = len(keys) if high >= N_BINS else int(np.searchsorted(keys, np.uint64(high << 48)))
        return start + first, keys[first:last]

    def _gather(self, owners: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The samples of `rows`; those of one block lie together, since both orders are that of the keys."""
        samples = np.empty((len(rows), self.sample_tokens), self.dtype)
        present = np.unique(owners).tolist()
        places = [np.flatnonzero(owners == owner) for owner in present]
        spans = [
            (owner, rows[place].min(), rows[place].max() + 1) for owner, place in zip(present, places, strict=True)
        ]
        parts = self._for_each(spans, lambda span: self._samples(*span))
        for place, (_, first, _), part in zip(places, spans, parts, strict=True):
            samples[place] = part[rows[place] - first]
        return samples

    def _for_each(self, items: Iterable[Any], read: Callable[[Any], Any]) -> Iterable[Any]:
        """`read` of each item, in order; several requests at a time where the files are remote."""
        if not storage.is_remote(self.folder):
            yield from map(read, items)
            return
        waiting = list(items)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for start in range(0, len(waiting), 4 * _AT_ONCE):
                yield from pool.map(read, waiting[start : start + 4 * _AT_ONCE])

    def _keys(self, owner: int, start: int, stop: int) -> np.ndarray:
        return np.frombuffer(self._bytes(owner, 8 * start, 8 * stop), np.uint64)

    def _samples(self, owner: int, first: int, last: int) -> np.ndarray:
        size = self.sample_tokens * np.dtype(self.dtype).itemsize
        start = 8 * self.counts[owner] + int(first) * size
        content = self._bytes(owner, start, start + int(last - first) * size)
        return np.frombuffer(content, self.dtype).reshape(-1, self.sample_tokens)

    def _bytes(self, owner: int, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        content = storage.read_range(storage.join(self.folder, f"{self.names[owner]}.bin"), start, stop)
        assert len(content) == stop - start, (self.names[owner], start, stop, len(content))
        return content
