"""When checkpoints are written, which are kept, and from which one a run starts."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import flag


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints"""

    resume: str | None = flag(
        None, "Checkpoint (epoch_K.pt) to continue from; `latest` takes the newest complete one of this run, if any."
    )
    pretrained: str | None = flag(
        None,
        "Checkpoint, run folder, exported folder or hf://owner/name to take the weights from; all else starts anew.",
    )
    save_frequency: int = flag(1, "Checkpoint intervals between two checkpoints that are kept; 0 writes only the last.")
    save_most_recent: bool = flag(
        False, "Also write every interval's checkpoint, and drop it when the next is written."
    )
    delete_previous_checkpoint: bool = flag(False, "Keep only the newest checkpoint; the same as --keep-last 1.")
    keep_last: int | None = flag(
        None, "How many checkpoints to keep; older ones go once a new one is verified. None: all."
    )

    def __post_init__(self) -> None:
        if self.resume and self.pretrained:
            raise ConfigError(
                "--resume and --pretrained exclude each other: continue a run, or start one from weights."
            )
        if self.save_frequency < 0:
            raise ConfigError(f"--save-frequency {self.save_frequency} must not be negative.")
        if self.keep_last is not None and self.keep_last < 1:
            raise ConfigError(
                f"--keep-last {self.keep_last} must be at least 1: the newest checkpoint is never deleted."
            )

    @property
    def n_kept(self) -> int | None:
        """How many checkpoints stay; None: all."""
        return 1 if self.delete_previous_checkpoint else self.keep_last
