"""Texts of beam search: prompts padded on the left, so that all of them grow at the same position.

Shapes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_lm.generation.config import GenerateConfig
from open_lm.kernels.skinny_matmul import linear
from open_lm.model.transformer import Transformer


class PaddedTexts:
    """Prompts and what has been written after them, all ending at the same position, and the cache that goes with them.

    Positions enter attention only as differences, so padding on the left changes nothing but what is masked; the
    texts may take more positions together than the model's context, but none of them alone.
    """

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], config: GenerateConfig, n_new: int):
        self.model = model
        self.end = max(map(len, prompts))
        self.device = next(model.parameters()).device
        self.ids_BT, self.mask_BT = left_padded(prompts, n_new, self.device)
        self.cache = model.new_cache(*self.ids_BT.shape)
        self.repetition = Repetition(config.repetition_penalty, *self.so_far(), model.config.vocab_size)

    def so_far(self) -> tuple[Tensor, Tensor | None]:
        """All ids, and the mask of what is no padding."""
        return self.ids_BT[:, : self.end], None if self.mask_BT is None else self.mask_BT[:, : self.end]

    def next_logits(self) -> Tensor:
        """The logits of every text's next token, (B, V) in fp32."""
        ids_BT, mask_BT = self.so_far()
        return self.model(ids_BT[:, self.cache.length :], self.cache, False, mask_BT, head=last_position)

    def append(self, tokens_B: Tensor) -> None:
        """Give every text its next token."""
        self.ids_BT[:, self.end] = tokens_B
        self.end += 1
        self.repetition.add(tokens_B)

    def keep_rows(self, rows: Tensor) -> None:
        """Make text i what text `rows[i]` was; they must be of the same prompt."""
        self.ids_BT = self.ids_BT[rows]
        self.repetition.keep_rows(rows)
        self.cache.reorder(rows)


def last_position(hidden_BTD: Tensor, weight_VD: Tensor, **_: Any) -> Tensor:
    """Logits of the last position alone, (B, V): those of the others are never computed."""
    return linear(weight_VD, hidden_BTD[:, -1], exact=True)


def left_padded(prompts: Sequence[Sequence[int]], n_new: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts with their ends aligned and room for `n_new` tokens, and the mask of what is no padding.

    Prompts of one length need no mask.
    """
    longest = max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), longest + n_new, dtype=torch.long)
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) : longest] = torch.as_tensor(prompt)
        mask_BT[row, : longest - len(prompt)] = False
    return ids_BT.to(device), None if mask_BT.all() else mask_BT.to(device)


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
