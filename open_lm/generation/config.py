"""Flags of generation: how tokens are drawn, and when a text ends."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import flag

LEAST_PENALTY, MOST_PENALTY = 0.01, 1000.0
"""Bounds of the repetition penalty: what divides logits by less makes them infinite."""


@dataclass(frozen=True)
class GenerateConfig:
    """Generation"""

    max_gen_len: int = flag(200, "Tokens to write after each prompt, at most; fewer where the model's context ends.")
    temperature: float = flag(0.8, "Divides the logits before sampling; 0 takes the likeliest token every time.")
    top_k: int = flag(0, "Sample among this many likeliest tokens; 0 = among all.")
    top_p: float = flag(0.95, "Sample among the likeliest tokens that together hold this share; 1 = among all.")
    min_p: float = flag(0.0, "Sample among tokens at least this share as likely as the likeliest; 0 = among all.")
    repetition_penalty: float = flag(
        1.0, "Divides positive (multiplies negative) logits of tokens that the text already has; 1 = none."
    )
    num_beams: int = flag(
        1,
        "Above 1: beam search over this many texts, for the likeliest one; temperature and --top-* have no part in it.",
    )
    length_penalty: float = flag(1.0, "Beams are ranked by log-probability / tokens ** this; 0 = by plain sum.")
    seed: int = flag(0, "Seed of the sampling; a text depends on it and on its own prompt alone.")
    batch_size: int = flag(64, "Texts written at the same time; further ones begin as others end.")
    use_cache: bool = flag(True, "Keep keys and values of past positions; without, each token recomputes them all.")

    def __post_init__(self) -> None:
        if self.max_gen_len < 1:
            raise ConfigError(f"--max-gen-len {self.max_gen_len}: need at least 1.")
        if not self.temperature >= 0:
            raise ConfigError(f"--temperature {self.temperature}: need 0 (greedy) or more.")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k}: need 0 (all) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: need a share above 0, at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"--min-p {self.min_p}: need a share of 0 to 1.")
        if not LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            allowed = f"{LEAST_PENALTY:g} to {MOST_PENALTY:g}"
            raise ConfigError(f"--repetition-penalty {self.repetition_penalty}: need {allowed}; 1 changes nothing.")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size}: need at least 1.")
        if self.num_beams < 1:
            raise ConfigError(f"--num-beams {self.num_beams}: need at least 1.")
        if self.num_beams > 1 and not self.use_cache:
            raise ConfigError(f"--num-beams {self.num_beams} needs the cache: leave out --no-use-cache.")
