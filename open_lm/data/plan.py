"""Data order: which sample stands at which position of the stream; a pure function of manifests, weights, seed.

Words: a *source* is a list of shards; its stream runs through all its samples (one *pass*), then through all of
them again in another order, for ever. A *lane* is a stretch of a pass that one reader walks through; a *window* is
the piece of a lane inside which samples are permuted. `docs/data.md` draws it. Nothing here knows ranks or files.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

ORDER = "lanes-1"
"""Name of the order this file implements; a checkpoint made with another one is refused."""

DEFAULT_LANES = 1024
DEFAULT_WINDOW = 256
SMALL_WINDOW = 64
ONE_LANE_SEQUENCES = 16_384
"""A source up to this size is one lane and one window: a true permutation in every pass."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_STRIDE = np.uint64(0xD1B54A32D192ED03)
_LAST = np.uint64(0xFFFFFFFFFFFFFFFF)
_KEPT_WINDOW_VALUES = 4 << 20


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: uint64 in, scattered uint64 out. Fixed for ever; numpy's own generators may change."""
    x = values + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: object) -> np.uint64:
    """64 bits that stand for a readable tuple."""
    return np.uint64(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little"))


def identity(name: str) -> int:
    """64 bits that stand for a shard, whatever its place in the manifest."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Samples(NamedTuple):
    """Where samples lie: source, shard of it and place in that, int64 arrays of one length, all counted from 0."""

    source: np.ndarray
    shard: np.ndarray
    place: np.ndarray


class Stream(Protocol):
    """An endless order of one source's samples."""

    def lane_of(self, positions: np.ndarray) -> np.ndarray:
        """The lane each position belongs to; a reader of one lane walks through neighbouring samples."""

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and index inside the shard of the samples at `positions`."""


def choose_lanes(n_sequences: int, global_batch: int) -> tuple[int, int]:
    """Lanes and window for a source: many of both for a good shuffle, fewer when there is little data.

    Big data: the smallest multiple of the batch from 1024 up, windows of 256. A lane holds at least four windows;
    to keep that, first the window shrinks to 64, then the lanes to the batch, then the window again.
    """
    if n_sequences <= ONE_LANE_SEQUENCES:
        return 1, max(1, n_sequences)
    lanes = global_batch * -(-DEFAULT_LANES // global_batch)
    fits = n_sequences // (4 * SMALL_WINDOW)
    lanes = min(lanes, max(global_batch, fits // global_batch * global_batch))
    return lanes, min(DEFAULT_WINDOW, max(1, n_sequences // (4 * lanes)))


def _coprime_near(fraction: float, n: int) -> int:
    """The first number from `fraction` of `n` upwards that has no factor in common with `n`."""
    return next(k for k in range(max(1, int(n * fraction)), 2 * n + 1) if math.gcd(k, n) == 1)


class _Windows:
    """Permutations of windows, computed many at a time and kept while their lanes walk through them."""

    def __init__(self, window: int):
        self.window = window
        self._kept: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._room = max(4, _KEPT_WINDOW_VALUES // window)

    def permuted(self, ids: np.ndarray, keys: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Where window `ids[k]` (rows of pass, lane, window) of `lengths[k]` puts its place `offsets[k]`."""
        names = list(map(tuple, ids.tolist()))
        missing = [k for k, name in enumerate(dict.fromkeys(names)) if name not in self._kept]
        if missing:
            first = {name: k for k, name in reversed(list(enumerate(names)))}
            self._compute([n for n in first if n not in self._kept], first, keys, lengths)
        found = np.fromiter(
            (self._kept[name][offset] for name, offset in zip(names, offsets.tolist(), strict=True)),
            np.int64,
            len(names),
        )
        while len(self._kept) > self._room:
            self._kept.popitem(last=False)
        return found

    def _compute(
        self,
        names: list[tuple[int, int, int]],
        first: dict[tuple[int, int, int], int],
        keys: np.ndarray,
        lengths: np.ndarray,
    ) -> None:
        places = np.arange(self.window, dtype=np.uint64)
        for start in range(0, len(names), 1024):
            part = names[start : start + 1024]
            rows = np.array([first[name] for name in part])
            hashes = mix(keys[rows, None] + places * _STRIDE)
            hashes[places >= lengths[rows, None].astype(np.uint64)] = _LAST
            order = np.argsort(hashes, axis=1, kind="stable").astype(np.uint16 if self.window <= 65536 else np.uint32)
            self._kept.update(zip(part, order, strict=True))


class LaneStream:
    """Every sample exactly once per pass, in an order that differs from pass to pass.

    Shards in the order of a hash are laid one after the other and cut into `lanes` stretches of equal length (to one
    sample); row j of the stream is the j-th sample of every lane; samples are permuted inside windows of a lane.
    Neighbours in a row are lanes far apart, so that a batch smaller than a row is drawn from the whole pass.
    """

    def __init__(self, names: Sequence[str], counts: Sequence[int], *, seed: int, salt: int, lanes: int, window: int):
        assert len(names) == len(counts) and lanes >= 1 and window >= 1, (len(names), len(counts), lanes, window)
        self.seed, self.salt, self.lanes = seed, salt, lanes
        self.counts = np.asarray(counts, np.int64)
        self.n_sequences = int(self.counts.sum())
        self.window = min(window, max(1, -(-self.n_sequences // lanes)))
        self._by_name = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
        self._identities = np.array([identity(names[k]) for k in self._by_name], np.uint64)
        self._spread = _coprime_near(0.6180339887, lanes)
        self._passes: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows = _Windows(self.window)

    def lane_of(self, positions: np.ndarray) -> np.ndarray:
        return self._rows(positions % self.n_sequences)[1]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pass_number, inside = np.divmod(positions, self.n_sequences)
        row, lane = self._rows(inside)
        place = lane * self.n_sequences // self.lanes + self._shuffled(pass_number, lane, row)
        shard, index = np.empty_like(place), np.empty_like(place)
        for number in np.unique(pass_number):
            here = pass_number == number
            order, starts = self._pass(int(number))
            at = np.searchsorted(starts, place[here], side="right") - 1
            shard[here], index[here] = order[at], place[here] - starts[at]
        return shard, index

    def _rows(self, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and lane of places inside a pass; the last row holds only the lanes that have one sample more."""
        full_rows, longer = divmod(self.n_sequences, self.lanes)
        row, column = np.divmod(inside, self.lanes)
        lane = column * self._spread % self.lanes
        if not longer:
            return row, lane
        kth_longer = -(-(column + 1) * self.lanes // longer) - 1
        return row, np.where(row < full_rows, lane, kth_longer)

    def _shuffled(self, pass_number: np.ndarray, lane: np.ndarray, row: np.ndarray) -> np.ndarray:
        lane_keys = self._lane_keys(pass_number, lane)
        length = (lane + 1) * self.n_sequences // self.lanes - lane * self.n_sequences // self.lanes
        whole = -(-self.n_sequences // self.lanes) <= self.window
        first = self.window if whole else (lane_keys % np.uint64(self.window)).astype(np.int64) + 1
        number = np.where(row < first, 0, 1 + (row - first) // self.window)
        start = np.where(number == 0, 0, first + (number - 1) * self.window)
        end = np.minimum(np.where(number == 0, first, start + self.window), length)
        ids = np.stack([pass_number, lane, number], axis=1)
        window_keys = mix(lane_keys + number.astype(np.uint64) * _STRIDE)
        return start + self._windows.permuted(ids, window_keys, end - start, row - start)

    def _lane_keys(self, pass_number: np.ndarray, lane: np.ndarray) -> np.ndarray:
        keys = np.empty(len(lane), np.uint64)
        for number in np.unique(pass_number):
            here = pass_number == number
            keys[here] = mix(key("lane", self.seed, self.salt, int(number)) ^ mix(lane[here].astype(np.uint64)))
        return keys

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of pass `number` in order, and the place where each begins; empty shards are left out."""
        if number not in self._passes:
            hashes = mix(self._identities ^ key("shards", self.seed, self.salt, number))
            order = self._by_name[np.argsort(hashes, kind="stable")]
            order = order[self.counts[order] > 0]
            starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts[order])[:-1]])
            self._passes[number] = order, starts
            while len(self._passes) > 3:
                self._passes.popitem(last=False)
        return self._passes[number]


class ResampledStream:
    """Shards drawn with replacement for ever, all samples of a drawn shard used: `--dataset-resampled`.

    The k-th shard of lane l is a hash of (seed, l, k), so it does not depend on who reads it.
    """

    def __init__(self, names: Sequence[str], counts: Sequence[int], *, seed: int, salt: int, lanes: int, window: int):
        by_name = sorted((k for k in range(len(names)) if counts[k] > 0), key=names.__getitem__)
        self._shards = np.array(by_name, np.int64)
        self.counts = np.asarray(counts, np.int64)
        self.lanes, self.window = lanes, window
        self._key = key("draws", seed, salt)
        self._draws: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows = _Windows(window)

    def lane_of(self, positions: np.ndarray) -> np.ndarray:
        return positions % self.lanes

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row, lane = np.divmod(positions, self.lanes)
        lane_keys = mix(self._key ^ mix(lane.astype(np.uint64)))
        number = row // self.window
        ids = np.stack([np.zeros_like(lane), lane, number], axis=1)
        full = np.full(len(lane), self.window)
        keys = mix(lane_keys + number.astype(np.uint64) * _STRIDE)
        place = number * self.window + self._windows.permuted(ids, keys, full, row % self.window)
        shard, index = np.empty_like(place), np.empty_like(place)
        for k, (one_lane, at) in enumerate(zip(lane.tolist(), place.tolist(), strict=True)):
            drawn, starts = self._drawn(one_lane, at, lane_keys[k])
            nth = int(np.searchsorted(starts, at, side="right")) - 1
            shard[k], index[k] = drawn[nth], at - starts[nth]
        return shard, index

    def _drawn(self, lane: int, place: int, lane_key: np.uint64) -> tuple[np.ndarray, np.ndarray]:
        """The shards drawn for `lane`, at least up to `place`, and where each begins."""
        if lane in self._draws and self._draws[lane][1][-1] > place:
            return self._draws[lane]
        n_draws = 8 if lane not in self._draws else 2 * len(self._draws[lane][0])
        while True:
            hashes = mix(lane_key ^ mix(np.arange(1, n_draws + 1, dtype=np.uint64)))
            drawn = self._shards[(hashes % np.uint64(len(self._shards))).astype(np.int64)]
            starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts[drawn])])
            if starts[-1] > place:
                self._draws[lane] = drawn, starts[:-1] if starts[-2] > place else starts
                return self._draws[lane]
            n_draws *= 2


