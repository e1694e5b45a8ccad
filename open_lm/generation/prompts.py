"""Prompts before anything is written: checked, and how much room the context leaves each."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from open_lm.errors import ConfigError


def check_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that the model cannot read.

    Raises:
        ConfigError: there are none, or one is empty, too long or beyond the vocabulary.
    """
    if not prompts:
        raise ConfigError("no prompts: give at least one.")
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, model.config.vocab_size, model.config.seq_len, f"prompt {index}")


def check_prompt(prompt: Sequence[int], vocab_size: int, context: int, name: str) -> None:
    """Refuse one prompt that a model of `context` positions cannot continue.

    Raises:
        ConfigError: it is empty, too long or beyond the vocabulary.
    """
    if not len(prompt):
        raise ConfigError(f"{name} is empty: give at least one token, such as the end-of-text token.")
    if len(prompt) >= context:
        raise ConfigError(
            f"{name} has {len(prompt)} tokens; with one to write, the model's context of {context} is too "
            "short. Shorten the prompt."
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ConfigError(
            f"{name} holds token ids {min(prompt)} to {max(prompt)}; the model knows 0 to {vocab_size - 1}. "
            "Give the --tokenizer that it was trained with."
        )


def rooms(model: Any, prompts: Sequence[Sequence[int]], asked: int) -> list[int]:
    """Tokens to write after each prompt: `asked`, capped at what its context leaves, with a warning."""
    context = model.config.seq_len
    left = [context - len(prompt) for prompt in prompts]
    short = [room for room in left if room < asked]
    if short:
        logging.warning(
            "the model's context of %d leaves room for %d of %d tokens after %d of %d prompts",
            context, min(short), asked, len(short), len(prompts),
        )  # fmt: skip
    return [min(asked, room) for room in left]


def up_to_stop(tokens: Sequence[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first stop token."""
    stop = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return list(tokens[:stop])
