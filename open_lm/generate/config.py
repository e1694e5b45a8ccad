"""How text is drawn from a model: the flags of generation."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import flag


@dataclass(frozen=True)
class GenerateConfig:
    """Generation"""

    max_gen_len: int = flag(200, "Tokens to write after each prompt, at most; fewer where the model's context ends.")
    temperature: float = flag(0.8, "Divides the logits before sampling; 0 takes the likeliest token every time.")
    top_p: float = flag(0.95, "Sample among the likeliest tokens that together hold this share; 1 = among all.")
    seed: int = flag(0, "Seed of the sampling.")
    use_cache: bool = flag(True, "Keep keys and values of past positions; without, each token recomputes them all.")

    def __post_init__(self) -> None:
        if self.max_gen_len < 1:
            raise ConfigError(f"--max-gen-len {self.max_gen_len}: need at least 1.")
        if not self.temperature >= 0:
            raise ConfigError(f"--temperature {self.temperature}: need 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: need a share above 0, at most 1.")
