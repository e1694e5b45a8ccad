"""Rewards of sampled answers: from functions, or from reward models."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from open_lm.data.batch import IGNORED, Batch
from open_lm.data.tokenizer import Tokenizer
from open_lm.errors import ConfigError, DataError
from open_lm.post_training.reward_model import load_reward_model, rewards_of


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its tokens, an end among them if it came, and the prompt and row that it answers."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    text: str
    row: dict[str, Any]
    finished: bool
    """Whether it ended by itself, and was not cut off."""


Reward = Callable[[Sequence[Answer]], list[float]]


def build_rewards(names: Sequence[str], tokenizer: Tokenizer, device: str, dtype: torch.dtype) -> list[Reward]:
    """The rewards that --reward names.

    Raises:
        ConfigError: a module or function does not exist, or a reward model has another vocabulary.
        CheckpointError: a reward model is missing or damaged.
    """
    return [_by_model(name, tokenizer, device, dtype) if _is_model(name) else _by_function(name) for name in names]


def total(scores: Sequence[Reward], answers: Sequence[Answer]) -> list[float]:
    """The sum of all rewards of each answer.

    Raises:
        DataError: a reward is no finite number, or its function raised.
    """
    return [sum(each) for each in zip(*(score(answers) for score in scores), strict=True)]


def _is_model(name: str) -> bool:
    return ":" not in name or "://" in name or os.path.exists(name)


def _by_function(name: str) -> Reward:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--reward {name}: {error}. Give module:function, importable from here.") from error

    def score(answers: Sequence[Answer]) -> list[float]:
        return [_checked(name, function, answer) for answer in answers]

    return score


def _checked(name: str, function: Callable[[str, dict[str, Any]], Any], answer: Answer) -> float:
    try:
        value = float(function(answer.text, answer.row))
    except Exception as error:
        raise DataError(
            f"--reward {name} raised {type(error).__name__}: {error}; on the answer {answer.text[:80]!r}. Repair it."
        ) from error
    if not math.isfinite(value):
        raise DataError(f"--reward {name} gave {value} on the answer {answer.text[:80]!r}. It must be a finite number.")
    return value


def _by_model(path: str, tokenizer: Tokenizer, device: str, dtype: torch.dtype) -> Reward:
    model: Any = load_reward_model(path, device, dtype)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"--reward {path}: has {model.config.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}. Train a "
            "reward model with this tokenizer."
        )

    def score(answers: Sequence[Answer]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(answers), 16):
            with torch.inference_mode():
                values_B = rewards_of(model, batch_of_answers(answers[start : start + 16]).to(device))
            found += values_B.tolist()
        if not all(map(math.isfinite, found)):
            raise DataError(f"--reward {path}: the reward model computed {found}. Its weights are damaged.")
        return found

    return score


def batch_of_answers(answers: Sequence[Answer]) -> Batch:
    """The answers behind their prompts, padded on the right by position; their tokens are the targets."""
    width = max(len(answer.prompt) + len(answer.tokens) for answer in answers) - 1
    inputs_BT = torch.zeros(len(answers), width, dtype=torch.long)
    targets_BT = torch.full((len(answers), width), IGNORED)
    for row, answer in enumerate(answers):
        ids = torch.tensor([*answer.prompt, *answer.tokens])
        inputs_BT[row, : len(ids) - 1] = ids[:-1]
        targets_BT[row, len(answer.prompt) - 1 : len(ids) - 1] = ids[len(answer.prompt) :]
    return Batch(inputs_BT, targets_BT)
