"""One text that is being written: what was asked, what has been written, and why it ended."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from open_lm.generation.config import GenerateConfig

Watch = Callable[["Text"], bool]
"""Called after each token that a text gets; true ends the text."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's log-probability under the model, whether it was the likeliest, and the likeliest ones with theirs."""

    token: int
    log_probability: float
    is_greedy: bool
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Text:
    """A prompt and what a model writes after it.

    `copy` tells texts of one prompt apart: each has its own random stream. `n_top` asks for log-probabilities of the
    tokens written, with that many of the likeliest; `score_from` for those of the prompt's tokens from that index on
    (at least 1: nothing predicts the first token).
    """

    prompt: Sequence[int]
    config: GenerateConfig
    n_new: int
    stop_ids: Collection[int] = ()
    watch: Watch | None = None
    copy: int = 0
    n_top: int | None = None
    score_from: int | None = None

    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    finish: str | None = None
    """None while it is written, then "stop", "length", "cancelled" or "error"."""
    slot: int = -1
    n_read: int = 0
    """Tokens of the prompt that the model has seen."""
    n_shared: int = 0
    """Those of them that were copied from another text."""
    cancelled: bool = False
    _random: np.random.Generator | None = None

    @property
    def n_to_read(self) -> int:
        """Tokens of the prompt that the model must see: where nothing is to be written, the last is only predicted."""
        return len(self.prompt) - (self.n_new == 0)

    @property
    def n_wanted_scores(self) -> int:
        """Log-probabilities that are asked for, those of the likeliest tokens included."""
        of_prompt = 0 if self.score_from is None else len(self.prompt) - self.score_from
        of_new = 0 if self.n_top is None else self.n_new
        return (of_prompt + of_new) * (1 + (self.n_top or 0))

    def uniform(self) -> float:
        """The next number of [0, 1) of this text's own stream: a function of the seed, the prompt and `copy`."""
        if self._random is None:
            self._random = random_stream(self.config.seed, self.copy, self.prompt)
        return float(self._random.random())

    def append(self, token: int, score: TokenScore | None) -> None:
        """Take the next token, and end the text if it ends with it."""
        self.tokens.append(token)
        if score is not None:
            self.scores.append(score)
        if token in self.stop_ids or (self.watch is not None and self.watch(self)):
            self.finish = "stop"
        elif len(self.tokens) >= self.n_new:
            self.finish = "length"

    def written(self) -> list[int]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.tokens and self.tokens[-1] in self.stop_ids else list(self.tokens)


def random_stream(seed: int, copy: int, prompt: Sequence[int]) -> np.random.Generator:
    """A random generator that depends on these alone: never on what else is written at the time."""
    head = f"{seed} {copy} ".encode()
    digest = hashlib.blake2b(head + np.asarray(prompt, np.int64).tobytes(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def copy_numbers(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt how many equal ones stand before it."""
    seen: dict[tuple[int, ...], int] = {}
    numbers = []
    for prompt in prompts:
        key = tuple(prompt)
        numbers.append(seen.get(key, 0))
        seen[key] = numbers[-1] + 1
    return numbers
