"""Output layer and cross-entropy as one operator that never holds the logits of a whole batch.

Shapes: N positions, D model width, V vocabulary, C positions of one chunk.

The gradient of the logits, softmax(z) - onehot(target), is known as soon as the logits are, so each chunk's share of
both gradients is computed in the forward pass and its logits are dropped at once (as in Cut Your Losses,
arXiv:2411.09009, and Liger Kernel, arXiv:2410.10989, without their custom kernels).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from open_lm.kernels import native
from open_lm.kernels.loss_chunks import Computed, LossChunk, LossSums, gradient_scale, rows_per_chunk, sums_in_chunks
from open_lm.kernels.vocabulary_parallel import vocabulary_parallel_loss


def linear_cross_entropy_reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_loss: float = 0.0
) -> LossSums:
    """The definition, with all logits in memory: what every other version is tested against."""
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    counted_N = (targets_N >= 0).float()
    cross_entropy = F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=-100)
    squared_log_z = (logits_NV.logsumexp(-1).square() * counted_N).sum()
    return LossSums(cross_entropy + z_loss * squared_log_z, cross_entropy, squared_log_z)


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_loss: float = 0.0) -> LossSums:
    """Summed cross-entropy of `hidden @ weight.T` against `targets`, plus `z_loss` times the summed squared log Z.

    Negative targets are not counted. Products are taken in the autocast type (or that of `hidden`), everything after
    them in fp32. Only `total` carries gradients. A `weight_VD` whose rows ranks divide (a DTensor) stays divided.
    """
    if isinstance(weight_VD, DTensor):
        return vocabulary_parallel_loss(hidden_ND, weight_VD, targets_N, z_loss)
    dtype = torch.get_autocast_dtype(hidden_ND.device.type) if _autocasts(hidden_ND) else hidden_ND.dtype
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return LossSums(*_LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, z_loss, dtype))


def _autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_loss: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        compute = _by_kernel if runs_for(hidden, weight) else _in_chunks
        sums, gradients = compute(hidden, weight, targets_N, z_loss, any(ctx.needs_input_grad[:2]))
        if gradients is not None:
            ctx.save_for_backward(gradients[0].to(hidden_ND.dtype), gradients[1].to(weight_VD.dtype))
            ctx.scale = gradient_scale(dtype)
        cross_entropy, squared_log_z = sums
        return cross_entropy + z_loss * squared_log_z, cross_entropy.clone(), squared_log_z.clone()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * (grad_total / ctx.scale), grad_weight * grad_total, None, None, None


def runs_for(hidden_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether the C++ kernel computes this call: on a CPU, in fp32 or bf16, widths even."""
    plain = type(weight_VD) in (Tensor, torch.nn.Parameter) and hidden_ND.device.type == "cpu"
    types = hidden_ND.dtype == weight_VD.dtype and hidden_ND.dtype in (torch.float32, torch.bfloat16)
    return native.in_use() and plain and types and hidden_ND.shape[1] % 2 == 0


def _by_kernel(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_loss: float, needs_grad: bool) -> Computed:
    """By the C++ kernel, whose logits never leave a core's cache."""
    hidden, weight, targets = hidden_ND.contiguous(), weight_VD.contiguous(), targets_N.contiguous()
    sums, *gradients = torch.ops.open_lm.linear_cross_entropy(hidden, weight, targets, z_loss, needs_grad)
    return sums, (gradients[0], gradients[1]) if needs_grad else None


def _in_chunks(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_loss: float, needs_grad: bool) -> Computed:
    """By torch, a chunk of positions at a time."""
    n_rows = rows_per_chunk(hidden_ND.shape[0], hidden_ND.shape[1], weight_VD.shape[0])
    kind = _fused_chunk() if weight_VD.is_cuda else None
    return sums_in_chunks((kind or LossChunk)(n_rows, weight_VD, z_loss), hidden_ND, weight_VD, targets_N, needs_grad)


@cache
def _fused_chunk() -> type[LossChunk] | None:
    """The chunk that a Triton kernel reduces; None where Triton, which CUDA builds of torch bring, is not installed."""
    try:
        from open_lm.kernels.fused_rows import FusedChunk
    except ImportError:
        return None
    return FusedChunk
