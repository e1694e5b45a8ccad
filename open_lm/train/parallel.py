"""Parallelism around a plain model: activation checkpointing, compilation, DDP and FSDP."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.train.activation_checkpointing import recompute
from open_lm.train.config import ParallelConfig


def wrap(model: nn.Module, world: World, config: ParallelConfig) -> nn.Module:
    """`model` ready for `train_step` on every rank; the names of its parameters do not change."""
    recompute(list(blocks(model)), config)
    for block in blocks(model) if config.torchcompile else ():
        block.compile()
    if shards(world, config):
        return shard(model, world, config)
    if world.size == 1:
        return model
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        model,
        device_ids=device_ids,
        static_graph=config.ddp_static_graph,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # they are constants (rotary frequencies), the same on every rank
    )


def shards(world: World, config: ParallelConfig) -> bool:
    """Whether the ranks each hold a share of the model."""
    return config.fsdp and (world.size > 1 or config.force_distributed)


def shard(model: nn.Module, world: World, config: ParallelConfig) -> nn.Module:
    """`model` with every parameter spread over the ranks (FSDP2), gathered block by block as it is needed."""
    elsewhere = config.fsdp_cpu_offload and world.device.type != "cpu"  # on a CPU they are in host memory already
    offload = CPUOffloadPolicy() if elsewhere else OffloadPolicy()
    settings: dict[str, Any] = {
        "mesh": rank_mesh(world, config),
        "mp_policy": mixed_precision(config),
        "offload_policy": offload,
    }
    sharded = [
        fully_shard(block, reshard_after_forward=not config.fsdp_hybrid_o2, **settings) for block in blocks(model)
    ]
    if config.fsdp_forward_prefetch:
        for number, block in enumerate(sharded, 1):
            block.set_modules_to_forward_prefetch(sharded[number : number + config.fsdp_forward_prefetch])
    return cast("nn.Module", fully_shard(model, **settings))


def rank_mesh(world: World, config: ParallelConfig) -> DeviceMesh:
    """The ranks in a row, or with --fsdp-hybrid in rows of those that share one copy of the model.

    Raises:
        ConfigError: the ranks do not divide into such rows.
    """
    if not (config.fsdp_hybrid or config.fsdp_hybrid_o2):
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    group = config.fsdp_group_size or int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    if world.size % group:
        raise ConfigError(f"--fsdp-group-size {group} does not divide {world.size} ranks.")
    return init_device_mesh(world.device.type, (world.size // group, group), mesh_dim_names=("copy", "shard"))


def mixed_precision(config: ParallelConfig) -> MixedPrecisionPolicy:
    """In which types FSDP gathers weights and reduces gradients; the sharded weights keep theirs."""
    if config.fsdp_amp:
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if config.fsdp_pure_bf16:
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    return MixedPrecisionPolicy()


def blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The repeated blocks of a model, in order."""
    return cast("nn.ModuleList", model.layers)


@contextlib.contextmanager
def grad_sync(model: nn.Module, *, enabled: bool) -> Any:
    """The context of one micro-batch; gradients are averaged over ranks only where `enabled`."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def clip_grad_norm(model: nn.Module, limit: float | None) -> Tensor:
    """The global norm of the gradients before clipping; gradients are scaled down to `limit` when they exceed it."""
    if limit is None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    else:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
