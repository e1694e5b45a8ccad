"""PEFT's format of adapters: adapter_model.safetensors and adapter_config.json, for the class that transformers has.

Our layers pack what transformers keeps apart (q, k, v; gate, up), and may order rows otherwise. Which row of theirs is
which row of ours is found by sending numbered rows through the same conversion that exports the weights. Out of our
packed layers A goes to each part, B is cut by rows: exact. The other way the packed layer gets the parts' A one below
the other and a block-diagonal B: exact, at the sum of their ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.errors import CheckpointError
from open_lm.model.architecture import MambaConfig
from open_lm.model.hf_config import HFConfig
from open_lm.model.lora import adapters_of, add_adapter
from open_lm.weights.to_hf import native_family, to_native

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """The adapter of one linear layer: A (R, I), B (O, R), the scale of their product, and DoRA's magnitudes (O,)."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class LayerRows:
    """The rows of one of our layers that one of PEFT's layers covers."""

    layer: str
    rows: Tensor


def save_adapter(model: nn.Module, config: Any, folder: str | Path, *, base: str = "", rslora: bool = False) -> Path:
    """Write the adapters of `model`, whose architecture is `config`, as PEFT reads them; the folder.

    Raises:
        CheckpointError: it has none.
    """
    from safetensors.torch import save_file

    ours = {name: _adapter(layer) for name, layer in adapters_of(model).items()}
    if not ours:
        raise CheckpointError("the model has no adapters to save: it was not trained with --lora-rank.")
    theirs = to_theirs(ours, config, model)
    tensors: dict[str, Tensor] = {}
    for name, adapter in theirs.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.a.clone()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.b.clone()
        if adapter.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = adapter.magnitude.clone()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(_config(theirs, base, rslora=rslora), indent=2) + "\n")
    return folder


def load_adapter(model: nn.Module, config: Any, folder: str | Path) -> None:
    """Give `model` the adapters that PEFT saved in `folder`; its own weights are frozen.

    Raises:
        CheckpointError: the folder is no LoRA adapter, or one of other layers than the model has.
    """
    settings, tensors = _read(Path(folder))
    theirs = _adapters(settings, tensors)
    model.requires_grad_(False)
    for name, adapter in to_ours(theirs, config, model).items():
        layer = add_adapter(
            model.get_submodule(name), len(adapter.a), adapter.scale, with_magnitude=adapter.magnitude is not None
        )
        with torch.no_grad():
            layer.lora_A.copy_(adapter.a)
            layer.lora_B.copy_(adapter.b)
            if layer.lora_magnitude is not None and adapter.magnitude is not None:
                layer.lora_magnitude.copy_(adapter.magnitude)


def to_theirs(ours: Mapping[str, Adapter], config: Any, model: nn.Module) -> dict[str, Adapter]:
    """Our adapters as those of the layers that transformers has."""
    found = {}
    for name, place in their_rows(config, model).items():
        adapter = ours.get(place.layer)
        if adapter is not None:
            magnitude = None if adapter.magnitude is None else adapter.magnitude[place.rows]
            found[name] = Adapter(adapter.a, adapter.b[place.rows], adapter.scale, magnitude)
    return found


def to_ours(theirs: Mapping[str, Adapter], config: Any, model: nn.Module) -> dict[str, Adapter]:
    """Adapters of transformers' layers as those of ours.

    Raises:
        CheckpointError: one is of a layer that the model has not, or the parts of a packed layer differ in scale.
    """
    places = their_rows(config, model)
    if unknown := [name for name in theirs if name not in places]:
        raise CheckpointError(f"the adapter is of another model: {unknown[0]} is none of its linear layers.")
    parts: dict[str, list[tuple[LayerRows, Adapter]]] = {}
    for name, adapter in theirs.items():
        parts.setdefault(places[name].layer, []).append((places[name], adapter))
    return {layer: _packed(layer, found, model) for layer, found in parts.items()}


