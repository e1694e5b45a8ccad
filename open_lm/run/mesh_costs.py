"""Costs of a mesh: what a rank holds and what it receives in a step, by arithmetic and one pass on fake tensors.

Shapes: B sequences, T positions, D model width, H heads, G heads of keys and values, K head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from open_lm import text
from open_lm.mesh import MeshShape
from open_lm.model import create_model
from open_lm.model.architecture import ModelConfig
from open_lm.model.moe import Experts
from open_lm.model.transformer import Transformer

WEIGHT_AND_STATE_BYTES = {"bf16": 8}
"""Weight, gradient and two moments of a parameter; 16 for all other precisions."""
LOGIT_CHUNK_BYTES = 1 << 25
"""The working memory of the loss at most: some rows of logits, twice in fp32."""


@dataclass(frozen=True)
class RankCosts:
    """Bytes that one rank holds, and that it receives from others in one optimizer step."""

    state: int
    """Weights, gradients and optimizer: its share."""
    gathered: int
    """Whole weights of the blocks that FSDP has gathered: the current and the next, and the outer layers'."""
    activations: int
    """Memory that the forward pass of one micro-batch keeps for the backward pass."""
    traffic: dict[str, int]
    """Received in a step, by axis."""

    @property
    def held(self) -> int:
        """All that is held at the peak."""
        return self.state + self.gathered + self.activations

    def __str__(self) -> str:
        received = ", ".join(f"{axis} {text.size(n)}" for axis, n in self.traffic.items() if n) or "nothing"
        return (
            f"memory a rank {text.size(self.held)}: {text.size(self.state)} weights, gradients and optimizer, "
            f"{text.size(self.gathered)} gathered weights, {text.size(self.activations)} activations of a micro-batch\n"
            f"traffic       received a rank and step: {received}"
        )


def rank_costs(
    config: ModelConfig,
    shape: MeshShape,
    *,
    sequences: int,
    accum: int,
    precision: str,
    sharded: bool,
    recompute: bool,
    low_gather: bool = False,
) -> RankCosts:
    """The costs of a rank of `shape` that computes `sequences` a step in `accum` micro-batches.

    `low_gather`: FSDP gathers weights in bf16 (--fsdp-amp, --fsdp-pure-bf16).
    """
    with torch.device("meta"):
        model = create_model(config)
    dense, experts = _parameters(model, config)
    n_dense, n_experts = dense / shape.tp / shape.n_shards, experts / shape.tp / shape.n_shards
    value = 4 if precision == "fp32" else 2
    local_dense, local_experts = dense / shape.tp, experts / shape.tp / shape.ep
    tables = 2 * config.vocab_size * config.hidden_dim / shape.tp
    blocks = (local_dense + local_experts - tables) / config.n_layers
    stored = 2 if precision == "bf16" else 4
    whole = 2 if low_gather else stored
    gathered = (tables + 2 * blocks) * whole if sharded and shape.n_shards > 1 else 0
    micro = max(1, sequences // accum)
    logits = 8 * micro * config.seq_len // shape.cp * config.vocab_size // shape.tp
    return RankCosts(
        state=round((n_dense + n_experts) * WEIGHT_AND_STATE_BYTES.get(precision, 16)),
        gathered=round(gathered),
        activations=activation_bytes(config, shape, micro, precision, recompute=recompute)
        + min(LOGIT_CHUNK_BYTES, logits),
        traffic=_traffic(config, shape, micro * accum, accum, value, local_dense, local_experts, stored, whole),
    )


def _parameters(model: nn.Module, config: ModelConfig) -> tuple[int, int]:
    """Numbers of dense layers and of layers of experts."""
    experts = sum(p.numel() for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
    return sum(p.numel() for p in model.parameters()) - experts, experts


def _traffic(
    config: ModelConfig,
    shape: MeshShape,
    sequences: int,
    accum: int,
    value: int,
    dense: float,
    experts: float,
    stored: int,
    whole: int,
) -> dict[str, int]:
    """Bytes received from other ranks in a step."""
    tokens = sequences * config.seq_len / shape.cp

    def others(n: int) -> float:
        return (n - 1) / n

    weights = dense * others(shape.n_shards) + experts * others(shape.fsdp * shape.cp)
    n_moe = sum(map(config.has_experts, range(config.n_layers)))
    keys = 2 * config.kv_heads * config.head_dim / shape.tp
    return {
        "fsdp": round(
            accum * weights * (2 * whole + stored)
        ),  # gathered twice, gradients scattered once, for each micro-batch
        "dp": round(2 * (dense / shape.n_shards + experts / (shape.fsdp * shape.cp)) * stored * others(shape.dp)),
        "tp": round((8 * config.n_layers + 4) * tokens * config.hidden_dim * value * others(shape.tp)),
        "cp": round(2 * config.n_layers * tokens * (shape.cp - 1) * keys * value),
        "ep": round(4 * n_moe * tokens * config.moe_top_k * config.hidden_dim * value * others(shape.ep)),
    }


def activation_bytes(config: ModelConfig, shape: MeshShape, sequences: int, precision: str, *, recompute: bool) -> int:
    """Bytes of activations of one micro-batch on a rank: those of a block, times the blocks.

    Measured on fake tensors over the rank's part of the sequence. Tensor parallelism divides all but the inputs of the
    first matrices, which are gathered; context parallelism adds the keys and values of the other ranks.
    """
    seq_len, value = config.seq_len // shape.cp, 4 if precision == "fp32" else 2
    hidden = sequences * seq_len * config.hidden_dim * value
    if recompute:
        kept = hidden * 4 // value if precision != "bf16" else hidden
        return round(config.n_layers * kept / shape.tp + _block_bytes(config, sequences, seq_len, precision) / shape.tp)
    block = _block_bytes(config, sequences, seq_len, precision)
    divided = (block - 2 * hidden) / shape.tp + 2 * hidden if shape.tp > 1 else block
    keys = 2 * sequences * config.seq_len * config.kv_heads * config.head_dim * value / shape.tp
    return round(config.n_layers * (divided + (keys if shape.cp > 1 else 0)))


def _block_bytes(config: ModelConfig, sequences: int, seq_len: int, precision: str) -> int:
    """Bytes of activations of one block."""
    one, two = (
        _kept_bytes(replace(config, n_layers=n, moe_freq=min(config.moe_freq, 1)), sequences, seq_len, precision)
        for n in (1, 2)
    )
    return two - one


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
            with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=True):
                model(ids_BT, head=lambda hidden_BTD, weight_VD, **_: hidden_BTD.sum())
    finally:
        torch.set_default_dtype(default)
    owned = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    shapes = {shape for p in model.parameters() if p.ndim > 1 for shape in (p.shape, p.mT.shape)}  # cast by autocast
    return sum(
        storage.nbytes() for key, (storage, shape) in kept.items() if key not in owned and not (low and shape in shapes)
    )
