"""How a model writes: prompts in, tokens out, one position at a time.  Shapes: B batch, T positions, V vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.errors import ConfigError
from open_lm.generate.config import GenerateConfig
from open_lm.generate.sampling import next_tokens
from open_lm.model.cache import StaticCache
from open_lm.model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    *,
    stop_ids: Collection[int] = (),
    **settings: Any,
) -> list[list[int]]:
    """The tokens that `model` writes after each prompt, prompt and stop token left out.

    `settings` are fields of GenerateConfig (`temperature=0`) in place of a `config`. A text ends at the first of
    `stop_ids`, after `max_gen_len` tokens, or at the end of the model's context.

    Raises:
        ConfigError: a prompt is empty, too long, or holds ids beyond the vocabulary.
    """
    config = config or GenerateConfig(**settings)
    model.eval()
    check_prompts(model, prompts)
    n_new = tokens_to_write(model, max(map(len, prompts)), config.max_gen_len)
    written_BT = write(model, prompts, n_new, config, stop_ids)
    return [up_to_stop(row, stop_ids) for row in written_BT.tolist()]


def write(
    model: Transformer, prompts: Sequence[Sequence[int]], n_new: int, config: GenerateConfig, stop_ids: Collection[int]
) -> Tensor:
    """The next tokens of every prompt, (B, at most n_new); what follows a stop token has no meaning."""
    ids_BT, mask_BT = left_padded(prompts, n_new, device_of(model))
    stops = torch.tensor(sorted(stop_ids), device=ids_BT.device, dtype=torch.long)
    generator = torch.Generator(ids_BT.device).manual_seed(config.seed)
    cache = model.new_cache(*ids_BT.shape) if config.use_cache else None
    n_prompt = ids_BT.shape[1] - n_new
    stopped_B = torch.zeros(len(prompts), dtype=torch.bool, device=ids_BT.device)
    for end in range(n_prompt, n_prompt + n_new):
        start = cache.length if cache else 0
        logits_BV = last_logits(model, ids_BT[:, start:end], cache, None if mask_BT is None else mask_BT[:, :end])
        ids_BT[:, end] = next_tokens(logits_BV, config, generator)
        stopped_B |= torch.isin(ids_BT[:, end], stops)
        if stopped_B.all():
            return ids_BT[:, n_prompt : end + 1]
    return ids_BT[:, n_prompt:]


def last_logits(model: Transformer, ids_BT: Tensor, cache: StaticCache | None, mask_BT: Tensor | None) -> Tensor:
    """Logits of the token after the last position, (B, V), without those of the other positions."""

    def head(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.linear(hidden_BTD[:, -1], weight_VD).float()

    return model(ids_BT, cache, False, mask_BT, head=head)


def check_prompts(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that the model cannot read.

    Raises:
        ConfigError: there are none, or one is empty, longer than the context, or holds ids beyond the vocabulary.
    """
    vocab_size, context = model.config.vocab_size, model.config.seq_len
    if not prompts:
        raise ConfigError("no prompts: give at least one.")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index} is empty: give at least one token, such as the end-of-text token.")
        if len(prompt) >= context:
            raise ConfigError(f"prompt {index} has {len(prompt)} tokens; the model's context ends at {context}.")
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


def device_of(model: Transformer) -> torch.device:
    """Where the weights are."""
    return next(model.parameters()).device


def up_to_stop(tokens: Sequence[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens before the first stop token."""
    stop = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return list(tokens[:stop])
