"""Output layer and cross-entropy as one operator that never holds the logits of a whole batch.

Shapes: N positions, D model width, V vocabulary, C positions of one chunk.

The gradient of the logits, softmax(z) - onehot(target), is known as soon as the logits are, so each chunk's share of
both gradients is computed in the forward pass and its logits are dropped at once (as in Cut Your Losses,
arXiv:2411.09009, and Liger Kernel, arXiv:2410.10989, without their custom kernels).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels import native

CHUNK_LOGITS = 1 << 22
"""Logits one chunk aims at (16 MB in fp32)."""
MAX_CHUNK_LOGITS = 1 << 27
"""Logits one chunk never exceeds (512 MB in fp32)."""


class LossSums(NamedTuple):
    """Sums over the counted positions, in fp32: what is minimised, and the two things it is made of."""

    total: Tensor
    cross_entropy: Tensor
    squared_log_z: Tensor


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
    them in fp32. Only `total` carries gradients.
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
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        compute = _by_kernel if runs_for(hidden, weight) else _in_chunks
        sums, gradients = compute(hidden, weight, targets_N, z_loss, any(ctx.needs_input_grad[:2]))
        if gradients is not None:
            ctx.save_for_backward(gradients[0].to(hidden_ND.dtype), gradients[1].to(weight_VD.dtype))
        cross_entropy, squared_log_z = sums
        return cross_entropy + z_loss * squared_log_z, cross_entropy.clone(), squared_log_z.clone()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total, grad_weight * grad_total, None, None, None


Computed = tuple[Tensor, tuple[Tensor, Tensor] | None]
"""The sums of the cross-entropy and of squared log Z; the gradients of hidden and of weight, the latter in fp32."""


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
    (n_positions, dim), vocab_size = hidden_ND.shape, weight_VD.shape[0]
    chunk = _Chunk(rows_per_chunk(n_positions, dim, vocab_size), weight_VD, z_loss)
    grad_hidden = torch.empty_like(hidden_ND) if needs_grad else None
    grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad else None
    for start in range(0, hidden_ND.shape[0], chunk.n_rows):
        rows = slice(start, start + chunk.n_rows)
        grad_CV = chunk.add(hidden_ND[rows], targets_N[rows], needs_grad)
        if grad_hidden is not None and grad_weight is not None and grad_CV is not None:
            torch.mm(grad_CV, weight_VD, out=grad_hidden[rows])
            _accumulate(grad_weight, grad_CV, hidden_ND[rows])
    return chunk.sums, (grad_hidden, grad_weight) if grad_hidden is not None and grad_weight is not None else None


def rows_per_chunk(n_positions: int, dim: int, vocab_size: int) -> int:
    """Positions to take at once: few, so that the logits stay in cached, reused memory; more for wide models, because
    every chunk passes over the gradient of the whole output matrix (vocab_size x dim) once."""
    rows = max(CHUNK_LOGITS // vocab_size, 2 * dim, 64)
    return max(1, min(rows, n_positions, MAX_CHUNK_LOGITS // vocab_size))


class _Chunk:
    """The working memory of one chunk, used again for each, and the sums over all of them."""

    def __init__(self, n_rows: int, weight_VD: Tensor, z_loss: float):
        self.n_rows = n_rows
        self.sums = torch.zeros(2, dtype=torch.float32, device=weight_VD.device)
        self._weight_VD = weight_VD
        self._z_loss = z_loss
        shape = (n_rows, weight_VD.shape[0])
        self._logits = torch.empty(shape, dtype=weight_VD.dtype, device=weight_VD.device)
        self._exp = torch.empty(shape, dtype=torch.float32, device=weight_VD.device)

    def add(self, hidden_CD: Tensor, targets_C: Tensor, needs_grad: bool) -> Tensor | None:
        """Add one chunk to `sums`; returns the gradient of its logits when asked for, valid until the next call."""
        n_rows = hidden_CD.shape[0]
        logits_CV, exp_CV = self._logits[:n_rows], self._exp[:n_rows]
        torch.mm(hidden_CD, self._weight_VD.t(), out=logits_CV)
        largest_C = logits_CV.amax(-1).float()
        torch.sub(logits_CV, largest_C[:, None], out=exp_CV).exp_()
        sum_C = exp_CV.sum(-1)
        log_z_C = largest_C + sum_C.log()
        counted_C = (targets_C >= 0).float()
        index_C1 = targets_C.clamp(min=0)[:, None]
        self.sums[0] += ((log_z_C - logits_CV.gather(1, index_C1)[:, 0].float()) * counted_C).sum()
        self.sums[1] += (log_z_C.square() * counted_C).sum()
        if not needs_grad:
            return None
        exp_CV.mul_((counted_C * (1 + 2 * self._z_loss * log_z_C) / sum_C)[:, None])
        exp_CV.scatter_add_(1, index_C1, -counted_C[:, None])
        return logits_CV.copy_(exp_CV)


def _accumulate(grad_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add `grad_CV.T @ hidden_CD` to `grad_VD`, which is fp32 whatever the products are in."""
    if grad_CV.dtype == grad_VD.dtype:
        grad_VD.addmm_(grad_CV.t(), hidden_CD)
    else:
        grad_VD += grad_CV.t() @ hidden_CD
