"""The next token of each text: the likeliest, or drawn.  Shapes: B batch, R rows, V vocabulary, M candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from open_lm.generation.config import GenerateConfig

CANDIDATES = 512
"""Likeliest tokens that are sorted at first; the whole vocabulary is where a draw or a filter reaches beyond."""


def next_tokens(logits_BV: Tensor, configs: Sequence[GenerateConfig], uniforms: Sequence[float]) -> list[int]:
    """One token id per row, as its own config says; `uniforms` (of [0, 1)) choose in the rows that are drawn.

    A row's token depends on its logits, config and number alone.
    """
    tokens = [0] * len(configs)
    greedy = [row for row, config in enumerate(configs) if config.temperature == 0]
    drawn = [row for row, config in enumerate(configs) if config.temperature > 0]
    if greedy:
        for row, token in zip(greedy, rows_of(logits_BV, greedy).argmax(-1).tolist(), strict=True):
            tokens[row] = token
    plain = [row for row in drawn if not _filters(configs[row])]
    for rows, draw in ((plain, draw_from_all), ([row for row in drawn if _filters(configs[row])], draw_filtered)):
        if rows:
            scaled_RV = tempered(rows_of(logits_BV, rows), [configs[row] for row in rows])
            found = draw(scaled_RV, [configs[row] for row in rows], [uniforms[row] for row in rows])
            for row, token in zip(rows, found, strict=True):
                tokens[row] = token
    return tokens


def rows_of(logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows; not copied when they are all."""
    return logits_BV if len(rows) == len(logits_BV) else logits_BV[torch.tensor(rows, device=logits_BV.device)]


def _filters(config: GenerateConfig) -> bool:
    return config.top_k > 0 or config.top_p < 1 or config.min_p > 0


def tempered(logits_BV: Tensor, configs: Sequence[GenerateConfig]) -> Tensor:
    """Logits, the largest moved to 0, divided by each row's temperature: never infinite, however small that is."""
    temperature_B1 = torch.tensor([[config.temperature] for config in configs], device=logits_BV.device)
    smallest = torch.finfo(torch.float32).tiny
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature_B1.clamp(min=smallest)


def draw_from_all(logits_BV: Tensor, configs: Sequence[GenerateConfig], uniforms: Sequence[float]) -> list[int]:
    """Tokens drawn from the softmax over the whole vocabulary."""
    return inverse_cdf(logits_BV.softmax(-1), uniforms)


def inverse_cdf(share_BM: Tensor, uniforms: Sequence[float]) -> list[int]:
    """The index of each row where the sum of its shares passes `uniform` times their total, never one of share 0."""
    sum_BM = share_BM.double().cumsum(-1)
    mark_B1 = torch.tensor(uniforms, dtype=torch.float64, device=share_BM.device)[:, None] * sum_BM[:, -1:]
    index_B1 = torch.searchsorted(sum_BM, mark_B1, right=True)
    last_B1 = torch.searchsorted(
        sum_BM, sum_BM[:, -1:].contiguous()
    )  # where the sum first reaches its end: rounding stops there
    return torch.minimum(index_B1, last_B1).clamp(max=share_BM.shape[1] - 1)[:, 0].tolist()


def draw_filtered(logits_BV: Tensor, configs: Sequence[GenerateConfig], uniforms: Sequence[float]) -> list[int]:
    """Tokens drawn among those that top_k, then top_p, then min_p leave; of a few candidates where those suffice."""
    vocab_size = logits_BV.shape[-1]
    total_B = logits_BV.exp().sum(-1)
    top = logits_BV.topk(min(CANDIDATES, vocab_size), dim=-1)
    share_BM, kept_BM, enough_B = kept_candidates(top.values, total_B, configs, vocab_size)
    places = inverse_cdf(share_BM * kept_BM, uniforms)
    tokens = top.indices[torch.arange(len(places)), torch.tensor(places)].tolist()
    for row in (~enough_B).nonzero()[:, 0].tolist():
        values_V = descending(logits_BV[row])
        share, kept, _ = kept_candidates(values_V[None], total_B[row : row + 1], configs[row : row + 1], vocab_size)
        (place,) = inverse_cdf(share * kept, uniforms[row : row + 1])
        equal = (logits_BV[row] == values_V[place]).nonzero()[
            :, 0
        ]  # of equal ones as many are before it as in the order
        tokens[row] = int(equal[int((values_V[:place] == values_V[place]).sum())])
    return tokens


def descending(logits_V: Tensor) -> Tensor:
    """All logits of a row from the largest on; on a CPU by numpy, in a third of torch's time."""
    if logits_V.is_cuda:
        return logits_V.sort(descending=True).values
    return -torch.from_numpy(np.sort((-logits_V).numpy()))


def kept_candidates(
    sorted_BM: Tensor, total_B: Tensor, configs: Sequence[GenerateConfig], vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of sorted candidates, which of them the filters keep, and whether none beyond them would be kept.

    `total_B` is the sum of exp over the whole vocabulary.
    """
    device, n = sorted_BM.device, sorted_BM.shape[1]
    p_BM = sorted_BM.exp()
    k_B1 = torch.tensor([[config.top_k or vocab_size] for config in configs], device=device)
    kth_B1 = sorted_BM.gather(1, (k_B1.clamp(max=n) - 1))
    kept_BM = (k_B1 > n) | (sorted_BM >= kth_B1)  # ties with the k-th stay
    mass_B1 = torch.where(k_B1 > n, total_B[:, None], (p_BM * kept_BM).sum(-1, keepdim=True))
    top_p_B1 = torch.tensor([[config.top_p] for config in configs], device=device)
    min_p_B1 = torch.tensor([[config.min_p] for config in configs], device=device)
    likelier_BM = (p_BM.double().cumsum(-1) - p_BM) / mass_B1
    likelier_BM[:, 0] = 0.0  # the likeliest token stays whatever rounding makes of the difference
    kept_BM = kept_BM & ((likelier_BM < top_p_B1) | (top_p_B1 >= 1)) & (p_BM >= min_p_B1 * p_BM[:, :1])
    between_B = ((k_B1 > n) & (k_B1 < vocab_size))[:, 0]  # their mass is known only when all are sorted
    return p_BM, kept_BM, ~(kept_BM[:, -1] | between_B) | torch.tensor(n == vocab_size, device=device)


def penalised(logits_V: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """Logits with those of `ids` made smaller (CTRL, arXiv:1909.05858); a penalty of 1 changes nothing."""
    if penalty == 1:
        return logits_V
    seen = torch.tensor(sorted(set(ids)), device=logits_V.device)
    found = logits_V[seen]
    return logits_V.index_copy(0, seen, torch.where(found < 0, found * penalty, found / penalty))


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
