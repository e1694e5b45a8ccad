"""Which token comes next, given the logits.  Shapes: B batch, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from open_lm.generate.config import GenerateConfig


def next_tokens(logits_BV: Tensor, config: GenerateConfig, generator: torch.Generator) -> Tensor:
    """One token id per row, (B,): the likeliest, or drawn among those the flags leave."""
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = keep_top_p(logits_BV / config.temperature, config.top_p)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(-1)


def keep_top_p(logits_BV: Tensor, share: float) -> Tensor:
    """The logits, -inf outside the smallest set of likeliest tokens that holds `share` (arXiv:1904.09751)."""
    if share >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.softmax(-1).cumsum(-1) - sorted_BV.softmax(-1)
    outside_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= share)
    return logits_BV.masked_fill(outside_BV, -torch.inf)