def _packed(layer: str, parts: list[tuple[LayerRows, Adapter]], model: nn.Module) -> Adapter:
    """One adapter that does what those of the parts of `layer` do."""
    weight: Any = model.get_submodule(layer).weight
    scales, total = {adapter.scale for _, adapter in parts}, sum(len(adapter.a) for _, adapter in parts)
    if len(scales) > 1:
        raise CheckpointError(f"the adapter scales the parts of {layer} by {sorted(scales)}: they need one scale.")
    b, column = torch.zeros(len(weight), total), 0
    with_magnitude = parts[0][1].magnitude is not None
    magnitude = torch.linalg.vector_norm(weight.detach().float().cpu(), dim=1) if with_magnitude else None
    for place, adapter in parts:
        b[place.rows, column : column + len(adapter.a)] = adapter.b.float()
        column += len(adapter.a)
        if magnitude is not None and adapter.magnitude is not None:
            magnitude[place.rows] = adapter.magnitude.float()
    return Adapter(torch.cat([adapter.a.float() for _, adapter in parts]), b, scales.pop(), magnitude)


def their_rows(config: Any, model: nn.Module) -> dict[str, LayerRows]:
    """For each linear layer of transformers' class, the layer of ours and the rows of it that it is made of."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(config, HFConfig):
        return {name.removeprefix("model."): LayerRows(name, _all_rows(module)) for name, module in linear.items()}
    if not isinstance(config, MambaConfig) and native_family(config) is None:
        return {f"model.{name}": LayerRows(name, _all_rows(module)) for name, module in linear.items()}
    numbers = {name: number for number, name in enumerate(linear)}
    marked = {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in linear and name.endswith(".weight"):
            rows = _all_rows(linear[layer])
            marked[name] = torch.stack([torch.full_like(rows, numbers[layer]), rows], dim=1)
        else:
            marked[name] = torch.full(tensor.shape, -1)
    names, places = list(linear), {}
    for name, tensor in to_native(config, marked)[1].items():
        if name.endswith(".weight") and tensor.ndim == 2 and tensor.shape[1] == 2 and tensor[0, 0] >= 0:
            places[name.removesuffix(".weight")] = LayerRows(names[int(tensor[0, 0])], tensor[:, 1])
    return places


def _all_rows(module: nn.Linear) -> Tensor:
    return torch.arange(module.weight.shape[0])


def _adapter(layer: Any) -> Adapter:
    magnitude = None if layer.lora_magnitude is None else layer.lora_magnitude.detach().cpu()
    return Adapter(layer.lora_A.detach().cpu(), layer.lora_B.detach().cpu(), layer.lora_scale.item(), magnitude)


def _config(adapters: Mapping[str, Adapter], base: str, *, rslora: bool) -> dict[str, Any]:
    """PEFT's settings; layers of another rank than the first are named one by one."""
    first = next(iter(adapters.values()))
    rank = len(first.a)
    alpha = first.scale * (rank**0.5 if rslora else rank)
    others = {name: len(adapter.a) for name, adapter in adapters.items() if len(adapter.a) != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "use_dora": first.magnitude is not None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapters}),
        "rank_pattern": others,
        "alpha_pattern": {
            name: adapters[name].scale * (rank**0.5 if rslora else rank) for name, rank in others.items()
        },
    }


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from open_lm.weights.file import load_file

    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: holds no {CONFIG}. Give a folder that PEFT saved.")
    settings = json.loads((folder / CONFIG).read_text())
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder}: an adapter of type {settings.get('peft_type')!r}; LoRA is read here.")
    return settings, load_file(str(folder / WEIGHTS))


def _adapters(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Adapter]:
    found = {}
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors[f"{layer}.lora_B.weight"]
        plain = layer.removeprefix(PREFIX)
        alpha = _of_pattern(settings.get("alpha_pattern") or {}, plain, settings["lora_alpha"])
        scale = alpha / (len(a) ** 0.5 if settings.get("use_rslora") else len(a))
        found[plain] = Adapter(a, b, scale, tensors.get(f"{layer}.lora_magnitude_vector"))
    if not found:
        raise CheckpointError(f"{WEIGHTS}: holds no lora_A. Give a folder that PEFT saved.")
    return found


def _of_pattern(pattern: Mapping[str, Any], name: str, otherwise: float) -> float:
    return next((value for key, value in pattern.items() if name == key or name.endswith(f".{key}")), otherwise)