@dataclass(frozen=True)
class Plan:
    """The training stream of all sources: `locate` says which samples stand at given positions.

    Position P belongs to the source that a fixed pattern names for column P mod period, so every batch has the same
    mix; inside its source it is the next one of that source's own stream.
    """

    streams: tuple[Stream, ...]
    pattern: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    @property
    def shares(self) -> list[float]:
        """The part of the stream that each source really gets."""
        return (self.columns / len(self.pattern)).tolist()

    @property
    def columns(self) -> np.ndarray:
        return np.bincount(self.pattern, minlength=len(self.streams))

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position, and the position in that source's own stream."""
        row, column = np.divmod(positions, len(self.pattern))
        source = self.pattern[column]
        before = np.zeros(len(self.pattern), np.int64)
        for s in range(len(self.streams)):
            before[self.pattern == s] = np.arange(self.columns[s])
        return source, row * self.columns[source] + before[column]

    def reader_of(self, positions: np.ndarray, n_readers: int) -> np.ndarray:
        """Which of `n_readers` reads each position: whole lanes where there are lanes enough."""
        if n_readers <= 1:
            return np.zeros(len(positions), np.int64)
        source, own = self.split(positions)
        reader = np.empty_like(own)
        for s, stream in enumerate(self.streams):
            here = source == s
            lane = stream.lane_of(own[here])
            reader[here] = (own[here] if getattr(stream, "lanes", 1) < n_readers else lane + s) % n_readers
        return reader

    def locate(self, positions: np.ndarray) -> Samples:
        """The samples at `positions` (int64, any order)."""
        source, own = self.split(np.asarray(positions, np.int64))
        shard, place = (np.empty(len(own), np.int64) for _ in range(2))
        for s, stream in enumerate(self.streams):
            here = source == s
            if here.any():
                shard[here], place[here] = stream.locate(own[here])
        return Samples(source, shard, place)

    def length(self, n_sequences: Sequence[int]) -> int:
        """How many positions pass before any source must repeat a sample, when source s holds `n_sequences[s]`."""
        period = len(self.pattern)
        ends = []
        for s, n in enumerate(n_sequences):
            own_columns = np.flatnonzero(self.pattern == s)
            row, rest = divmod(n, len(own_columns))
            ends.append(row * period + int(own_columns[rest]))
        return min(ends)


def share_columns(weights: Sequence[float], period: int) -> np.ndarray:
    """A pattern of `period` source numbers, each source as often as its weight asks (at least once), evenly spread."""
    wanted = np.asarray(weights, np.float64) / np.sum(weights) * period
    counts = np.maximum(1, np.floor(wanted)).astype(np.int64)
    while counts.sum() < period:
        counts[np.argmax(wanted - counts)] += 1
    while counts.sum() > period:
        counts[np.argmax(np.where(counts > 1, counts - wanted, -np.inf))] -= 1
    places = [((k + 0.5) / counts[s], s) for s in range(len(counts)) for k in range(counts[s])]
    return np.array([s for _, s in sorted(places)], np.int64)
