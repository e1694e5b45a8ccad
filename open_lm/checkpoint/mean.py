"""The weighted mean of several checkpoints, as if it were one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_lm.checkpoint.read import read_checkpoint
from open_lm.checkpoint.resolve import Found, Name
from open_lm.checkpoint.state_dicts import CONSTANTS, require_same_architecture
from open_lm.errors import CheckpointError
from open_lm.weights.file import clean_state_dict


def read_mean(names: Sequence[Name], coefficients: Sequence[float]) -> dict[str, Any]:
    """The sum of `coefficients` times the weights of `names`, added in fp64, under `state_dict` and with their config.

    One checkpoint is held at a time, beside the sum.

    Raises:
        CheckpointError: one is missing or damaged, or is not of the same model as the first.
    """
    total: dict[str, Tensor] = {}
    first: dict[str, Any] = {}
    kinds: dict[str, torch.dtype] = {}
    paths = [name.name if isinstance(name, Found) else str(name) for name in names]
    for name, path, coefficient in zip(names, paths, coefficients, strict=True):
        content = read_checkpoint(name)
        weights = {key: t for key, t in clean_state_dict(content).items() if not key.endswith(CONSTANTS)}
        if not total:
            first = content.get("config") or {}
            kinds = {name: tensor.dtype for name, tensor in weights.items()}
            total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in weights.items()}
        require_same_architecture((content.get("config") or {}).get("model", {}), first.get("model", {}), path)
        _require_same_tensors(weights, total, path, paths[0])
        for name, tensor in weights.items():
            total[name].add_(tensor.double(), alpha=coefficient)
    mean = {name: tensor.to(kinds[name]) for name, tensor in total.items()}
    return {"state_dict": mean, **({"config": first} if first else {})}


def _require_same_tensors(weights: dict[str, Tensor], total: dict[str, Tensor], path: str, first: str) -> None:
    here, there = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (weights, total))
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if differing:
        raise CheckpointError(
            f"--average {path}: {differing[0]} is {here.get(differing[0], 'missing')}, in {first} "
            f"{there.get(differing[0], 'missing')}. Average checkpoints of one model."
        )
