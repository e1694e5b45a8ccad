"""Causal softmax attention: by a C++ kernel for the CPU where one is in use and runs, by torch everywhere else.

Shapes: B batch, T positions, H heads, G heads of keys and values (H is a multiple of G), K head width.

What the kernel saves: scores stay in cache, and heads of width 8 to 64, whose softmax costs as much as their products,
are not padded to what a matrix product likes (blocked as FlashAttention, arXiv:2205.14135).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels import native
from open_lm.kernels.operators import aligned

TYPES = (torch.float32, torch.bfloat16)
LONGEST = 1 << 14
"""Positions up to which a row of scores stays in cache."""


def causal_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """softmax(q k' / sqrt(K)) v, each position seeing itself and those before it; (B, T, H, K)."""
    if runs_for(q_BTHK, k_BTGK, v_BTGK):
        q, k, v = (aligned(x) for x in (q_BTHK, k_BTGK, v_BTGK))
        return torch.ops.open_lm.attention_forward(q, k, v)[0]
    return reference(q_BTHK, k_BTGK, v_BTGK)


def reference(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """The same by torch's own attention."""
    mixed_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        is_causal=True,
        enable_gqa=k_BTGK.shape[2] != q_BTHK.shape[2],
    )
    return mixed_BHTK.transpose(1, 2)


def runs_for(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> bool:
    """Whether the kernel computes this call: a training step on a CPU, in a type and of a size it was made for."""
    if not (native.in_use() and q_BTHK.device.type == "cpu" and q_BTHK.dtype in TYPES and torch.is_grad_enabled()):
        return False
    heads = k_BTGK.shape[0] * k_BTGK.shape[2]  # threads own heads of keys: with too few of them cores would idle
    return (
        q_BTHK.dtype == k_BTGK.dtype == v_BTGK.dtype
        and q_BTHK.shape[1] == k_BTGK.shape[1] <= LONGEST
        and q_BTHK.shape[-1] % 2 == 0
        and 2 * heads >= torch.get_num_threads()
    )
