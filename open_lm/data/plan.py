"""The order of one source's samples: a pure function of names, counts and seed.

Words: a *source* is a list of shards; its stream runs through all its samples (one *pass*), then through all of
them again in another order, for ever. A *stripe* is a stretch of a pass that one reader walks through; a *shuffle
block* is the piece of a stripe inside which samples are permuted. `docs/data.md` draws it. Nothing here knows ranks
or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from open_lm.data.permutations import STRIDE, Permutations, argsort, identity, key, mix

ORDER = "lanes-1"
"""Name of the order this file implements; a checkpoint made with another one is refused."""

DEFAULT_STRIPES = 1024
DEFAULT_BLOCK = 256
SMALL_BLOCK = 64
LEAST_BLOCK = 16
ONE_STRIPE_SEQUENCES = 16_384
"""A source up to this size is one stripe and one shuffle block: a true permutation in every pass."""


class SampleStream(Protocol):
    """An endless order of one source's samples."""

    def stripe_of(self, positions: np.ndarray) -> np.ndarray:
        """The stripe of each position; a reader of one stripe walks through neighbouring samples."""

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and index inside the shard of the samples at `positions`."""


def choose_stripes(n_sequences: int, columns: int, least: int = DEFAULT_STRIPES) -> tuple[int, int]:
    """Stripes and shuffle block of a source that fills `columns` columns of a batch.

    Many of both for a good shuffle, fewer when there is little data. Big data: the smallest multiple of `columns` from
    `least` up, blocks of 256. A stripe holds at least four blocks; to keep that, first the block shrinks to 64, then
    the stripes to `columns`, then the block again. Where less than 16 would be left, the source is one permutation.
    """
    if n_sequences <= ONE_STRIPE_SEQUENCES:
        return 1, max(1, n_sequences)
    stripes = columns * -(-least // columns)
    fits = n_sequences // (4 * SMALL_BLOCK)
    stripes = min(stripes, max(columns, fits // columns * columns))
    block = min(DEFAULT_BLOCK, n_sequences // (4 * stripes))
    return (stripes, block) if block >= LEAST_BLOCK else (1, n_sequences)


def _coprime_near(fraction: float, n: int) -> int:
    """The first number from `fraction` of `n` upwards that has no factor in common with `n`."""
    return next(k for k in range(max(1, int(n * fraction)), 2 * n + 1) if math.gcd(k, n) == 1)


class StripedStream:
    """Every sample exactly once per pass, in an order that differs from pass to pass.

    Shards in the order of a hash are laid one after the other and cut into `stripes` stretches of equal length (to one
    sample); row j of the stream is the j-th sample of every stripe; samples are permuted inside shuffle blocks of a
    stripe. Neighbours in a row are stripes far apart, so that a batch smaller than a row is drawn from the whole pass.
    """

    def __init__(
        self, names: Sequence[str], counts: Sequence[int], *, seed: int, salt: int, stripes: int, shuffle_block: int
    ):
        assert len(names) == len(counts) and stripes >= 1 and shuffle_block >= 1, (len(names), stripes, shuffle_block)
        self.seed, self.salt, self.stripes, self._names = seed, salt, stripes, names
        self.counts = np.asarray(counts, np.int64)
        self.n_sequences = int(self.counts.sum())
        self.shuffle_block = min(shuffle_block, max(1, -(-self.n_sequences // stripes)))
        self.by_name = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
        self.by_name = self.by_name[self.counts[self.by_name] > 0]
        self.spread = _coprime_near(0.6180339887, stripes)
        self._alone: StripedStreams | None = None

    def stripe_of(self, positions: np.ndarray) -> np.ndarray:
        return self._mine().stripe_of(np.zeros_like(positions), positions)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._mine().locate(np.zeros_like(positions), positions)

    def _mine(self) -> StripedStreams:
        self._alone = self._alone or StripedStreams((self,))
        return self._alone

    @cached_property
    def _identities(self) -> np.ndarray:
        return np.array([identity(self._names[k]) for k in self.by_name], np.uint64)

    def pass_order(self, number: int) -> tuple[np.ndarray, np.ndarray, np.uint64]:
        """The shards of pass `number` in order, the place where each begins, and what the keys of all its stripes are
        made of; empty shards are left out."""
        hashes = mix(self._identities ^ key("shards", self.seed, self.salt, number))
        shards = self.by_name[argsort(hashes)]
        starts = np.cumsum(self.counts[shards])
        starts[1:], starts[:1] = starts[:-1].copy(), 0
        return shards, starts, key("lane", self.seed, self.salt, number)


class StripedStreams:
    """The streams of many sources as one: positions in any of them are located together."""

    def __init__(self, streams: Sequence[StripedStream]):
        self._streams = tuple(streams)
        self._n = np.array([max(1, s.n_sequences) for s in streams], np.int64)
        self._stripes = np.array([s.stripes for s in streams], np.int64)
        self._block = np.array([s.shuffle_block for s in streams], np.int64)
        self._spread = np.array([s.spread for s in streams], np.int64)
        self._in_one_block = -(-self._n // self._stripes) <= self._block
        sizes = [len(s.by_name) for s in streams]
        self._first_place = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._n)[:-1]])
        self._first_shard = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self._held, self._held_keys = np.full(len(streams), -1, np.int64), np.zeros(len(streams), np.uint64)
        self._order = np.zeros(sum(sizes), np.int64)
        self._starts = np.repeat(self._first_place, sizes)
        for number in range(len(streams)):  # most runs begin, and stay, in the first pass
            self._hold(number, 0)
        self._permutations = {width: Permutations(width) for width in set(self._block.tolist())}

    def stripe_of(self, source: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The stripe of each position `own` of its source."""
        at = self._columns(source)
        return self._rows(own % self._n[at], at)[1]

    def locate(self, source: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard of its source, and index inside it, of each sample at position `own` of its source."""
        at = self._columns(source)
        pass_number, inside = np.divmod(own, self._n[at])
        ready = self._ready(source, pass_number)
        if not ready.all():
            return self._in_two(ready, source, own)
        row, stripe = self._rows(inside, at)
        start = stripe * self._n[at] // self._stripes[at]
        length = (stripe + 1) * self._n[at] // self._stripes[at] - start
        place = self._first_place[at] + start + self._shuffled(at, stripe, row, length)
        found = np.searchsorted(self._starts, place, side="right") - 1
        return self._order[found], place - self._starts[found]

    def _ready(self, source: np.ndarray, pass_number: np.ndarray) -> np.ndarray:
        """True where the source holds the requested pass: each holds the first that is requested."""
        stale = np.flatnonzero(self._held[source] != pass_number)
        if len(stale):
            places = zip(source[stale].tolist(), pass_number[stale].tolist(), strict=True)
            for s, number in dict(reversed(list(places))).items():
                self._hold(s, number)
        return self._held[source] == pass_number

    def _in_two(self, first: np.ndarray, source: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`locate` in two parts, since some source is at two of its passes."""
        shard, index = np.empty_like(own), np.empty_like(own)
        for part in (first, ~first):
            shard[part], index[part] = self.locate(source[part], own[part])
        return shard, index

    def _columns(self, source: np.ndarray) -> np.ndarray | int:
        """The index into the columns of all sources: their only row, where there is one source."""
        return source if len(self._streams) > 1 else 0

    def _rows(self, inside: np.ndarray, at: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Row and stripe of places inside a pass; the last row holds only the stripes that have one sample more."""
        stripes = self._stripes[at]
        full_rows, longer = np.divmod(self._n[at], stripes)
        row, column = np.divmod(inside, stripes)
        stripe = column * self._spread[at] % stripes
        in_last = row >= full_rows
        if in_last.any():
            stripe = np.where(in_last, -(-(column + 1) * stripes // np.maximum(longer, 1)) - 1, stripe)
        return row, stripe

    def _shuffled(self, at: np.ndarray | int, stripe: np.ndarray, row: np.ndarray, length: np.ndarray) -> np.ndarray:
        block = self._block[at]
        keys = mix(self._held_keys[at] ^ mix(stripe.astype(np.uint64)))
        cut = (keys % np.asarray(block, np.uint64)).astype(np.int64) + 1
        first = np.where(self._in_one_block[at], block, cut)  # the first block is cut short, elsewhere in each stripe
        number = np.maximum(0, 1 + (row - first) // block)
        start = np.maximum(0, first + (number - 1) * block)
        end = np.minimum(first + number * block, length)
        keys = mix(keys + number.astype(np.uint64) * STRIDE)
        if len(self._permutations) == 1:
            (one,) = self._permutations.values()
            return start + one.permuted(keys, end - start, row - start)
        places = np.empty_like(row)
        for width in np.unique(block).tolist():
            here = block == width
            found = self._permutations[width].permuted(keys[here], (end - start)[here], (row - start)[here])
            places[here] = start[here] + found
        return places

    def _hold(self, source: int, number: int) -> None:
        """Compute and hold the order of pass `number` of one source, instead of the pass it held."""
        mine = slice(int(self._first_shard[source]), int(self._first_shard[source + 1]))
        order, starts, stripes_key = self._streams[source].pass_order(number)
        self._order[mine], self._starts[mine] = order, self._first_place[source] + starts
        self._held[source], self._held_keys[source] = number, stripes_key


def together(streams: Sequence[SampleStream]) -> StripedStreams | None:
    """All streams as one, with the order of their first pass computed; None where one of them is not striped."""
    striped = [stream for stream in streams if isinstance(stream, StripedStream)]
    return StripedStreams(striped) if len(striped) == len(streams) else None


class ResampledStream:
    """Shards drawn with replacement for ever, all samples of a drawn shard used: `--dataset-resampled`.

    The k-th shard of stripe l is a hash of (seed, l, k), so it does not depend on who reads it.
    """

    def __init__(
        self, names: Sequence[str], counts: Sequence[int], *, seed: int, salt: int, stripes: int, shuffle_block: int
    ):
        by_name = sorted((k for k in range(len(names)) if counts[k] > 0), key=names.__getitem__)
        self._shards = np.array(by_name, np.int64)
        self.counts = np.asarray(counts, np.int64)
        self.stripes, self.shuffle_block = stripes, shuffle_block
        self._key = key("draws", seed, salt)
        self._draws: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._permutations = Permutations(shuffle_block)

    def stripe_of(self, positions: np.ndarray) -> np.ndarray:
        return positions % self.stripes

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        row, stripe = np.divmod(positions, self.stripes)
        stripe_keys = mix(self._key ^ mix(stripe.astype(np.uint64)))
        number = row // self.shuffle_block
        full = np.full(len(stripe), self.shuffle_block)
        keys = mix(stripe_keys + number.astype(np.uint64) * STRIDE)
        inside = self._permutations.permuted(keys, full, row % self.shuffle_block)
        place = number * self.shuffle_block + inside
        shard, index = np.empty_like(place), np.empty_like(place)
        for k, (one_stripe, at) in enumerate(zip(stripe.tolist(), place.tolist(), strict=True)):
            drawn, starts = self._drawn(one_stripe, at, stripe_keys[k])
            nth = int(np.searchsorted(starts, at, side="right")) - 1
            shard[k], index[k] = drawn[nth], at - starts[nth]
        return shard, index

    def _drawn(self, stripe: int, place: int, stripe_key: np.uint64) -> tuple[np.ndarray, np.ndarray]:
        """The shards drawn for `stripe`, at least up to `place`, and where each begins."""
        if stripe in self._draws and self._draws[stripe][1][-1] > place:
            return self._draws[stripe]
        n_draws = 8 if stripe not in self._draws else 2 * len(self._draws[stripe][0])
        while True:
            hashes = mix(stripe_key ^ mix(np.arange(1, n_draws + 1, dtype=np.uint64)))
            drawn = self._shards[(hashes % np.uint64(len(self._shards))).astype(np.int64)]
            starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts[drawn])])
            if starts[-1] > place:
                self._draws[stripe] = drawn, starts[:-1] if starts[-2] > place else starts
                return self._draws[stripe]
            n_draws *= 2
