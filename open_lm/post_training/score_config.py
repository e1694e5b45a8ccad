"""Flags of scoring files with a reward model. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import flag


@dataclass(frozen=True)
class RewardScoring:
    """Scores of a reward model"""

    reward: str | None = flag(
        None,
        "Run or checkpoint of a --task reward model that scores --input-files, in place of --checkpoint and tasks: "
        "each row with its reward goes to rewards.jsonl in --output-dir, their sums to rewards.json.",
    )
    input_files: tuple[str, ...] = flag(
        (),
        "With --reward: conversations or preference pairs in any form that openlm prepare-chat reads; paths or urls, "
        "globs or folders.",
    )
    chat_template: str | None = flag(
        None, "With --reward: the template that the reward model was trained with, as for openlm prepare-chat."
    )
    on_bad_line: str = flag(
        "stop", "With --reward: a row of no known form: stop, or skip and count it.", choices=("stop", "skip")
    )

    def __post_init__(self) -> None:
        if bool(self.reward) != bool(self.input_files):
            raise ConfigError("--reward and --input-files belong together: what scores, and what it is to score.")
