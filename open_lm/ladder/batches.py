"""Batch and devices of a ladder run: the target batch rounded to what a mesh of devices can hold."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError

BATCH_TOLERANCE = 0.10
"""Relative distance of a batch from its target above which a plan warns."""


@dataclass(frozen=True)
class DeviceMeshSpec:
    """The smallest mesh that a size runs on; more devices are added in multiples of it, data-parallel.

    `dp_world_size` None: all of `world_size` is data-parallel.
    """

    world_size: int = 1
    dp_world_size: int | None = None

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.min_dp < 1 or self.world_size % self.min_dp:
            raise ConfigError(
                f"device mesh of {self.world_size} devices, {self.min_dp} of them data-parallel: "
                "give positive numbers, the second a divisor of the first."
            )

    @property
    def min_dp(self) -> int:
        """Data-parallel ranks of the smallest mesh."""
        return self.dp_world_size or self.world_size


@dataclass(frozen=True)
class BatchPlan:
    """The batch of a run, in tokens, and how devices share it."""

    target_tokens: int
    tokens: int
    rank_microbatch_tokens: int
    devices: int
    dp_world_size: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank in one optimizer step."""
        return self.tokens // (self.rank_microbatch_tokens * self.dp_world_size)

    @property
    def deviation(self) -> float:
        """Relative distance from the target."""
        return abs(self.tokens - self.target_tokens) / self.target_tokens


def plan_batch(
    target_tokens: int, rank_microbatch_tokens: int, mesh: DeviceMeshSpec, max_devices: int, sequence_length: int = 1
) -> BatchPlan:
    """The batch nearest to `target_tokens` that fills whole micro-batches on as many devices as it can use.

    A micro-batch is whole sequences, at least one, and no larger than the target.

    Raises:
        ConfigError: `max_devices` is below the smallest mesh of the size.
    """
    if max_devices < mesh.world_size:
        raise ConfigError(
            f"max_devices {max_devices} in the ladder file: this size needs at least {mesh.world_size}. Raise it."
        )
    sequences = min(rank_microbatch_tokens, target_tokens) // sequence_length
    microbatch = max(1, sequences) * sequence_length
    smallest = microbatch * mesh.min_dp
    batch = max(1, round(target_tokens / smallest)) * smallest
    expansion = min(max_devices // mesh.world_size, batch // smallest)
    whole = smallest * expansion
    batch = max(1, round(batch / whole)) * whole
    return BatchPlan(target_tokens, batch, microbatch, mesh.world_size * expansion, mesh.min_dp * expansion)
