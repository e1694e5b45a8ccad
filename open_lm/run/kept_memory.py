"""Memory that the forward pass of one micro-batch keeps for the backward pass, from one pass on fake tensors.

Shapes: B sequences, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from open_lm.mesh import MeshShape
from open_lm.model.architecture import ModelConfig
from open_lm.model.transformer import Transformer


class Kept(NamedTuple):
    """Bytes of activations on one rank."""

    block: int
    """Kept of a block for its backward pass."""
    blocks: int
    """Kept of all blocks at the end of the forward pass; of those that are recomputed the inputs alone."""
    around: int
    """Kept of embeddings, the last norm and angles, which stand around the blocks."""


def kept_bytes(config: ModelConfig, shape: MeshShape, sequences: int, precision: str, *, recompute: float) -> Kept:
    """Activations of one micro-batch on a rank: those of a block, times the blocks.

    Measured on fake tensors over the rank's part of the sequence. Tensor parallelism divides all but the inputs of the
    first matrices, which are gathered; context parallelism adds the keys and values of the other ranks. `recompute`:
    the share of the blocks that keep their inputs alone.
    """
    seq_len, value = config.seq_len // shape.cp, 4 if precision == "fp32" else 2
    hidden = sequences * seq_len * config.hidden_dim * value
    keys = 2 * sequences * (config.seq_len - seq_len) * config.kv_heads * config.head_dim * value / shape.tp
    inputs = hidden * (2 if precision not in ("fp32", "bf16") else 1) / shape.tp
    config = replace(config, moe_capacity_factor=config.moe_capacity_factor or 1.0)  # without limits: even loads
    n_experts = sum(map(config.has_experts, range(config.n_layers)))
    block = blocks = around = 0.0
    for moe_freq, n in ((0, config.n_layers - n_experts), (1, n_experts)):
        if n == 0:
            continue
        one, two = (
            _kept_bytes(replace(config, n_layers=layers, moe_freq=moe_freq), sequences, seq_len, precision)
            for layers in (1, 2)
        )
        divided = (two - one - 2 * hidden) / shape.tp + 2 * hidden if shape.tp > 1 else two - one
        own = divided + keys
        block, around = max(block, own), (2 * one - two) / shape.tp
        blocks += n * (recompute * inputs + (1 - recompute) * own)
    return Kept(round(block), round(blocks), max(0, round(around)))


def _kept_bytes(config: ModelConfig, sequences: int, seq_len: int, precision: str) -> int:
    """Bytes that autograd saves in a forward pass of the whole model, weights not counted."""
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, (storage, tensor.shape))
        return tensor

    low, default = precision not in ("fp32", "bf16"), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if precision == "bf16" else torch.float32)
    try:
        with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model = Transformer(config).train()
            ids_BT = torch.zeros((sequences, seq_len), dtype=torch.long)
            with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):
                model(ids_BT, head=lambda hidden_BTD, weight_VD, **_: hidden_BTD.sum())
    finally:
        torch.set_default_dtype(default)
    owned = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    shapes = {shape for p in model.parameters() if p.ndim > 1 for shape in (p.shape, p.mT.shape)}  # cast by autocast
    return sum(
        storage.nbytes() for key, (storage, shape) in kept.items() if key not in owned and not (low and shape in shapes)
    )
