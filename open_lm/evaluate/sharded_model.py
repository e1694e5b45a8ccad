"""Models under evaluation whose weights ranks share out (FSDP), for those that do not fit one GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from open_lm.checkpoint.load_model import read_model, require_fit, under_every_name
from open_lm.checkpoint.resolve import Found
from open_lm.checkpoint.state_dicts import load_weights
from open_lm.distributed import World
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.model.transformer import Transformer
from open_lm.train.config import ParallelConfig, mesh_shape
from open_lm.train.parallel import shard

PARALLEL = ParallelConfig(fsdp=True)


def load_sharded(
    found: Found, world: World, dtype: torch.dtype | None, model: str | None = None, **architecture: Any
) -> nn.Module:
    """`load_model` for all ranks together: rank 0 reads the file, and each keeps its rows of every tensor.

    Raises:
        CheckpointError: as `load_model`, on every rank.
    """
    weights: dict[str, Any] = {}

    def read() -> ModelConfig:
        config, held, _ = read_model(found, model, architecture)
        with torch.device("meta"):
            empty = cast("Transformer", create_model(config))
        weights.update(under_every_name(empty, held))
        require_fit(empty, weights, found.name)
        return config

    return _filled(world.on_rank0(read), weights, found.name, world, dtype)


def load_hf_sharded(config: Any, world: World, dtype: torch.dtype | None) -> nn.Module:
    """The model of transformers that `config` describes, with its published weights, which rank 0 reads.

    Raises:
        ConfigError: they cannot be read, on every rank.
    """
    weights: dict[str, Any] = {}
    world.on_rank0(lambda: weights.update(create_model(config).state_dict()))
    return _filled(config, weights, str(config.hf_model), world, dtype)


def _filled(config: Any, weights: dict[str, Any], origin: str, world: World, dtype: torch.dtype | None) -> nn.Module:
    """A model of `config` over all ranks, in eval mode, with `weights`, which rank 0 has."""
    with torch.device("meta"):
        model = create_model(config)
    held_dtype = dtype or world.broadcast(next((tensor.dtype for tensor in weights.values()), None))
    model = model.to(held_dtype)
    without_values = {id(module) for module in model.modules() if any(b.is_meta for b in module.buffers(recurse=False))}
    model = shard(model, replace(world, mesh=mesh_shape(PARALLEL, world.size)), PARALLEL)
    model.to_empty(device=world.device)
    for module in (module for module in model.modules() if id(module) in without_values):
        cast("Any", module).reset_parameters()  # constants, which no file holds
    load_weights(model, weights, origin, broadcast=True)
    return model.eval()
