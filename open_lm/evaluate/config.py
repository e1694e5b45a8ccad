"""On what and how often a model is evaluated while it trains."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import flag


@dataclass(frozen=True)
class ValidationConfig:
    """Validation"""

    val_data: tuple[str, ...] = flag((), "Shards to measure the held-out loss on: one set each (braces, `::` joins). Alone: evaluate only.")
    val_data_key: tuple[str, ...] = flag((), "Member extension in the shards of each set; none: as each shard holds it.")
    val_names: tuple[str, ...] = flag((), "Name of each set in metrics; none: its --val-data.")
    val_num_samples: int | None = flag(None, "TOKENS (not samples) of each set to use; None: all.")
    val_frequency: int = flag(1, "Checkpoint intervals between two validations; 0: none while training.")
    val_every_steps: int | None = flag(None, "Optimizer steps between two validations; sets --val-frequency aside.")
    global_val_batch_size: int | None = flag(None, "Sequences per validation batch over all ranks; None: --global-batch-size.")
    val_batch_size: int | None = flag(None, "Sequences per validation batch on each rank; sets --global-val-batch-size.")

    def __post_init__(self) -> None:
        for name in ("val_data_key", "val_names"):
            given = len(getattr(self, name))
            if given not in (0, len(self.val_data)) and not (name == "val_data_key" and given == 1):
                spelled = "--" + name.replace("_", "-")
                raise ConfigError(f"{spelled} gives {given} values for {len(self.val_data)} --val-data: give one each, or none.")
        if self.val_every_steps is not None and self.val_every_steps < 1:
            raise ConfigError(f"--val-every-steps {self.val_every_steps} must be at least 1.")

    def key_of(self, index: int) -> str | None:
        """The member extension of set `index`; None: as the shard holds it."""
        return self.val_data_key[min(index, len(self.val_data_key) - 1)] if self.val_data_key else None

    def name_of(self, index: int) -> str:
        """The name of set `index` in metrics and tables."""
        return self.val_names[index] if self.val_names else self.val_data[index]
