"""Flags of scoring files or a model's own answers with rewards. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import flag


@dataclass(frozen=True)
class RewardScoring:
    """Rewards"""

    reward: tuple[str, ...] = flag(
        (),
        "Rewards in place of tasks: the run or checkpoint of a --task reward model, which scores --input-files; or, "
        "for answers to --prompts, such models and `module:function`. Rows with their rewards go to rewards.jsonl in "
        "--output-dir, means to rewards.json.",
    )
    input_files: tuple[str, ...] = flag(
        (),
        "With --reward: conversations or preference pairs to score, in any form that openlm prepare-chat reads; paths "
        "or urls, globs or folders.",
    )
    prompts: str | None = flag(
        None, "With --reward: prompts.jsonl of openlm prepare-chat, which --checkpoint answers; its answers are scored."
    )
    answer_tokens: int = flag(128, "With --prompts: tokens of an answer, at most.", least=1)
    answer_temperature: float = flag(0.0, "With --prompts: temperature of the sampling; 0: the likeliest.", least=0)
    chat_template: str | None = flag(
        None,
        "With --input-files: the template, as for openlm prepare-chat. None: that of the data of the reward model.",
    )
    on_bad_line: str = flag(
        "stop", "With --input-files: a row of no known form: stop, or skip and count it.", choices=("stop", "skip")
    )

    def __post_init__(self) -> None:
        n_given = bool(self.input_files) + bool(self.prompts)
        if n_given != bool(self.reward):
            raise ConfigError("--reward scores one of --input-files and --prompts: give both halves, or neither.")
        if self.input_files and len(self.reward) != 1:
            raise ConfigError(f"--reward: one reward model scores --input-files, {len(self.reward)} are given.")
