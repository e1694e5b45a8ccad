"""Decoding on a CPU: few, large operators per step.

Shapes: B batch, T positions, D model width, H heads, G heads of keys and values, K head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.kernels import native
from open_lm.kernels.skinny_matmul import TYPES, linear
from open_lm.model.attention import Attention
from open_lm.model.cache import LayerCache, StaticLayerCache
from open_lm.model.mask import Mask
from open_lm.model.norms import RMSNorm
from open_lm.model.rotary import Angles, LlamaRotary
from open_lm.model.slots import SlotLayerCache

MIN_PARAMETERS = 1 << 22
"""Parameters from which on the C++ kernels are compiled and used: reading smaller models takes no time."""


@contextlib.contextmanager
def cpu_decode(model: nn.Module) -> Iterator[None]:
    """Let a `model` on the CPU decode quickly until the block ends; what it computes stays the same."""
    with _kernels(model) as are_used:
        replaced: list[Any] = []
        for module in model.modules() if are_used else ():
            forward = cpu_forward(module)
            if forward is not None:
                replaced.append(module)
                replaced[-1].forward = forward
        try:
            yield
        finally:
            for module in replaced:
                del module.forward


@contextlib.contextmanager
def _kernels(model: nn.Module) -> Iterator[bool]:
    """Whether the C++ kernels are in use until the block ends; they are as they were afterwards."""
    before, weight = native.in_use(), next(model.parameters())
    worth_it = before or sum(p.numel() for p in model.parameters()) >= MIN_PARAMETERS
    wanted = weight.device.type == "cpu" and weight.dtype in TYPES and worth_it
    try:
        yield native.use_cpu_kernels() if wanted else False
    finally:
        if wanted:
            native.use_cpu_kernels(before)


def cpu_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """The fast CPU forward of a module; None for those that torch computes."""
    if type(module) is nn.Linear and module.bias is None:
        return partial(linear, module.weight)
    if type(module) is RMSNorm and module.dim % 16 == 0:
        return partial(norm, module)
    if isinstance(module, Attention) and module.is_softmax and module.head_dim % 2 == 0:
        return partial(attention, module, module.forward)
    return None


def norm(module: RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm as one operator."""
    if x.dtype != module.weight.dtype or torch.is_autocast_enabled("cpu"):
        return type(module).forward(module, x)
    return torch.ops.open_lm.rms_norm(x.contiguous(), module.weight, module.eps)


def attention(
    module: Attention,
    plain: Callable[..., Tensor],
    x_BTD: Tensor,
    angles: Angles | None,
    mask: Mask,
    cache: LayerCache | None = None,
) -> Tensor:
    """Attention of one new position; rotation, cache and attention are one operator."""
    if x_BTD.shape[1] != 1 or not isinstance(cache, StaticLayerCache | SlotLayerCache):
        return plain(x_BTD, angles, mask, cache)
    window, real = mask.reach.window or 0, None
    if isinstance(cache, SlotLayerCache):  # each row knows its length: no mask is needed
        memory, slots_B, lengths_B = (cache.k_NSGK, cache.v_NSGK), cache.rows.slots_B, cache.rows.lengths_B
    else:
        memory, slots_B = cache.memory_for(1), torch.arange(len(x_BTD))
        lengths_B = torch.full_like(slots_B, cache.length)
        if mask.real_BS is not None:
            real = mask.dense().expand(len(x_BTD), 1, 1, -1).flatten(1).contiguous()
    if x_BTD.dtype != memory[0].dtype or torch.is_autocast_enabled("cpu"):
        return plain(x_BTD, angles, mask, cache)
    q_BW, k_BW, v_BW = module.in_proj(x_BTD)[:, 0].split(module.widths, dim=-1)
    turns = (None, None) if angles is None else (angles.cos.contiguous(), angles.sin.contiguous())
    mixed_BW = torch.ops.open_lm.decode_attention(
        module.q_norm(q_BW),
        module.k_norm(k_BW),
        v_BW,
        *turns,
        isinstance(module.pos_embed, LlamaRotary),
        *memory,
        slots_B,
        lengths_B,
        window,
        real,
    )
    if isinstance(cache, StaticLayerCache):
        cache.length += 1
    return module.out_proj(mixed_BW[:, None])
