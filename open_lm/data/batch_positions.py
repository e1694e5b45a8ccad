"""Batch positions: which part of the sample stream each rank reads at each step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from open_lm.data.config import DataConfig
from open_lm.data.plan import (
    DEFAULT_LANES,
    DEFAULT_WINDOW,
    LaneStream,
    Plan,
    ResampledStream,
    Stream,
    choose_lanes,
    share_columns,
)
from open_lm.data.sources import Source
from open_lm.errors import ConfigError


@dataclass(frozen=True)
class BatchPositions:
    """Where batches begin in the stream, and which slice of each is this rank's."""

    global_batch: int
    rank: int
    world_size: int
    skipped: tuple[tuple[int, int], ...] = ()
    first_step: int = 0
    first_position: int = 0

    def __post_init__(self) -> None:
        if self.global_batch % self.world_size:
            raise ConfigError(
                f"--global-batch-size {self.global_batch} does not divide among {self.world_size} ranks. "
                "Choose a multiple of the number of processes."
            )

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
    """Where this rank's batches lie in the stream, with --skip-steps left out."""
    skipped = tuple((first * global_batch, (last + 1) * global_batch) for first, last in config.skipped_ranges())
    return BatchPositions(global_batch, rank, world_size, skipped)


def make_plan(sources: list[Source], config: DataConfig, *, seed: int, global_batch: int) -> Plan:
    """The order of the samples of `sources`."""
    if len(sources) == 1:
        return Plan((_stream(sources[0], config, seed=seed, salt=0, columns=global_batch),))
    weights = config.train_data_mix_weights or tuple(source.n_sequences * source.factor for source in sources)
    pattern = share_columns(weights, max(_row(global_batch), len(sources)))
    columns = np.bincount(pattern).tolist()
    streams = (_stream(source, config, seed=seed, salt=k, columns=columns[k]) for k, source in enumerate(sources))
    return Plan(tuple(streams), pattern)


def _row(columns: int) -> int:
    """The smallest multiple of `columns` that makes a good number of lanes."""
    return columns * -(-DEFAULT_LANES // columns)


def _stream(source: Source, config: DataConfig, *, seed: int, salt: int, columns: int) -> Stream:
    names, counts = [shard.name for shard in source.shards], [shard.n_sequences for shard in source.shards]
    lanes, window = choose_lanes(source.n_sequences, columns)
    kind: type[LaneStream | ResampledStream] = LaneStream
    if config.dataset_resampled:
        kind, lanes, window = ResampledStream, _row(columns), DEFAULT_WINDOW
    lanes = config.shuffle_lanes or lanes
    window = 1 if config.disable_buffer else config.shuffle_window or window
    return kind(names, counts, seed=seed, salt=salt, lanes=lanes, window=window)
