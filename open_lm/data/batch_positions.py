"""Batch positions: which places of the stream a rank's share of a step holds, and the plan the flags ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from open_lm.data.config import DataConfig
from open_lm.data.mixture import Plan, make_mixture
from open_lm.data.plan import (
    DEFAULT_BLOCK,
    DEFAULT_STRIPES,
    ResampledStream,
    SampleStream,
    StripedStream,
    choose_stripes,
)
from open_lm.data.sources import Source
from open_lm.errors import ConfigError

LEAST_STRIPES = 16


@dataclass(frozen=True)
class BatchPositions:
    """Positions of batches in the stream, and this rank's slice of each."""

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
    """Positions of this rank's batches in the stream, without those of --skip-steps."""
    skipped = tuple((first * global_batch, (last + 1) * global_batch) for first, last in config.skipped_ranges())
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
    row = _row(global_batch)
    if len(sources) == 1:
        return Plan((_stream(sources[0], config, 0, seed, global_batch, DEFAULT_STRIPES, shapes),)).opened()
    weights = config.train_data_mix_weights or tuple(source.n_sequences * source.factor for source in sources)
    mixture = make_mixture(weights, row, period)
    fits = 0 < mixture.period <= max(row, len(sources))  # each rank reads the same columns, so whole stripes
    streams = []
    for k, source in enumerate(sources):
        columns = int(mixture.used(mixture.period)[k]) if fits else 1
        least = DEFAULT_STRIPES if fits else max(LEAST_STRIPES, round(row * float(mixture.shares[k])))
        streams.append(_stream(source, config, k, seed, columns, least, shapes))
    return Plan(tuple(streams), mixture).opened()


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
