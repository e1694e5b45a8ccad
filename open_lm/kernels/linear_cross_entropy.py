"""Output layer and cross-entropy as one operator that never holds the logits of a whole batch.

Shapes: N positions, D model width, V vocabulary, C positions of one chunk.

The gradient of the logits, softmax(z) - onehot(target), is known as soon as the logits are, so each chunk's share of both
gradients is computed in the forward pass and its logits are dropped at once (as in Cut Your Losses, arXiv:2411.09009, and
Liger Kernel, arXiv:2410.10989, without their custom kernels).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 1 << 25
"""Logits of one chunk (128 MB in fp32): large enough for full matrix-product speed, small enough to stay in reused memory."""


class LossSums(NamedTuple):
    """Sums over the counted positions, in fp32: what is minimised, and the two things it is made of."""

    total: Tensor
    cross_entropy: Tensor
    squared_log_z: Tensor


def linear_cross_entropy_reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_loss: float = 0.0) -> LossSums:
    """The definition, with all logits in memory: what every other version is tested against."""
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    counted_N = (targets_N >= 0).float()
    cross_entropy = F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=-100)
    squared_log_z = (logits_NV.logsumexp(-1).square() * counted_N).sum()
    return LossSums(cross_entropy + z_loss * squared_log_z, cross_entropy, squared_log_z)


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_loss: float = 0.0) -> LossSums:
    """Summed cross-entropy of `hidden @ weight.T` against `targets`, plus `z_loss` times the summed squared log-normaliser.

    Negative targets are not counted. Products are taken in the autocast type (or that of `hidden`), everything after them
    in fp32. Only `total` carries gradients.
    """
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
        needs_grad = any(ctx.needs_input_grad[:2])
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        n_rows = max(1, CHUNK_LOGITS // weight.shape[0])
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, hidden.shape[0], n_rows):
            rows = slice(start, start + n_rows)
            logits_CV = F.linear(hidden[rows], weight)
            grad_CV = _chunk(logits_CV, targets_N[rows], z_loss, sums, needs_grad)
            if grad_hidden is not None and grad_weight is not None and grad_CV is not None:
                torch.mm(grad_CV, weight, out=grad_hidden[rows])
                grad_weight += grad_CV.t() @ hidden[rows]
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden.to(hidden_ND.dtype), grad_weight.to(weight_VD.dtype))
        total = sums[0] + z_loss * sums[1]
        ctx.mark_non_differentiable(sums)
        return total, sums[0].clone(), sums[1].clone()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, None, None, None


def _chunk(logits_CV: Tensor, targets_C: Tensor, z_loss: float, sums: Tensor, needs_grad: bool) -> Tensor | None:
    """Add one chunk's sums to `sums`; returns the gradient of its logits, in their type, when asked for."""
    counted_C = targets_C >= 0
    index_C1 = targets_C.clamp(min=0)[:, None]
    log_z_C = torch.logsumexp(logits_CV.float(), dim=-1)
    target_logit_C = logits_CV.gather(1, index_C1)[:, 0].float()
    sums[0] += ((log_z_C - target_logit_C) * counted_C).sum()
    sums[1] += (log_z_C.square() * counted_C).sum()
    if not needs_grad:
        return None
    softmax_CV = torch.exp(logits_CV.float() - log_z_C[:, None])
    grad_CV = softmax_CV.mul_((counted_C * (1 + 2 * z_loss * log_z_C))[:, None])
    grad_CV.scatter_add_(1, index_C1, -counted_C.float()[:, None])
    return grad_CV.to(logits_CV.dtype)
