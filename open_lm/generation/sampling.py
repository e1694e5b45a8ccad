"""Sampling of the next token from logits.  Shapes: B batch, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from open_lm.generation.config import GenerateConfig


def next_tokens(logits_BV: Tensor, config: GenerateConfig, generator: torch.Generator) -> Tensor:
    """One token id per row, (B,): the likeliest, or drawn among those that the flags leave."""
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = keep_top_k(logits_BV / config.temperature, config.top_k)
    logits_BV = keep_min_p(keep_top_p(logits_BV, config.top_p), config.min_p)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator).squeeze(-1)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """The logits, -inf below the k-th largest of each row; ties with it stay. 0 keeps all."""
    if not 0 < k < logits_BV.shape[-1]:
        return logits_BV
    kth_B1 = logits_BV.topk(k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, share: float) -> Tensor:
    """The logits, -inf outside the smallest set of likeliest tokens that holds `share` (arXiv:1904.09751)."""
    if share >= 1:
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probability_BV = sorted_BV.softmax(-1)
    likelier_BV = probability_BV.cumsum(-1) - probability_BV
    likelier_BV[:, 0] = 0.0  # the likeliest token stays whatever rounding makes of the difference
    outside_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, order_BV, likelier_BV >= share)
    return logits_BV.masked_fill(outside_BV, -torch.inf)


def keep_min_p(logits_BV: Tensor, share: float) -> Tensor:
    """The logits, -inf where the probability is below `share` of the largest (arXiv:2407.01082). 0 keeps all."""
    if share == 0:
        return logits_BV
    probability_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(probability_BV < share * probability_BV.amax(-1, keepdim=True), -torch.inf)


class Repetition:
    """Makes tokens less likely that a row has already (CTRL, arXiv:1909.05858); a penalty of 1 does nothing."""

    def __init__(self, penalty: float, ids_BT: Tensor, mask_BT: Tensor | None, vocab_size: int):
        self.penalty = penalty
        if penalty == 1:
            return
        seen_BV = torch.zeros(len(ids_BT), vocab_size + 1, dtype=torch.bool, device=ids_BT.device)
        padding = vocab_size  # a column of its own, dropped at once
        seen_BV.scatter_(1, ids_BT if mask_BT is None else ids_BT.masked_fill(~mask_BT, padding), True)
        self.seen_BV = seen_BV[:, :vocab_size]

    def applied(self, logits_BV: Tensor) -> Tensor:
        """The logits with the penalty."""
        if self.penalty == 1:
            return logits_BV
        penalised_BV = torch.where(logits_BV < 0, logits_BV * self.penalty, logits_BV / self.penalty)
        return torch.where(self.seen_BV, penalised_BV, logits_BV)

    def add(self, tokens_B: Tensor) -> None:
        """Remember the next token of every row."""
        if self.penalty != 1:
            self.seen_BV.scatter_(1, tokens_B[:, None], True)

    def keep_rows(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was."""
        if self.penalty != 1:
            self.seen_BV = self.seen_BV[rows]
