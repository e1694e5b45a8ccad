"""Parallelism around a plain model: activation checkpointing, compilation, DDP and FSDP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.model.moe import Experts
from open_lm.train.activation_checkpointing import recompute
from open_lm.train.config import ParallelConfig, mesh_shape
from open_lm.train.expert_parallel import apply_expert_parallel
from open_lm.train.float8 import convert_to_float8
from open_lm.train.tensor_parallel import apply_tensor_parallel


def wrap(model: nn.Module, world: World, config: ParallelConfig) -> nn.Module:
    """`model` ready for `train_step` on every rank; the names of its parameters do not change."""
    if world.mesh is None:
        world = replace(world, mesh=mesh_shape(config, world.size))
    if world.shape.tp > 1:
        apply_tensor_parallel(model, world.meshes.tensor)
    if world.shape.ep > 1:
        apply_expert_parallel(model, world.meshes.experts)
    if config.float8:
        convert_to_float8(blocks(model), config.float8, world.device)
    recompute(list(blocks(model)), config)
    for block in blocks(model) if config.torchcompile else ():
        block.compile()
    if shards(world, config):
        return shard(model, world, config)
    if world.size == 1:
        return model
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(
        model,
        device_ids=device_ids,
        static_graph=config.ddp_static_graph,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # they are constants (rotary frequencies), the same on every rank
    )
    if world.device.type == "cpu":
        fix_buckets(wrapped)
    return wrapped


def fix_buckets(model: DistributedDataParallel) -> None:
    """Settle at once in which buckets gradients are added up; torch does so after the first step. The order in which
    more than two ranks are added depends on the place in a bucket, so the first step after a resume would differ in
    the last bit from the same step of a run that was not stopped. On GPUs the order by readiness is worth more.
    """
    model.reducer._push_all_rebuilt_params()
    model.reducer._rebuild_buckets()


def shards(world: World, config: ParallelConfig) -> bool:
    """Whether the ranks each hold a share of the model."""
    return not mesh_shape(config, world.size).is_plain or (config.fsdp and (world.size > 1 or config.force_distributed))


def shard(model: nn.Module, world: World, config: ParallelConfig) -> nn.Module:
    """`model` with every parameter spread over the ranks (FSDP2), gathered block by block as it is needed."""
    elsewhere = config.fsdp_cpu_offload and world.device.type != "cpu"  # on a CPU they are in host memory already
    offload = CPUOffloadPolicy() if elsewhere else OffloadPolicy()
    settings: dict[str, Any] = {
        "mesh": world.meshes.weights,
        "mp_policy": mixed_precision(config),
        "offload_policy": offload,
    }
    if world.shape.ep > 1:
        shard_experts(model, world, settings)
    sharded = [
        fully_shard(block, reshard_after_forward=not config.fsdp_hybrid_o2, **settings) for block in blocks(model)
    ]
    if config.fsdp_forward_prefetch:
        for number, block in enumerate(sharded, 1):
            block.set_modules_to_forward_prefetch(sharded[number : number + config.fsdp_forward_prefetch])
    whole: Any = fully_shard(model, **settings)
    whole.keeps_whole_gradients = config.fsdp_whole_gradients
    return cast("nn.Module", whole)


def shard_experts(model: nn.Module, world: World, settings: Mapping[str, Any]) -> None:
    """Spread what a rank has of the experts over the ranks that have the same ones.

    Raises:
        ConfigError: weights are neither fp32 nor bf16, and each rank has other experts.
    """
    mesh = world.meshes.expert_weights
    dtypes = {p.dtype for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    if mesh.size(-1) == 1 and dtypes - {torch.float32, torch.bfloat16}:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ConfigError(
            f"--mesh {world.shape}: torch (2.13) divides gradients of experts in {names} twice. Use fp32 or bf16."
        )
    for module in [module for module in model.modules() if isinstance(module, Experts)]:
        experts = fully_shard(
            module, **{**settings, "mesh": mesh}, shard_placement_fn=partial(shard_dim, mesh.size(-1))
        )
        for method in ("of_equal_loads", "of_any_loads"):
            register_fsdp_forward_method(module, method)
        if mesh.size(-1) > 1:  # alone, torch divides twice (2.13); else gloo knows no other way to divide
            experts.set_force_sum_reduction_for_comms(True)
        # their gradients are sums over the tokens of all ranks already, while those of other weights become means
        experts.set_gradient_divide_factor(float(world.shape.n_shares))


def shard_dim(n_ranks: int, weights_EFD: nn.Parameter) -> Shard:
    """The dimension along which a stack of matrices divides among ranks: the experts, unless they are too few."""
    local = weights_EFD.to_local() if isinstance(weights_EFD, DTensor) else weights_EFD
    even = [dim for dim, size in enumerate(local.shape) if size % n_ranks == 0]
    return Shard(even[0] if even else 0)


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
    """The context of one micro-batch; gradients are averaged over ranks only where `enabled`.

    FSDP reduces and shards them after every micro-batch all the same, unless --fsdp-whole-gradients: no rank ever holds
    them whole. Copies of a shard (--fsdp-hybrid) are averaged only where `enabled`.
    """
    if isinstance(model, FSDPModule) and getattr(model, "keeps_whole_gradients", False):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, FSDPModule):
        model.set_requires_all_reduce(enabled)
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def clip_grad_norm(model: nn.Module, limit: float | None) -> Tensor:
    """The global norm of the gradients before clipping; gradients are scaled down to `limit` when they exceed it."""
    with_gradient = [p for p in model.parameters() if p.grad is not None]
    norm = total_norm([p.grad for p in with_gradient if p.grad is not None])
    if limit is not None:
        for group in by_mesh(with_gradient).values():
            torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, the same on every rank, over whichever ranks each is spread."""
    norms = [torch.nn.utils.get_total_norm(group) for group in by_mesh(gradients).values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def by_mesh(tensors: Iterable[Tensor]) -> dict[Any, list[Tensor]]:
    """`tensors` by the ranks they are spread over: torch computes with those of one mesh at a time."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    return groups
