"""Batch positions: which places of the stream a rank's share of a step holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from open_lm.data.config import DataConfig
from open_lm.errors import ConfigError


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
    skipped = tuple((first * global_batch, (last + 1) * global_batch) for first, last in config.skipped_ranges)
    return BatchPositions(global_batch, rank, world_size, skipped)
