"""Softmax attention under a mask, without the dense mask of a whole sequence.

Shapes: B batch, T queries, S keys, H heads, G heads of keys and values (H is a multiple of G), K head width.

On a GPU torch's flex_attention computes it (arXiv:2412.05496); everywhere else it goes block by block of queries, each
with the keys that any of the block sees: the work and the memory of a window or of short documents are linear in T.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from open_lm.model.mask import Mask

QUERY_BLOCK = 256
"""Queries that share one range of keys."""
MIN_FLEX_QUERIES = 128
"""One of its blocks; with fewer, as in decoding, there is nothing to skip."""
FLEX_WIDTHS = (16, 32, 64, 128, 256)
"""Head widths that flex_attention's kernels take on every GPU."""


def masked_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask) -> Tensor:
    """softmax(q k' / sqrt(K)) v over the keys that `mask` shows to each query, (B, T, H, K)."""
    if flex_runs_for(q_BTHK, mask):
        return by_flex(q_BTHK, k_BSGK, v_BSGK, mask, compiled=True)
    return in_blocks(q_BTHK, k_BSGK, v_BSGK, mask)


def in_blocks(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask) -> Tensor:
    """Block by block of queries, by torch's own attention."""
    mixed = []
    for start in range(0, mask.n_queries, QUERY_BLOCK):
        queries = slice(start, min(start + QUERY_BLOCK, mask.n_queries))
        keys = mask.keys_seen(queries)
        mixed.append(attention(q_BTHK[:, queries], k_BSGK[:, keys], v_BSGK[:, keys], visible=mask.part(queries, keys)))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)


def attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, visible: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """torch's attention in our order of dimensions; `visible` is true where a query sees a key."""
    mixed_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=visible,
        is_causal=is_causal,
        enable_gqa=k_BSGK.shape[2] != q_BTHK.shape[2],
    )
    return mixed_BHTK.transpose(1, 2)


def flex_runs_for(q_BTHK: Tensor, mask: Mask) -> bool:
    """Whether flex_attention computes this call: many queries on a GPU, in widths that its kernels take."""
    knows_the_rule = type(mask) is Mask
    return knows_the_rule and q_BTHK.is_cuda and mask.n_queries >= MIN_FLEX_QUERIES and q_BTHK.shape[-1] in FLEX_WIDTHS


def by_flex(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask, *, compiled: bool) -> Tensor:
    """Through flex_attention; it skips blocks of keys that no query of a block sees."""
    attend, _ = _flex(compiled)
    mixed_BHTK = attend(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        block_mask=mask.once("flex", lambda: block_mask(mask, compiled=compiled)),
        enable_gqa=k_BSGK.shape[2] != q_BTHK.shape[2],
    )
    return mixed_BHTK.transpose(1, 2)


def block_mask(mask: Mask, *, compiled: bool) -> BlockMask:
    """`mask` as flex_attention takes it; compiled, it is made without the dense mask."""
    first, in_reach, documents_BS, real_BS = mask.first_query, mask.reach.rule(), mask.documents_BS, mask.real_BS
    rows = next((len(x) for x in (documents_BS, real_BS) if x is not None), None)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query + first
        seen = in_reach(place, key)
        if documents_BS is not None:
            seen = seen & (documents_BS[b, place] == documents_BS[b, key])
        if real_BS is not None:
            seen = (seen & (real_BS[b, key] != 0)) | (key == place)
        return seen

    _, create = _flex(compiled)
    return create(sees, rows, None, mask.n_queries, mask.n_keys, device=str(mask.device))


@cache
def _flex(compiled: bool) -> tuple[Callable[..., Any], Callable[..., BlockMask]]:
    if not compiled:
        return flex_attention, create_block_mask
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)
