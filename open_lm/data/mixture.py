"""Plan of a training stream: the positions of a batch, the source that stands at each, and which of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from open_lm.data.config import DataConfig
from open_lm.data.plan import (
    DEFAULT_BLOCK,
    DEFAULT_STRIPES,
    ResampledStream,
    SampleStream,
    StripedStream,
    StripedStreams,
    choose_stripes,
    together,
)
from open_lm.data.sources import Source
from open_lm.data.split_tree import SplitTree

LEAST_STRIPES = 16
MOST_ERROR = 0.01
"""A source's share of the stream differs from what was asked for by less than this part of it."""
LONGEST_PERIOD = 1 << 18
_LOCATED_TOGETHER = 1024
"""Samples of several small steps located at a time."""


class Samples(NamedTuple):
    """Places of samples: source, shard of it and index in that, int64 arrays of one length, all counted from 0."""

    source: np.ndarray
    shard: np.ndarray
    place: np.ndarray


class Mixture(Protocol):
    """An endless, even interleaving of sources."""

    period: int
    shares: np.ndarray

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position, and the position in that source's own stream."""

    def used(self, end: int) -> np.ndarray:
        """Number of the positions below `end` that each source has."""


class Pattern:
    """A pattern of source numbers that repeats: every batch has the same mix."""

    def __init__(self, columns: np.ndarray, n_sources: int):
        self.columns, self.period = columns, len(columns)
        self.counts = np.bincount(columns, minlength=n_sources)
        self.shares = self.counts / self.period
        order = np.argsort(columns, kind="stable")
        first = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)[:-1]])
        self._before = np.empty(self.period, np.int64)
        self._before[order] = np.arange(self.period) - first[columns[order]]

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row, column = np.divmod(positions, self.period)
        source = self.columns[column]
        return source, row * self.counts[source] + self._before[column]

    def used(self, end: int) -> np.ndarray:
        rows, rest = divmod(end, self.period)
        return rows * self.counts + np.bincount(self.columns[:rest], minlength=len(self.counts))


def make_mixture(weights: Sequence[float], row: int, period: int | None = None) -> Mixture:
    """The shortest pattern from `row` columns up that gives every source its share, or a tree. `period`: of a run that
    began with it."""
    wanted = np.asarray(weights, np.float64) / np.sum(weights)
    if period == 0:
        return SplitTree(weights)
    length = period or max(row, len(weights))
    while length <= max(LONGEST_PERIOD, length if period else 0):
        pattern = Pattern(share_columns(weights, length), len(weights))
        if period or (np.abs(pattern.shares / wanted - 1) < MOST_ERROR).all():
            return pattern
        length *= 2
    return SplitTree(weights)


def share_columns(weights: Sequence[float], period: int) -> np.ndarray:
    """A pattern of `period` source numbers, each source as often as its weight asks (at least once), evenly spread."""
    wanted = np.asarray(weights, np.float64) / np.sum(weights) * period
    counts = np.maximum(1, np.floor(wanted)).astype(np.int64)
    while counts.sum() < period:
        counts[np.argmax(wanted - counts)] += 1
    while counts.sum() > period:
        counts[np.argmax(np.where(counts > 1, counts - wanted, -np.inf))] -= 1
    source = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(period) - np.repeat(np.cumsum(counts) - counts, counts)
    return source[np.lexsort((source, (nth + 0.5) / counts[source]))]


