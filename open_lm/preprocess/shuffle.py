"""Stage 2 of making a data set, the shuffle: files sorted by random keys are merged and cut into shards.

Any part of the merged order can be read alone. Where there are many sorted files they are first merged into fewer:
else each shard would read from each block, blocks x shards reads. A sample is read and written once more for each round
of merging, of which there are log(blocks) to the base of 64.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from open_lm import storage
from open_lm.errors import DataError
from open_lm.preprocess.job import Job, Workplace, load_job
from open_lm.preprocess.workers import RunTasks

log = logging.getLogger(__name__)

N_BINS = 1 << 16
FAN_IN = 64
MOST_RUNS = 256
"""So many sorted files may be left."""
_AT_ONCE = 16
_MERGE_BYTES = 64 << 20
_TASK_BYTES = 256 << 20
_LEAST_TASKS = 64
_FEW_BYTES = 128 << 20
"""Shards of so little are written here: starting processes would take longer."""
_TRIES = 3


def write_shards(
    job: Job,
    work: Workplace,
    target: str,
    prefix: str,
    blocks: Mapping[str, Mapping[str, Any]],
    n_workers: int,
    n_writers: int | None,
    run: RunTasks,
) -> list[dict[str, Any]]:
    """Stage 2: the samples of all blocks (records by name) in their final order, as shards in folder or url `target`
    whose names begin with `prefix`; the manifest's rows. `n_writers` None: `n_workers`, or one where there is little.

    Raises:
        DataError: there is not one sample, or shards disappear.
    """
    counts = tuple(record["samples"] for record in blocks.values())
    if not sum(counts):
        raise DataError(
            f"--input-files: all text together makes less than one sample of {job.sample_tokens} tokens. "
            "Give more text or a smaller --seqlen."
        )
    runs = SortedRuns(work.folder, tuple(blocks), counts, job.sample_tokens, job.dtype.str)
    runs = merge_all(job, runs, n_workers, run)
    if not storage.is_remote(target):
        os.makedirs(target, exist_ok=True)
        n_writers = n_writers or (1 if runs.size_bytes < _FEW_BYTES else None)
    names = [prefix + numbered_shard(number) for number in range(-(-sum(counts) // job.shard_size))]
    calls = [
        partial(make_shards, job.fingerprint, runs, target, prefix, bins, first, end)
        for first, end, bins in shard_tasks(job, sum(counts), runs.count_bins())
    ]
    for _ in range(_TRIES):
        run(calls, n_writers or n_workers, label="write shards", total_bytes=runs.size_bytes)
        rows = work.for_each(names, partial(work.sound_shard, target=target))
        if all(rows):
            return [row for row in rows if row]
        log.warning("%s: %s.tar is missing or cut off; made again.", target, names[rows.index(None)])
    raise DataError(f"{target}: written shards disappear. Is something else deleting there?")


class Bins(NamedTuple):
    """Bins `low` to `high` of keys; `n_before` samples have a lower key."""

    low: int
    high: int
    n_before: int


def bins_of(below: np.ndarray, start: int, stop: int) -> Bins:
    """The bins that samples `start` to `stop` of the final order lie in; `below` is what `count_bins` gave."""
    low = int(np.searchsorted(below, start, side="right")) - 1
    return Bins(low, int(np.searchsorted(below, stop, side="left")), int(below[low]))


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

    def read(self, start: int, stop: int, bins: Bins) -> np.ndarray:
        """Samples `start` to `stop` of the final order, which lie in `bins`."""
        low, high, n_before = bins
        owners = [owner for owner, n in enumerate(self.counts) if n]
        found = list(self._for_each(owners, lambda owner: self._keys_between(owner, low, high)))
        keys = np.concatenate([mine for _, mine in found])
        owner_of = np.repeat(owners, [len(mine) for _, mine in found])
        row_of = np.concatenate([first + np.arange(len(mine)) for first, mine in found])
        order = np.argsort(keys, kind="stable")[start - n_before : stop - n_before]
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


def merge_all(job: Job, runs: SortedRuns, n_workers: int, run: RunTasks) -> SortedRuns:
    """The same samples in at most `MOST_RUNS` sorted files."""
    level = 0
    while len(runs.names) > MOST_RUNS:
        parts = [
            replace(runs, names=runs.names[k : k + FAN_IN], counts=runs.counts[k : k + FAN_IN])
            for k in range(0, len(runs.names), FAN_IN)
        ]
        names = tuple(f"merged-{level}-{number:06d}" for number in range(len(parts)))
        calls = [partial(merge, job.fingerprint, part, name) for part, name in zip(parts, names, strict=True)]
        run(calls, n_workers, label="merge", total_bytes=runs.size_bytes)
        runs, level = replace(runs, names=names, counts=tuple(sum(part.counts) for part in parts)), level + 1
    return runs


def merge(job_fingerprint: str, runs: SortedRuns, target: str) -> Iterator[int]:
    """Write one sorted file with the samples of several, if that has not been done; yields the bytes of samples."""
    job, work = load_job(runs.folder, job_fingerprint), Workplace(runs.folder)
    done = work.sound_block(target, job)
    if done:
        yield done["samples"] * job.sample_bytes
        return
    with storage.open_atomic(work.path(f"{target}.bin")) as file:
        for piece in runs.merge():
            file.write(piece)
    work.record(target, {"samples": sum(runs.counts)})
    yield runs.size_bytes


def numbered_shard(number: int) -> str:
    """Eight digits, from 0."""
    return f"{number:08d}"


def shard_tasks(job: Job, n_samples: int, below: np.ndarray) -> Iterator[tuple[int, int, Bins]]:
    """First and last + 1 of shards that are written together (each sorted file is read once for all of them), and the
    bins they lie in; `below` is what `count_bins` gave."""
    n_shards = -(-n_samples // job.shard_size)
    at_once = max(1, _TASK_BYTES // (job.shard_size * job.sample_bytes))
    at_once = min(at_once, max(1, n_shards // _LEAST_TASKS))
    for first in range(0, n_shards, at_once):
        end = min(first + at_once, n_shards)
        yield first, end, bins_of(below, first * job.shard_size, min(end * job.shard_size, n_samples))


def make_shards(
    job_fingerprint: str, runs: SortedRuns, target: str, prefix: str, bins: Bins, first: int, end: int
) -> Iterator[int]:
    """Write shards `first` to `end`, which lie in `bins`, into folder or url `target`, those that are not there; yields
    bytes."""
    job, work = load_job(runs.folder, job_fingerprint), Workplace(runs.folder)
    missing = []
    for number in range(first, end):
        done = work.sound_shard(prefix + numbered_shard(number), target)
        if done:
            yield done["bytes"]
        else:
            missing.append(number)
    if not missing:
        return
    start = missing[0] * job.shard_size
    stop = min((missing[-1] + 1) * job.shard_size, sum(runs.counts))
    samples = runs.read(start, stop, bins)
    for number in missing:
        here = number * job.shard_size - start
        name, mine = prefix + numbered_shard(number), samples[here : here + job.shard_size]
        yield work.write_shard(job, name, target, mine, first_number=number * job.shard_size)
