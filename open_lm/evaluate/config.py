"""On what and how often a model is evaluated while it trains."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import flag


@dataclass(frozen=True)
class ValidationConfig:
    """Validation"""

    val_names: tuple[str, ...] = flag((), "Name of each set in metrics; none: its --val-data.")
    val_frequency: int = flag(1, "Checkpoint intervals between two validations; 0: none while training.")
    val_every_steps: int | None = flag(None, "Optimizer steps between two validations; sets --val-frequency aside.")
    global_val_batch_size: int | None = flag(
        None, "Sequences per validation batch over all ranks; None: --global-batch-size."
    )
    val_batch_size: int | None = flag(
        None, "Sequences per validation batch on each rank; sets --global-val-batch-size."
    )

    def __post_init__(self) -> None:
        if self.val_every_steps is not None and self.val_every_steps < 1:
            raise ConfigError(f"--val-every-steps {self.val_every_steps} must be at least 1.")