@dataclass(frozen=True)
class Plan:
    """The training stream of all sources: `locate` says which samples stand at given positions."""

    streams: tuple[SampleStream, ...]
    mixture: Mixture = field(default_factory=lambda: Pattern(np.zeros(1, np.int64), 1))
    n_sequences: int | None = None
    """Positions before any source must repeat a sample; None: there is no such end."""
    striped: StripedStreams | None = None
    """All streams as one, where all are striped."""
    _steps: dict[int, tuple[np.ndarray, Samples]] = field(default_factory=dict, compare=False, repr=False)
    """The latest steps located, and those that will probably be asked for next, by their first positions."""

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position, and the position in that source's own stream."""
        if len(self.streams) == 1:
            return np.zeros(len(positions), np.int64), positions
        return self.mixture.split(positions)

    def reader_of(self, positions: np.ndarray, n_readers: int) -> np.ndarray:
        """Reader (of `n_readers`) of each position: whole stripes where there are stripes enough."""
        if n_readers <= 1:
            return np.zeros(len(positions), np.int64)
        source, own = self.split(positions)
        n_stripes = np.array([getattr(stream, "stripes", 1) for stream in self.streams])[source]
        if self.striped is not None:
            stripe = self.striped.stripe_of(source, own)
        else:
            stripe = np.empty_like(own)
            for s in np.unique(source).tolist():
                stripe[source == s] = self.streams[s].stripe_of(own[source == s])
        return np.where(n_stripes < n_readers, own, stripe + source) % n_readers

    def locate(self, positions: np.ndarray) -> Samples:
        """The samples at `positions` (int64, any order)."""
        source, own = self.split(np.asarray(positions, np.int64))
        if self.striped is not None:
            return Samples(source, *self.striped.locate(source, own))
        shard, place = (np.empty(len(own), np.int64) for _ in range(2))
        for s in np.unique(source).tolist():
            here = source == s
            shard[here], place[here] = self.streams[s].locate(own[here])
        return Samples(source, shard, place)

    def locate_step(self, positions: np.ndarray) -> Samples:
        """As `locate`, for one step after the other: those at one distance are located together, for little more than
        one of them costs."""
        if not len(positions):
            return self.locate(positions)
        ready = self._steps.get(int(positions[0]))
        if ready is not None and np.array_equal(ready[0], positions):
            return ready[1]
        last = next(reversed(self._steps.values()))[0] if self._steps else positions
        distance = int(positions[0] - last[0]) if len(positions) == len(last) else 0
        goes_on = distance > 0 and np.array_equal(last + distance, positions)
        most = min(_LOCATED_TOGETHER, self.n_sequences or _LOCATED_TOGETHER)  # in two passes at most
        steps = [positions + k * distance for k in range(max(1, most // len(positions)) if goes_on else 1)]
        columns = (np.split(column, len(steps)) for column in self.locate(np.concatenate(steps)))
        self._steps.clear()
        for step, *part in zip(steps, *columns, strict=True):
            self._steps[int(step[0])] = step, Samples(*part)
        return self._steps[int(positions[0])][1]


def positions_before_repeat(mixture: Mixture, n_sequences: Sequence[int]) -> int:
    """Number of positions before any source must repeat a sample, when source s holds `n_sequences[s]`."""
    if len(n_sequences) == 1:
        return n_sequences[0]
    held = np.asarray(n_sequences, np.int64)
    low, high = 0, 2 * int(held.sum()) + 2
    while low < high:  # the longest stretch that takes no more of any source than it holds
        middle = (low + high + 1) // 2
        low, high = (middle, high) if (mixture.used(middle) <= held).all() else (low, middle - 1)
    return low


@dataclass(frozen=True)
class BatchPositions:
    """Positions of batches in the stream, and this rank's slice of each."""

    global_batch: int
    rank: int
    world_size: int
    skipped: tuple[tuple[int, int], ...] = ()
    first_step: int = 0
    first_position: int = 0

    @property
    def local_batch(self) -> int:
        return self.global_batch // self.world_size

    def consumed(self, step: int) -> int:
        """Sequences of the stream that steps before `step` have used."""
        return self.first_position + (step - self.first_step) * self.global_batch

    def positions_of(self, step: int) -> np.ndarray:
        """The places in the stream of this rank's samples of `step`."""
        start = self.consumed(step) + self.rank * self.local_batch
        return self.shifted(np.arange(start, start + self.local_batch))

    def shifted(self, positions: np.ndarray) -> np.ndarray:
        """`positions` with the skipped ranges [first, end) left out."""
        for first, end in self.skipped:
            positions = np.where(positions >= first, positions + end - first, positions)
        return positions


def make_batch_positions(config: DataConfig, *, global_batch: int, rank: int, world_size: int) -> BatchPositions:
    """Positions of this rank's batches in the stream, without those of --skip-steps."""
    skipped = tuple((first * global_batch, (last + 1) * global_batch) for first, last in config.skipped_ranges)
    return BatchPositions(global_batch, rank, world_size, skipped)


def make_plan(
    sources: list[Source],
    config: DataConfig,
    *,
    seed: int,
    global_batch: int,
    shapes: Sequence[tuple[int, int]] | None = None,
    period: int | None = None,
) -> Plan:
    """The order of the samples of `sources`. `shapes` (stripes and shuffle block of each) and `period` are those of a
    run that began with them."""
    row, counts = _row(global_batch), [source.n_sequences for source in sources]
    weights = config.train_data_mix_weights or tuple(source.n_sequences * source.factor for source in sources)
    alone = len(sources) == 1
    mixture = Pattern(np.zeros(1, np.int64), 1) if alone else make_mixture(weights, row, period)
    n_sequences = None if config.dataset_resampled else positions_before_repeat(mixture, counts)
    fits = 0 < mixture.period <= max(row, len(sources))  # each rank reads the same columns, so whole stripes
    streams = []
    for k, source in enumerate(sources):
        columns = global_batch if alone else int(mixture.used(mixture.period)[k]) if fits else 1
        least = DEFAULT_STRIPES if fits else max(LEAST_STRIPES, round(row * float(mixture.shares[k])))
        streams.append(_stream(source, config, k, seed, columns, least, shapes))
    return Plan(tuple(streams), mixture, n_sequences, together(streams))


def _row(columns: int) -> int:
    """The smallest multiple of `columns` that makes a good number of stripes."""
    return columns * -(-DEFAULT_STRIPES // columns)


def _stream(
    source: Source,
    config: DataConfig,
    salt: int,
    seed: int,
    columns: int,
    least: int,
    shapes: Sequence[tuple[int, int]] | None,
) -> SampleStream:
    names, counts = [shard.name for shard in source.shards], [shard.n_sequences for shard in source.shards]
    stripes, block = choose_stripes(source.n_sequences, columns, least)
    kind: type[StripedStream | ResampledStream] = StripedStream
    if config.dataset_resampled:
        kind, stripes, block = ResampledStream, _row(columns), DEFAULT_BLOCK
    stripes = config.shuffle_lanes or stripes
    block = 1 if config.disable_buffer else config.shuffle_window or block
    if shapes:
        stripes, block = shapes[salt]
    return kind(names, counts, seed=seed, salt=salt, stripes=stripes, shuffle_block=block)
