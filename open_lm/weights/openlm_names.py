"""Names that OpenLM stores weights under and we do not: its gelu layers twice over, its experts as MegaBlocks has them.

Pure: dicts in, dicts out. Shapes: E experts, D model width, F hidden width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from open_lm.errors import CheckpointError

ROUTER = "feed_forward.router.layer.weight"
SECOND_NAMES = {"_ff_w1.weight": "feed_forward.0.weight", "_ff_w2.weight": "feed_forward.2.weight"}
"""Names under which OpenLM stores the two matrices of a gelu layer once more."""


def has_megablocks(weights: Mapping[str, Tensor]) -> bool:
    """Whether the experts in `weights` lie as MegaBlocks lays them."""
    return any(name.endswith(ROUTER) for name in weights)


def from_openlm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under our names.

    Raises:
        CheckpointError: experts have something that ours have not; named.
    """
    kept = {name: tensor for name, tensor in weights.items() if "._ff_w1" not in name and "._ff_w2" not in name}
    for name in [name for name in kept if name.endswith(ROUTER)]:
        kept |= _experts_from_megablocks(kept, name.removesuffix(ROUTER))
    return kept


def only_name(name: str) -> str:
    """One name of the two that a matrix may have."""
    for second, first in SECOND_NAMES.items():
        name = name.replace(second, first)
    return name.replace("._ff_w", ".feed_forward.experts.mlp.w")


def moments_from_openlm(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """An optimizer's moments of each weight, by our names and in our layout.

    Raises:
        CheckpointError: experts have something that ours have not; named.
    """
    out: dict[str, dict[str, Any]] = {}
    for kind in sorted({kind for moments in state.values() for kind in moments}):
        gathered = {name: moments[kind] for name, moments in state.items() if kind in moments}
        shaped = {name: value for name, value in gathered.items() if isinstance(value, Tensor) and value.ndim}
        plain = {our_name(name): value for name, value in gathered.items() if name not in shaped}
        for name, value in (plain | from_openlm(shaped)).items():
            out.setdefault(name, {})[kind] = value
    return {name: moments for name, moments in out.items() if not name.endswith(".experts.bias")}


def our_name(name: str) -> str:
    """Our name of a weight that the layout of MegaBlocks calls `name`."""
    return name.replace(".router.layer.", ".router.").replace(".mlp.w1", ".w12").replace(".mlp.w2", ".w3")


def to_openlm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names, and in the layout, that OpenLM's own code reads."""
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, part, rest = name.partition("feed_forward.")
        if part and rest == "router.weight":
            out[f"{layer}{ROUTER}"] = tensor
        elif part and rest in ("experts.w12", "experts.w3"):
            number = "1" if rest == "experts.w12" else "2"
            out[f"{layer}_ff_w{number}"] = out[f"{layer}feed_forward.experts.mlp.w{number}"] = tensor.mT.contiguous()
        else:
            out[name] = tensor
            out |= {layer + second: tensor for second, first in SECOND_NAMES.items() if part + rest == first}
        if part and rest == "experts.w3":  # never read there, but part of the state
            out[f"{layer}feed_forward.experts.bias"] = tensor.new_zeros(tensor.shape[1])
    return out


def _experts_from_megablocks(weights: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The experts of one layer, taken out of `weights`.

    MegaBlocks' MoE keeps w1 as (E, D, F) and w2 as (E, F, D); its dropless one all of w1, v1 and w2 as (E F, D).
    """
    router = weights.pop(layer + ROUTER)
    prefix = f"{layer}feed_forward.experts."
    parts = {name: weights.pop(prefix + name, None) for name in ("mlp.w1", "mlp.v1", "mlp.w2", "bias")}
    w1, v1, w2, bias = parts.values()
    if w1 is None or w2 is None:
        raise CheckpointError(f"{prefix}mlp.w1 or w2 is missing beside {layer}{ROUTER}. Use another copy.")
    if bias is not None and bias.any():
        raise CheckpointError(f"{prefix}bias is not zero: our experts have no biases.")
    n_experts = len(router)
    if w1.ndim == 2:
        w1, w2 = w1.unflatten(0, (n_experts, -1)), w2.unflatten(0, (n_experts, -1)).mT
        v1 = None if v1 is None else v1.unflatten(0, (n_experts, -1))
    else:
        w1, w2 = w1.mT, w2.mT
    return {
        f"{layer}feed_forward.router.weight": router,
        f"{layer}feed_forward.experts.w12": (w1 if v1 is None else torch.cat((w1, v1), dim=1)).contiguous(),
        f"{layer}feed_forward.experts.w3": w2.contiguous(),
    }
