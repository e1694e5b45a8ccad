"""What is put around a plain model to train it: activation checkpointing, compilation, and the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from open_lm.distributed import World


def wrap(
    model: nn.Module, world: World, *, checkpoint_blocks: bool, compile_blocks: bool, static_graph: bool
) -> nn.Module:
    """`model` ready for `train_step` on every rank; the names of its parameters do not change."""
    if checkpoint_blocks:
        for block in blocks(model):
            recompute_in_backward(block)
    if compile_blocks:
        for block in blocks(model):
            block.compile()
    if world.size == 1:
        return model
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=device_ids, static_graph=static_graph, gradient_as_bucket_view=True
    )


def blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The repeated blocks of a model, in order."""
    return cast("nn.ModuleList", model.layers)


def recompute_in_backward(block: nn.Module) -> None:
    """Keep only the input of `block` for the backward pass and compute the rest again there (arXiv:1604.06174)."""
    forward = block.forward

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    block.forward = recomputed


def grad_sync(model: nn.Module, *, enabled: bool) -> contextlib.AbstractContextManager:
    """The context of one micro-batch's backward pass; gradients are averaged over ranks only where `enabled`."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def clip_grad_norm(model: nn.Module, limit: float | None) -> Tensor:
    """The global norm of the gradients before clipping; gradients are scaled down to `limit` when they exceed it."""
    if limit is None:
        return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model inside whatever `wrap` put around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model
