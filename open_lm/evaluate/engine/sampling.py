"""Next-token choice in generated answers: greedy, or sampled as a task's generation_kwargs say.

Shapes: B prompts, V vocabulary.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_lm.errors import ConfigError
from open_lm.evaluate.tasks.task import EvalTask
from open_lm.generation.sampling import inverse_cdf, keep_min_p, keep_top_k, keep_top_p

DRAWING = ("temperature", "top_k", "top_p", "min_p")
WITHOUT_EFFECT = ("use_cache", "pad_token_id", "eos_token_id")


@dataclass(frozen=True)
class Sampling:
    """Sampling of the tokens of answers; `draws` false means the likeliest. Defaults are those of transformers'
    `generate`, which LLM Foundry calls."""

    draws: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_new_tokens: int | None = None

    def choose(self, logits_BV: Tensor, numbers: Sequence[int], step: int) -> Tensor:
        """The next token of each row, (B,). A draw depends on the seed, the number of the question and the step alone,
        so answers are the same however questions are batched and spread over ranks."""
        if not self.draws:
            return logits_BV.argmax(-1)
        logits_BV = keep_top_k(logits_BV / self.temperature, self.top_k)
        share_BV = keep_min_p(keep_top_p(logits_BV, self.top_p), self.min_p).softmax(-1)
        drawn = inverse_cdf(share_BV, [self._place(number, step) for number in numbers])
        return torch.tensor(drawn, device=logits_BV.device)

    def _place(self, number: int, step: int) -> float:
        """A number of [0, 1)."""
        return random.Random(f"{self.seed} {number} {step}").random()


def sampling_of(task: EvalTask) -> Sampling:
    """Sampling that `task` asks for.

    Raises:
        ConfigError: it asks for what the native engine does not have (beams, penalties), or a value is out of range.
    """
    given: Mapping[str, Any] = task.generation_kwargs
    known = {"do_sample", "max_new_tokens", *DRAWING, *WITHOUT_EFFECT}
    where = f"task {task.label}: generation_kwargs"
    if unknown := sorted(set(given) - known - ({"num_beams"} if given.get("num_beams") == 1 else set())):
        raise ConfigError(
            f"{where}: {', '.join(unknown)}: the native engine has {', '.join(sorted(known))}. "
            "Use --engine llm-foundry for this task."
        )
    draws = bool(given.get("do_sample", False))
    values = {name: given[name] for name in DRAWING if given.get(name) is not None}
    if values and not draws:
        logging.warning("%s: %s have no effect without do_sample: true.", where, ", ".join(values))
        values = {}
    for name, value in {**values, "max_new_tokens": given.get("max_new_tokens", 1)}.items():
        whole = name in ("top_k", "max_new_tokens")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ConfigError(f"{where}: {name}: found {value!r}, need a {'whole ' if whole else ''}number.")
        if value < 0 or (name in ("temperature", "max_new_tokens", "top_p") and value == 0):
            raise ConfigError(f"{where}: {name}: found {value!r}, need more than 0.")
    seed = task.fewshot_random_seed
    return Sampling(draws, **values, seed=seed, max_new_tokens=given.get("max_new_tokens"))
