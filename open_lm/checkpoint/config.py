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
    save_every_steps: int | None = flag(None, "Also write a checkpoint every so many steps.", least=1)
    save_every_minutes: float | None = flag(
        None, "Also write a checkpoint when so many minutes have passed since the last one.", above=0
    )
    save_at_steps: tuple[str, ...] = flag(
        (),
        "Also write a checkpoint after these steps (100,1000 or 100 1000), which is never deleted and not counted by "
        "--keep-last.",
        metavar="STEPS",
    )
    ephemeral_every_steps: int | None = flag(
        None, "Also write a checkpoint every so many steps that is dropped when the next one is complete.", least=1
    )
    keep_last: int | None = flag(
        None,
        "How many checkpoints to keep, those at the ends of intervals and those of --save-every-* counted apart; older "
        "ones go once a new one is complete. None: all.",
        least=1,
    )

    def __post_init__(self) -> None:
        if self.resume and self.pretrained:
            raise ConfigError(
                "--resume and --pretrained exclude each other: continue a run, or start one from weights."
            )
        if self.save_frequency < 0:
            raise ConfigError(f"--save-frequency {self.save_frequency} must not be negative.")
        if not all(word.strip().isdigit() and int(word) for word in self._at_steps_words()):
            raise ConfigError(f"--save-at-steps {' '.join(self.save_at_steps)}: give steps, counted from 1: 100,1000.")

    @property
    def n_kept(self) -> int | None:
        """How many checkpoints stay; None: all."""
        return 1 if self.delete_previous_checkpoint else self.keep_last

    @property
    def fixed_steps(self) -> frozenset[int]:
        """The steps of --save-at-steps."""
        return frozenset(int(word) for word in self._at_steps_words())

    def _at_steps_words(self) -> list[str]:
        return [word for words in self.save_at_steps for word in words.split(",") if word.strip()]
