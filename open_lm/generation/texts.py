"""A batch of texts being generated.  Shapes: B batch, T positions, V vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from open_lm.errors import ConfigError
from open_lm.generation.config import GenerateConfig
from open_lm.generation.sampling import Repetition
from open_lm.kernels.skinny_matmul import linear
from open_lm.model.transformer import Transformer


class Texts:
    """Prompts and what has been written after them, all ending at the same position, and the cache that goes with them.

    Raises:
        ConfigError: a prompt is empty, too long, or holds ids beyond the vocabulary.
    """

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], config: GenerateConfig):
        check_prompts(model, prompts)
        self.model = model
        self.end = max(map(len, prompts))
        self.room = tokens_to_write(model, self.end, config.max_gen_len)
        self.device = next(model.parameters()).device
        self.ids_BT, self.mask_BT = left_padded(prompts, self.room, self.device)
        self.cache = model.new_cache(*self.ids_BT.shape) if config.use_cache else None
        self.repetition = Repetition(config.repetition_penalty, *self.so_far(), model.config.vocab_size)

    def so_far(self) -> tuple[Tensor, Tensor | None]:
        """All ids, and the mask of what is no padding."""
        return self.ids_BT[:, : self.end], None if self.mask_BT is None else self.mask_BT[:, : self.end]

    def next_logits(self) -> Tensor:
        """The logits of every text's next token, (B, V) in fp32."""
        ids_BT, mask_BT = self.so_far()
        start = self.cache.length if self.cache else 0
        return self.model(ids_BT[:, start:], self.cache, False, mask_BT, head=last_position)

    def append(self, tokens_B: Tensor) -> None:
        """Give every text its next token."""
        self.ids_BT[:, self.end] = tokens_B
        self.end += 1
        self.repetition.add(tokens_B)

    def keep_rows(self, rows: Tensor) -> None:
        """Make text i what text `rows[i]` was; they must be of the same prompt."""
        self.ids_BT = self.ids_BT[rows]
        self.repetition.keep_rows(rows)
        if self.cache:
            self.cache.reorder(rows)


def last_position(hidden_BTD: Tensor, weight_VD: Tensor, **_: Any) -> Tensor:
    """Logits of the last position alone, (B, V): those of the others are never computed."""
    return linear(weight_VD, hidden_BTD[:, -1], exact=True)


def check_prompts(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that the model cannot read.

    Raises:
        ConfigError: there are none, or one is empty, too long or beyond the vocabulary.
    """
    vocab_size, context = model.config.vocab_size, model.config.seq_len
    if not prompts:
        raise ConfigError("no prompts: give at least one.")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index} is empty: give at least one token, such as the end-of-text token.")
        if len(prompt) >= context:
            raise ConfigError(
                f"prompt {index} has {len(prompt)} tokens; with one to write, the model's context of {context} is too "
                "short. Shorten the prompt."
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ConfigError(
                f"prompt {index} holds token ids {min(prompt)} to {max(prompt)}; the model knows 0 to "
                f"{vocab_size - 1}. Give the --tokenizer that it was trained with."
            )


def tokens_to_write(model: Transformer, n_prompt: int, asked: int) -> int:
    """`asked`, or as many as fit the context, which is said."""
    room = model.config.seq_len - n_prompt
    if asked > room:
        logging.warning("the model's context of %d leaves room for %d of %d tokens", n_prompt + room, room, asked)
    return min(asked, room)


def left_padded(prompts: Sequence[Sequence[int]], n_new: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts with their ends aligned and room for `n_new` tokens, and the mask of what is no padding.

    Positions enter attention only as differences, so padding on the left changes nothing but what is masked. Prompts
    of one length need no mask.
    """
    longest = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), longest + n_new, dtype=torch.long)
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) : longest] = torch.as_tensor(prompt)
        mask_BT[row, : longest - len(prompt)] = False
    return ids_BT.to(device), None if mask_BT.all() else mask_BT.to(device)


def up_to_stop(tokens: Sequence[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first stop token."""
    stop = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return list(tokens[:stop])
