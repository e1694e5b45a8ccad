"""State dicts with whole tensors by name, however the model is sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from open_lm.errors import CheckpointError
from open_lm.model.lora import holds_nf4, is_addition
from open_lm.weights.file import has_plain_megablocks, moments_from_openlm, only_name, plain_name

CONSTANTS = ".inv_freq"
"""Endings of the names of constants, which files of weights may hold or not."""
FREE_KEYS = {"seq_len", "attn_name", "moe_backend"}
"""Keys of an architecture that do not change what its weights mean."""


def require_same_architecture(stored: Mapping[str, Any], here: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint of another architecture: rotary and head_rotary weights, say, look the same.

    Raises:
        CheckpointError: naming each key that differs.
    """
    shared = (set(stored) & set(here)) - FREE_KEYS
    differences = [f"{key} {stored[key]!r} (here {here[key]!r})" for key in sorted(shared) if stored[key] != here[key]]
    if differences:
        raise CheckpointError(
            f"{path} is of another model: {', '.join(differences)}. "
            "Leave out --model and its flags to take the checkpoint's."
        )


def require_same_experts(names: Mapping[str, Any], here: Mapping[str, Any], path: str) -> None:
    """Refuse experts as MegaBlocks has them for a model with others: without gates they differ in nothing but a curve.

    Raises:
        CheckpointError: naming the flag.
    """
    if has_plain_megablocks(names) and here.get("moe_expert_type") != "megablocks":
        raise CheckpointError(f"{path} holds experts as MegaBlocks has them: give --moe-expert-type megablocks.")


def load_weights(model: nn.Module, weights: dict[str, Any], origin: str, *, broadcast: bool) -> None:
    """Put `weights` (needed on rank 0 only, with `broadcast`) into `model` on every rank.

    Raises:
        CheckpointError: a weight is missing, left over, or has another shape.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast, strict=True)
    additions = _additions_of(model)
    if weights:
        weights = additions | weights  # where those of a base model have none
        own = {name: value for name, value in model.state_dict().items() if name.endswith(CONSTANTS)}
        constants = {plain_name(name): value for name, value in own.items()}
        weights = constants | weights
    try:
        if holds_nf4(model):
            _load_plainly(model, weights, broadcast=broadcast)
        else:
            set_model_state_dict(model, weights, options=options)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{origin} does not fit the model: {error}. Give the --model it was trained with."
        ) from error


def _load_plainly(model: nn.Module, weights: dict[str, Any], *, broadcast: bool) -> None:
    """Load `weights` (of rank 0, with `broadcast`) by the model's own names: torch's function for ranks looks for
    parameters, and those held in 4 bits are none."""
    box = [weights]
    if broadcast:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    names = {plain_name(name): name for name in model.state_dict()}
    model.load_state_dict({names.get(name, name): value for name, value in box[0].items()})


def _additions_of(model: nn.Module) -> dict[str, Any]:
    """The adapters and value head of `model` as they are, whole; every rank must call this."""
    named = [*model.named_parameters(), *model.named_buffers()]
    own = {name: tensor.detach() for full, tensor in named if is_addition(name := plain_name(full))}
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in own.items()}


def load_optimizers(model: nn.Module, optimizers: list[Optimizer], saved: dict[str, Any], *, broadcast: bool) -> None:
    """Put the optimizer state `saved` (needed on rank 0 only, with `broadcast`) into `optimizers` on every rank.

    Betas, weight decay and the like stay as the flags of this run say; only what has been accumulated is taken over.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for o in optimizers for group in o.param_groups]
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    groups = get_optimizer_state_dict(model, optimizers, options=StateDictOptions(full_state_dict=True))["param_groups"]
    state = {"state": saved["state"], "param_groups": groups} if saved else {}
    set_optimizer_state_dict(model, optimizers, state, options=options)
    for group, kept in zip((g for o in optimizers for g in o.param_groups), settings, strict=True):
        group.update(kept)


def spread_tensors(saved: Mapping[str, Any] | None, like: Mapping[str, Any]) -> dict[str, Any]:
    """`saved` of rank 0, scattered to every rank: each tensor is sharded and placed as its namesake in `like`.

    Raises:
        KeyError: `saved` lacks a tensor of `like`; on rank 0.
    """
    spread: dict[str, Any] = {}
    for name, value in like.items():
        part = saved[name] if saved is not None else None
        if isinstance(value, Mapping):
            spread[name] = spread_tensors(part, value)
        elif isinstance(value, DTensor):
            full = torch.empty(value.shape, dtype=value.dtype) if part is None else part.to(value.dtype)
            spread[name] = distribute_tensor(full.to(value.device), value.device_mesh, value.placements)
        elif isinstance(value, Tensor):
            whole = (torch.empty_like(value) if part is None else part.to(value)).contiguous()
            if dist.is_initialized():
                dist.broadcast(whole, 0)
            spread[name] = whole
        else:
            box = [part]
            if dist.is_initialized():
                dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
            spread[name] = box[0]
    return spread


def by_name(saved: dict[str, Any], model: nn.Module, stored_names: Iterable[str] = ()) -> dict[str, Any]:
    """Optimizer state keyed by our names of the parameters, from a file that may number them, as OpenLM's do.

    torch numbers parameters through the groups in order; OpenLM has them in the order of its `named_parameters()`,
    which is that of `stored_names`, the names in the file of weights.

    Raises:
        CheckpointError: the file holds another number of parameters than the weights, or of other shapes.
    """
    state = {plain_name(name) if isinstance(name, str) else name: moments for name, moments in saved["state"].items()}
    if not any(isinstance(name, int) for name in state):
        return {"state": state}
    parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    names = in_openlms_order(stored_names, parameters)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(names) != len(numbers):
        raise CheckpointError(
            f"the optimizer file holds {len(numbers)} parameters, the model has {len(names)}: another model."
        )
    name_of = dict(zip(numbers, names, strict=True))
    out = moments_from_openlm({name_of[number]: moments for number, moments in state.items()})
    for name, moments in out.items():
        shapes = {tuple(m.shape) for m in moments.values() if isinstance(m, Tensor) and m.ndim}
        if name not in parameters or shapes - {tuple(parameters[name].shape)}:
            raise CheckpointError(
                f"the optimizer file holds {shapes} for {name}, which the model has not. Another model?"
            )
    return {"state": out}


def in_openlms_order(stored_names: Iterable[str], parameters: Mapping[str, Any]) -> list[str]:
    """The names of parameters, each once, as OpenLM's optimizer numbers them."""
    first: dict[int, str] = {}
    names = dict.fromkeys(only_name(name) for name in stored_names if not name.endswith(".inv_freq"))
    for name in names or parameters:  # tied ones have one number
        first.setdefault(id(parameters[name]) if name in parameters else id(name), name)
    return list(first.values())
