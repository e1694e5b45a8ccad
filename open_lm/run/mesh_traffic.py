"""Traffic of a mesh: the bytes that a rank receives from others in one optimizer step, by axis.

Shapes: T positions, D model width, H heads, G heads of keys and values, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from open_lm.model.architecture import ModelConfig
from open_lm.model.moe import MixtureOfExperts
from open_lm.model.split import Split, SplitColumns, SplitRows
from open_lm.run.local_weights import LocalWeights


def traffic(
    model: nn.Module,
    config: ModelConfig,
    weights: LocalWeights,
    *,
    tokens: int,
    accum: int,
    value: int,
    stored: int,
    gathered: int,
    recompute: float,
    whole_gradients: bool = False,
) -> dict[str, int]:
    """Bytes received in a step of `tokens` on a rank, in `accum` micro-batches; sums over few numbers are left out.

    `value`, `stored` and `gathered`: bytes of a number that is multiplied, of a weight, of one that FSDP gathers.
    """
    shape = weights.shape
    width = tokens * config.hidden_dim
    n_moe = sum(isinstance(module, MixtureOfExperts) for module in model.modules())
    rows = config.moe_top_k * (config.moe_capacity_factor or 1.0)  # of experts for a token, in the mean
    keys = 2 * tokens * config.kv_heads * config.head_dim / shape.tp
    found = {
        "fsdp": _sharding(weights, stored, gathered, accum, 1 if whole_gradients else accum),
        "dp": 2 * weights.share * stored * _others(shape.dp),
        "tp": width * _others(shape.tp) * _divided(model, value, stored, n_moe, recompute),
        "cp": config.n_layers * (2 + recompute) * keys * value * (shape.cp - 1),
        "ep": (4 + 2 * recompute) * n_moe * width * rows * value * _others(shape.ep),
    }
    return {axis: round(n) for axis, n in found.items()}


def _others(n: int) -> float:
    """The share of the others among `n` ranks."""
    return (n - 1) / n


def _sharding(weights: LocalWeights, stored: int, gathered: int, n_gathers: int, n_scatters: int) -> float:
    """Blocks are gathered for both passes, the outer layers once; gradients are scattered."""
    shape = weights.shape
    dense, experts = _others(shape.n_shards), _others(shape.fsdp * shape.cp)
    blocks = weights.inner * dense + weights.experts * experts
    tables = weights.tables * dense
    return (2 * blocks + tables) * gathered * n_gathers + (blocks + tables) * stored * n_scatters


def _divided(model: nn.Module, value: int, stored: int, n_moe: int, recompute: float) -> float:
    """Bytes that travel for each number of the hidden states, both passes together.

    Each matrix whose rows are divided, each mixture and the output layer gathers them; each whose columns are divided,
    each mixture and the embedding sums and scatters. The backward pass does the reverse; recomputation does all again
    but the last of a block, whose result nobody keeps.
    """
    plans = list(_plans(model))
    entering = sum(isinstance(split, SplitRows) for split in plans)
    leaving = sum(isinstance(split, SplitColumns) for split in plans)
    again = entering + leaving - len(list(_layers(model)))
    return value * (2 * (entering + leaving + n_moe) + again * recompute) + stored * (2 * n_moe + 4)


def _plans(model: nn.Module) -> Iterator[Split]:
    for module in model.modules():
        declared: Any = getattr(module, "tensor_plan", dict)
        yield from declared().values()


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    layers: Any = model.layers
    yield from layers
