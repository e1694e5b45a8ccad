"""Generation: prompts in, tokens out, many texts at once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from open_lm.generation.beams import beam_search
from open_lm.generation.config import GenerateConfig
from open_lm.generation.cpu_decode import cpu_decode
from open_lm.generation.engine import Engine
from open_lm.generation.prompts import check_prompts, rooms, up_to_stop
from open_lm.generation.text import Text, copy_numbers
from open_lm.model.transformer import Transformer

RowWatch = Callable[[int, list[int]], bool]
"""Called with a row and all it has written, after each of its tokens; true ends the row."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig | None = None,
    *,
    stop_ids: Collection[int] = (),
    watch: RowWatch | None = None,
    **settings: Any,
) -> list[list[int]]:
    """The tokens that `model` writes after each prompt, prompt and stop token left out.

    `settings` are fields of GenerateConfig (`temperature=0`) in place of a `config`. A text ends at the first of
    `stop_ids`, when `watch` says so, after `max_gen_len` tokens, or at the end of the model's context. Beam search
    knows no `watch`. What a text becomes, drawn or greedy, does not depend on the other prompts; equal prompts are
    drawn differently.

    Raises:
        ConfigError: a prompt is empty, too long, or holds ids beyond the vocabulary.
    """
    config = config or GenerateConfig(**settings)
    check_prompts(model, prompts)
    with without_gradients(model), evaluating(model):
        if config.num_beams > 1:
            ranked = beam_search(model, prompts, config, stop_ids=stop_ids)
            return [up_to_stop(beams[0].tokens, stop_ids) for beams in ranked]
        with cpu_decode(model):
            return _written(model, prompts, config, stop_ids, watch)


def without_gradients(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Inference mode; under FSDP, which counts the versions of its tensors, only no gradients."""
    return torch.no_grad() if hasattr(model, "unshard") else torch.inference_mode()


def _written(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    stop_ids: Collection[int],
    watch: RowWatch | None,
) -> list[list[int]]:
    n_new = rooms(model, prompts, config.max_gen_len)
    texts = [
        Text(prompt, config, room, stop_ids, watch and _watching(watch, row), copy)
        for row, (prompt, room, copy) in enumerate(zip(prompts, n_new, copy_numbers(prompts), strict=True))
    ]
    longest = max(len(text.prompt) + text.n_new for text in texts)
    engine = Engine(model, min(len(texts), config.batch_size), longest, use_cache=config.use_cache)
    for text in texts:
        engine.add(text)
    while engine.busy:
        engine.step()
    if any(text.finish == "error" for text in texts):
        logging.warning("the model computed NaN: texts end there")
    return [text.written() for text in texts]


def _watching(watch: RowWatch, row: int) -> Callable[[Text], bool]:
    return lambda text: watch(row, text.tokens)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode until the block ends, then every module back into the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
