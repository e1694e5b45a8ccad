"""Decoding: prompts in, tokens out, one position at a time.  Shapes: B batch, T positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from open_lm.generation.beams import beam_search
from open_lm.generation.config import GenerateConfig
from open_lm.generation.cpu_decode import quick
from open_lm.generation.sampling import next_tokens
from open_lm.generation.texts import Texts, up_to_stop
from open_lm.model.transformer import Transformer

Watch = Callable[[int, list[int]], bool]
"""Called with a row and all it has written, after each of its tokens; true ends the row."""


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    *,
    stop_ids: Collection[int] = (),
    watch: Watch | None = None,
    **settings: Any,
) -> list[list[int]]:
    """The tokens that `model` writes after each prompt, prompt and stop token left out.

    `settings` are fields of GenerateConfig (`temperature=0`) in place of a `config`. A text ends at the first of
    `stop_ids`, when `watch` says so, after `max_gen_len` tokens, or at the end of the model's context. Beam search
    knows no `watch`.

    Raises:
        ConfigError: a prompt is empty, too long, or holds ids beyond the vocabulary.
    """
    config = config or GenerateConfig(**settings)
    model.eval()
    if config.num_beams > 1:
        ranked = beam_search(model, prompts, config, stop_ids=stop_ids)
        return [up_to_stop(beams[0].tokens, stop_ids) for beams in ranked]
    with quick(model):
        rows = write(Texts(model, prompts, config), config, stop_ids, watch or (lambda row, tokens: False))
    return [up_to_stop(row, stop_ids) for row in rows]


def write(texts: Texts, config: GenerateConfig, stop_ids: Collection[int], watch: Watch) -> list[list[int]]:
    """The next tokens of every text, a stop token included."""
    generator = torch.Generator(texts.device).manual_seed(config.seed)
    written: list[list[int]] = [[] for _ in texts.ids_BT]
    live = set(range(len(written)))
    for _ in range(texts.room):
        logits_BV = texts.repetition.applied(texts.next_logits())
        tokens_B = next_tokens(logits_BV, config, generator)
        texts.append(tokens_B)
        live -= take(tokens_B, written, live, stop_ids, watch)
        if not live:
            break
    return written


def take(
    tokens_B: Tensor, written: list[list[int]], live: set[int], stop_ids: Collection[int], watch: Watch
) -> set[int]:
    """Append each live row's token to what it has written; returns the rows that end with it."""
    tokens = tokens_B.tolist()
    ended = set()
    for row in sorted(live):
        written[row].append(tokens[row])
        if tokens[row] in stop_ids or watch(row, written[row]):
            ended.add(row)
    return ended
