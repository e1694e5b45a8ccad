"""Samples by position: planned ones from shards, or random ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from open_lm import storage
from open_lm.data.mixture import Plan, Samples
from open_lm.data.permutations import key, mix
from open_lm.data.reader import SampleReader
from open_lm.data.rows import SampleRows, read_checksum, shard_ids


class PlannedSamples:
    """Samples by position: the plan says which, the reader gets them."""

    def __init__(self, plan: Plan, reader: SampleReader):
        self.plan, self.reader = plan, reader
        self.sample_tokens = reader.sample_tokens
        self.reads_remote = any(storage.is_remote(shard.url) for shard in reader.shards)
        self._last: tuple[np.ndarray, Samples] | None = None

    def __call__(self, positions: np.ndarray) -> SampleRows:
        found = self._locate(positions)
        return self.reader.read(found.source, found.shard, found.place, positions)

    def _locate(self, positions: np.ndarray) -> Samples:
        """Without workers a step is located once, though it is read and checked."""
        if self._last is None or not np.array_equal(self._last[0], positions):
            self._last = positions, self.plan.locate(positions)
        return self._last[1]

    def expected_checksum(self, positions: np.ndarray) -> int:
        """The expected `read_checksum` of the samples at these positions."""
        return self.reader.expected_checksum(*self._locate(positions))

    def describe(self, position: np.ndarray) -> str:
        """The sample at one position, for people."""
        found = self.plan.locate(position)
        shard = self.reader.shards[int(self.reader.numbers(found.source, found.shard)[0])]
        return f"shard {storage.shown(shard.url)}, sample {int(found.place[0])}"

    def fetch_ahead(self, positions: np.ndarray) -> None:
        """Have the blocks of these positions fetched in the background."""
        self.reader.fetch_ahead(*self.plan.locate(positions))


@dataclass(frozen=True)
class SyntheticSamples:
    """Random ids, a hash of seed and place: for measuring speed and trying settings without data."""

    vocab_size: int
    seq_len: int
    seed: int
    reads_remote = False

    @property
    def sample_tokens(self) -> int:
        return self.seq_len + 1

    def expected_checksum(self, positions: np.ndarray) -> int:
        """That of one shard, which nobody reads."""
        return read_checksum(shard_ids([""]), positions)

    def __call__(self, positions: np.ndarray) -> SampleRows:
        places = positions[:, None] * (self.seq_len + 1) + np.arange(self.seq_len + 1)
        hashes = mix(places.astype(np.uint64) ^ key("synthetic", self.seed))
        return SampleRows((hashes % np.uint64(self.vocab_size)).astype(np.int32), [], self.expected_checksum(positions))

    def stripe_of(self, positions: np.ndarray) -> np.ndarray:
        return positions

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(positions), positions
