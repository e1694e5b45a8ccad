"""Low-rank adapters of linear layers: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and DoRA (arXiv:2402.09353).

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.errors import ConfigError
from open_lm.model.nf4 import NF4, dequantised, nf4_linear, quantised

PARTS = ("lora_A", "lora_B", "lora_scale", "lora_magnitude")
"""Suffixes that an adapter adds to the names of its layer."""
VALUE_HEAD = "value_head.weight"


class LoraLinear(nn.Linear):
    """A linear layer `x W^T + scale * dropout(x) A^T B^T`, each row scaled to its `lora_magnitude` with DoRA.

    The weight keeps its name, and is not trained. B is 0 at the start, so that nothing changes by adding an adapter.
    """

    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    lora_scale: Tensor
    lora_magnitude: nn.Parameter | None
    dropout: float
    is_on: bool

    def forward(self, x: Tensor) -> Tensor:
        plain = self.plain(x)
        if not self.is_on:
            return plain
        added = F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.lora_A), self.lora_B)
        added = self.lora_scale.to(added.dtype) * added
        if self.lora_magnitude is None:
            return plain + added
        ratio = (self.lora_magnitude / self.row_norms()).to(plain.dtype)
        unbiased = plain if self.bias is None else plain - self.bias
        return plain + (ratio - 1) * unbiased + ratio * added  # exactly `plain` while the ratio is 1 and B is 0

    def plain(self, x: Tensor) -> Tensor:
        """The layer's output without its adapter."""
        return F.linear(x, self.weight, self.bias)

    def row_norms(self) -> Tensor:
        """The norm of each row of the adapted weight, (O,); a constant to the gradient, as the paper has it."""
        with torch.no_grad():
            return torch.linalg.vector_norm(self.weight + self.lora_scale * (self.lora_B @ self.lora_A), dim=1)


class NF4LoraLinear(LoraLinear):
    """An adapted layer whose frozen weight is held in 4 bits (QLoRA); state dicts have it as what the bits stand for.

    Reading such a weight again gives the same bits, so that a run that is resumed goes on bit for bit.
    """

    packed: Tensor
    scales: Tensor
    shape_OI: tuple[int, ...]  # noqa: N815

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the bits stand for, recomputed at every call."""
        return dequantised(self.nf4, self.lora_A.dtype)

    @property
    def nf4(self) -> NF4:
        return NF4(self.packed, self.scales, self.shape_OI)

    def hold(self, weight: Tensor) -> None:
        """Take `weight`, rounded to 4 bits, with scales that the type of state dicts can hold."""
        nf4 = quantised(weight.to(self.lora_A.device, self.lora_A.dtype))
        self.register_buffer("packed", nf4.packed, persistent=False)
        self.register_buffer("scales", nf4.scales, persistent=False)
        self.shape_OI = nf4.shape

    def plain(self, x: Tensor) -> Tensor:
        found = nf4_linear(x, self.nf4)
        return found if self.bias is None else found + self.bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: Any, *lists: Any) -> None:
        missing, unexpected, _ = lists
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        name = f"{prefix}weight"
        if name in unexpected:
            unexpected.remove(name)
        if name not in state_dict:
            missing.append(name)
        elif state_dict[name].shape != self.shape_OI:
            lists[2].append(f"{name}: {tuple(state_dict[name].shape)}, here {self.shape_OI}")
        else:
            self.hold(state_dict[name])


def hold_in_nf4(model: nn.Module) -> None:
    """Hold the frozen weights of all adapted layers of `model` in 4 bits, in place."""
    for layer in adapters_of(model).values():
        weight = layer.weight.detach()
        del layer._parameters["weight"]
        layer.__class__ = NF4LoraLinear
        cast("NF4LoraLinear", layer).hold(weight)


def holds_nf4(model: nn.Module) -> bool:
    """Whether some weights are held in 4 bits."""
    return any(isinstance(module, NF4LoraLinear) for module in model.modules())


def add_adapter(
    linear: nn.Module, rank: int, scale: float, *, dropout: float = 0.0, with_magnitude: bool = False
) -> LoraLinear:
    """Turn a linear layer into one with an adapter, in place; its weights stay the same tensors and are frozen."""
    assert isinstance(linear, nn.Linear)
    weight = linear.weight
    linear.__class__ = LoraLinear
    adapted: Any = linear
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    adapted.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1], **options))
    adapted.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, **options))
    adapted.register_buffer("lora_scale", torch.tensor(scale, device=weight.device))
    nn.init.kaiming_uniform_(adapted.lora_A, a=math.sqrt(5))
    adapted.dropout, adapted.is_on, adapted.lora_magnitude = dropout, True, None
    if with_magnitude:
        adapted.lora_magnitude = nn.Parameter(adapted.row_norms())
    weight.requires_grad_(False)
    return adapted


def adapt(
    model: nn.Module,
    rank: int,
    scale: float,
    *,
    targets: Sequence[str] = (),
    dropout: float = 0.0,
    with_magnitude: bool = False,
) -> None:
    """Freeze `model` and give adapters to its linear layers: those whose last name is in `targets`, or all.

    The output layer and the routers of experts keep their weights.

    Raises:
        ConfigError: no layer has such a name.
    """
    model.requires_grad_(False)
    found = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    kept = ("output", "lm_head", "embed_out", "router", "gate", "value_head", "score")
    chosen = [
        module
        for name, module in found
        if (name.rpartition(".")[2] in targets if targets else name.rpartition(".")[2] not in kept)
    ]
    names = sorted({name.rpartition(".")[2] for name, _ in found})
    missing = [target for target in targets if target not in names]
    if missing or not chosen:
        raise ConfigError(f"--lora-targets {' '.join(missing)}: no such linear layer. There are {', '.join(names)}.")
    for module in chosen:
        add_adapter(module, rank, scale, dropout=dropout, with_magnitude=with_magnitude)


def adapters_of(model: nn.Module) -> dict[str, LoraLinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block `model` computes as it did before it got adapters."""
    layers = list(adapters_of(model).values())
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def is_addition(name: str) -> bool:
    """Whether a name of weights is that of an adapter or a value head: what base models do not have."""
    return name.rpartition(".")[2] in PARTS or name == VALUE_HEAD


def without_additions(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plain model: adapters are merged into theirs, in fp32, and value heads left out."""
    plain = {name: tensor for name, tensor in weights.items() if not is_addition(name)}
    for name in weights:
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            plain[f"{layer}.weight"] = merged(weights, layer)
    return plain


def merged(weights: Mapping[str, Tensor], layer: str) -> Tensor:
    """The weight of `layer` with its adapter in it, in the type of the weight; the sum is taken in fp32."""
    weight = weights[f"{layer}.weight"]
    parts = {part: weights[f"{layer}.{part}"].float() for part in PARTS if f"{layer}.{part}" in weights}
    whole = weight.float() + parts["lora_scale"] * (parts["lora_B"] @ parts["lora_A"])
    if "lora_magnitude" in parts:
        whole *= (parts["lora_magnitude"] / torch.linalg.vector_norm(whole, dim=1))[:, None]
    return whole.to(weight.dtype)
