"""Checkpoint flags: when to save, what to keep, where to start from."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import flag

FORMATS = ("auto", "consolidated", "sharded", "sharded-remote")
CONSOLIDATED_UP_TO = 3_000_000_000
"""Parameters up to which --checkpoint-format auto gathers a checkpoint on rank 0."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints"""

    resume: str | None = flag(
        None, "Checkpoint (epoch_K.pt) to continue from; `latest` takes the newest complete one of this run, if any."
    )
    pretrained: str | None = flag(
        None,
        "Checkpoint, run folder, exported folder or hf://owner/name to take the weights from; all else starts fresh. "
        "With --resume latest: unless this run has a checkpoint to continue from.",
    )
    load_pretrained_state: bool = flag(
        False, "With --pretrained: go on from its optimizer and step too, in a run and on data of its own."
    )
    average: tuple[str, ...] = flag((), "Checkpoints whose mean the weights start from, as --pretrained does from one.")
    average_coefficients: tuple[float, ...] = flag(
        (), "The share of each --average in the mean; they add up to 1. None given: equal shares."
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
        "Also write a checkpoint after these steps (100,1000 or 100 1000; 0 is before the first), which is never "
        "deleted and not counted by --keep-last.",
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

    checkpoint_format: str = flag(
        "auto",
        "consolidated: epoch_K.pt and the files beside it, gathered on rank 0; sharded: every rank writes its part, to "
        "a folder that all nodes share (`openlm consolidate` makes epoch_K.pt of it); "
        "sharded-remote: every rank sends its part straight to --remote-sync, and no disk need be shared; auto: "
        "consolidated up to 3 billion parameters.",
        choices=FORMATS,
    )
    async_save: bool = flag(
        True, "Write checkpoints while training goes on; steps wait only until tensors are copied to host memory."
    )

    remote_sync: str | None = flag(
        None,
        "Copy complete checkpoints and logs to URL/NAME (s3://…, any fsspec url, or a folder) beside the training; "
        "--resume latest finds them there on a machine that has none.",
        metavar="URL",
    )
    remote_sync_frequency: float = flag(300.0, "Seconds between two passes of --remote-sync.", above=0)
    remote_sync_grace: float = flag(
        1800.0, "Seconds that all ranks wait at the end of a run for the last copies of --remote-sync.", least=0
    )
    remote_sync_protocol: str = flag(
        "fsspec", "Accepted for old scripts: both go through fsspec.", choices=("s3", "fsspec")
    )

    def __post_init__(self) -> None:
        if self.remote_sync and self.remote_sync_protocol == "s3" and "://" not in self.remote_sync:
            raise ConfigError(f"--remote-sync-protocol s3 with --remote-sync {self.remote_sync}: give an s3:// url.")
        if self.remote_sync_protocol != "fsspec":
            logging.warning("--remote-sync-protocol is ignored: --remote-sync goes through fsspec whatever it says.")
        if self.checkpoint_format == "sharded-remote" and "://" not in (self.remote_sync or ""):
            raise ConfigError(
                f"--checkpoint-format sharded-remote with --remote-sync {self.remote_sync}: give the url to save to."
            )
        if self.pretrained and self.average:
            raise ConfigError("--pretrained and --average are mutually exclusive: both say where the weights start.")
        if self.start and self.resume not in (None, "latest"):
            raise ConfigError(
                "--resume and --pretrained (or --average) are mutually exclusive, except --resume latest: continue a "
                "run, or start one from weights."
            )
        if self.load_pretrained_state and not self.pretrained:
            raise ConfigError("--load-pretrained-state takes optimizer and step of --pretrained: name that too.")
        self._check_coefficients()
        if self.save_frequency < 0:
            raise ConfigError(f"--save-frequency {self.save_frequency} must not be negative.")
        if not all(word.strip().isdigit() for word in self._at_steps_words()):
            raise ConfigError(f"--save-at-steps {' '.join(self.save_at_steps)}: give steps, as in 100,1000.")

    def _check_coefficients(self) -> None:
        given, total = self.average_coefficients, sum(self.average_coefficients)
        if given and len(given) != len(self.average):
            raise ConfigError(f"--average-coefficients gives {len(given)} shares for {len(self.average)} --average.")
        if given and abs(total - 1) > 1e-6:
            scaled = " ".join(f"{share / total:.6g}" for share in given) if total else "shares"
            raise ConfigError(f"--average-coefficients add up to {total:g}, not to 1. Give {scaled}.")

    @property
    def start(self) -> tuple[str, ...]:
        """The checkpoints that the weights start from: that of --pretrained, or those of --average."""
        return (self.pretrained,) if self.pretrained else self.average

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each of `start` in their mean."""
        return self.average_coefficients or (1 / len(self.start),) * len(self.start)

    @property
    def n_kept(self) -> int | None:
        """Number of checkpoints that stay; None: all."""
        return 1 if self.delete_previous_checkpoint else self.keep_last

    @property
    def fixed_steps(self) -> frozenset[int]:
        """The steps of --save-at-steps."""
        return frozenset(int(word) for word in self._at_steps_words())

    def _at_steps_words(self) -> list[str]:
        return [word for words in self.save_at_steps for word in words.split(",") if word.strip()]
