"""Attention back ends by name.

Shapes: B batch, T queries, S keys, H heads, G heads of keys and values (H is a multiple of G), K head width.
Every back end has the signature `attend(q_BTHK, k_BSGK, v_BSGK, mask) -> mixed_BTHK`. What narrows attention (a window,
documents, padding) is known to the Mask alone: a back end asks it whether the case is plainly causal, and else for the
form that it computes with, `mask.dense()` in the simplest case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels.attention import causal_attention
from open_lm.model.attend_masked import attention, masked_attention
from open_lm.model.config import ModelConfig
from open_lm.model.mask import Mask
from open_lm.model.variants import ATTENTIONS, ATTN_ACTIVATIONS, SEQ_SCALARS

Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


def build_attend(config: ModelConfig) -> Attend:
    """The back end that `config.attn_name` names, ready to call."""
    return ATTENTIONS.load(config.attn_name)(config)


def fastest_attention(config: ModelConfig) -> Attend:
    """Softmax attention through torch, or on a CPU by a C++ kernel where one is in use."""

    def attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask) -> Tensor:
        if mask.is_causal and mask.n_queries == mask.n_keys:
            return causal_attention(q_BTHK, k_BSGK, v_BSGK)
        return scaled_dot_product(q_BTHK, k_BSGK, v_BSGK, mask)

    return attend


def torch_attention(config: ModelConfig) -> Attend:
    """Softmax attention through torch, which picks its fastest kernel."""
    return scaled_dot_product


def scaled_dot_product(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask) -> Tensor:
    """softmax(q k' / sqrt(K)) v under the mask."""
    if mask.is_causal and mask.n_queries in (1, mask.n_keys):
        return attention(q_BTHK, k_BSGK, v_BSGK, is_causal=mask.n_queries > 1)
    return masked_attention(q_BTHK, k_BSGK, v_BSGK, mask)


def custom_attention(config: ModelConfig) -> Attend:
    """`activation(q k' / sqrt(K)) * L^-alpha`, applied to v: attention without softmax (arXiv:2309.08586)."""
    activation = ATTN_ACTIVATIONS.load(config.attn_activation or "softmax")
    seq_scalar = SEQ_SCALARS.load(config.attn_seq_scalar or "none")
    alpha = config.attn_seq_scalar_alpha or 0.0

    def attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Mask) -> Tensor:
        length = mask.n_keys if mask.is_causal else keys_of_sequence(mask.dense(), mask.n_queries)
        seen = mask.dense()
        repeats = q_BTHK.shape[2] // k_BSGK.shape[2]
        k_BSHK, v_BSHK = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k_BSGK, v_BSGK))
        scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * q_BTHK.shape[-1] ** -0.5
        weights_BHTS = activation(scores_BHTS.masked_fill(~seen, -torch.inf)).masked_fill(~seen, 0.0)
        return torch.einsum("bhts,bshk->bthk", (weights_BHTS * seq_scalar(length) ** -alpha).type_as(v_BSHK), v_BSHK)

    return attend


def keys_of_sequence(mask: Tensor, n_queries: int) -> Tensor:
    """Number of keys of each query's sequence, (..., T, 1): those it sees, and its later positions, which see it.

    So padding on the left is not counted, nor are other documents; a whole causal mask gives the number of all keys.
    """
    among_new = mask[..., -n_queries:]
    n_later = among_new.sum(-2) - among_new.diagonal(dim1=-2, dim2=-1).long()
    return (mask.sum(-1) + n_later)[..., None]


def relu_squared(scores: Tensor) -> Tensor:
    """relu(x)^2 (arXiv:2109.08668)."""
    return F.relu(scores).square()


def unchanged(scores: Tensor) -> Tensor:
    """The scores themselves: linear attention."""
    return scores


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the keys."""
    return torch.softmax(scores, dim=-1)


def n_keys(length: int | Tensor) -> Any:
    """L of `max`: how many keys there are."""
    return length * 1.0


def mean_keys_seen(length: int | Tensor) -> Any:
    """L of `avg`: how many keys a query of a whole causal sequence sees on average."""
    return (length - 1) / 2 + 1


def one(length: int | Tensor) -> Any:
    """L of `none`."""
    return 1.0
