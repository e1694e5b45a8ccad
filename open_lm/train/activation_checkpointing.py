"""Activation (gradient) checkpointing: full, every k-th block, or selective (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from open_lm.kernels import operators  # noqa: F401  (declares our attention)
from open_lm.train.config import ParallelConfig

_ATEN: Any = torch.ops.aten
EXPENSIVE = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._grouped_mm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    torch.ops.open_lm.attention_forward.default,
}
"""Operators whose results selective recomputation keeps: nearly all of the arithmetic, about half of the memory."""

# FSDP marks its work for the profiler; of experts inside a block, not as often when it is computed again
SAC_IGNORED_OPS.update(
    {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}
)


def recomputed(config: ParallelConfig) -> str | None:
    """The activations that the backward pass computes again: full, every-K, selective, or none."""
    return config.grad_checkpointing_mode or ("full" if config.grad_checkpointing else None)


def recomputed_share(config: ParallelConfig, n_blocks: int) -> float:
    """The share of the blocks that keep their inputs alone; none where `selective` keeps what is expensive."""
    mode = recomputed(config)
    if mode in (None, "selective"):
        return 0.0
    return len(range(0, n_blocks, _every(str(mode)))) / n_blocks


def _every(mode: str) -> int:
    return int(mode.removeprefix("every-")) if mode.startswith("every-") else 1


def recompute(blocks: Sequence[nn.Module], config: ParallelConfig) -> None:
    """Let those of `blocks` that --grad-checkpointing and its mode name recompute their activations."""
    mode = recomputed(config)
    if mode is None:
        return
    for block in blocks[:: _every(mode)]:
        recompute_in_backward(block, selective=mode == "selective")


def recompute_in_backward(block: nn.Module, *, selective: bool = False) -> None:
    """Keep only the input of `block` for the backward pass, with `selective` also the results of what is expensive."""
    forward: Callable = block.forward
    contexts: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}
    )

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    block.forward = recomputed


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
