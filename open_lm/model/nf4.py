"""Weights in 4 bits: the NormalFloat of QLoRA (arXiv:2305.14314), in plain torch, with bitsandbytes' numbers.

Shapes: O outputs, I inputs, N elements, K blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Consecutive elements that share a scale."""
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution, scaled to -1 … 1 with an exact 0 (the paper's appendix E)."""


class NF4(NamedTuple):
    """A matrix in 4 bits: two levels to a byte, the first in its upper half; each block's largest magnitude, (K,)."""

    packed: Tensor
    scales: Tensor
    shape: tuple[int, ...]


def quantised(weight: Tensor) -> NF4:
    """Each element of `weight` as the nearest level times its block's largest magnitude."""
    flat_N = weight.detach().float().flatten()
    blocks_KB = F.pad(flat_N, (0, -len(flat_N) % BLOCK)).view(-1, BLOCK)
    scales = blocks_KB.abs().amax(1)
    relative_KB = blocks_KB / torch.where(scales > 0, scales, 1.0)[:, None]
    levels = torch.tensor(LEVELS, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    index_N = torch.bucketize(relative_KB.flatten(), middles).to(torch.uint8)
    return NF4((index_N[::2] << 4) | index_N[1::2], scales, tuple(weight.shape))


def dequantised(nf4: NF4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that `nf4` stands for."""
    levels = torch.tensor(LEVELS, device=nf4.packed.device)
    index_N = torch.stack([nf4.packed >> 4, nf4.packed & 15], dim=1).flatten().int()
    flat_N = (levels[index_N].view(-1, BLOCK) * nf4.scales[:, None]).flatten()
    n = 1
    for size in nf4.shape:
        n *= size
    return flat_N[:n].view(nf4.shape).to(dtype)


def nf4_linear(x: Tensor, nf4: NF4) -> Tensor:
    """`x @ weight.T`, with the weight in full only while it is multiplied, in the backward pass too."""
    return _NF4Linear.apply(x, nf4.packed, nf4.scales, nf4.shape)


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.shape, ctx.dtype = shape, x.dtype
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.dtype, ctx.in_dtype = dtype, x.dtype
        return x.to(dtype) @ dequantised(NF4(packed, scales, shape), dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scales = ctx.saved_tensors
        weight_OI = dequantised(NF4(packed, scales, ctx.shape), ctx.dtype)
        return (grad.to(ctx.dtype) @ weight_OI).to(ctx.in_dtype), None, None, None
