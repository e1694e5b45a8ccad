"""Cross-entropy of an output layer, a chunk of positions at a time.

Shapes: N positions, D model width, V vocabulary, C positions of one chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 22
"""Logits one chunk aims at (16 MB in fp32)."""
MAX_CHUNK_LOGITS = 1 << 27
"""Logits one chunk never exceeds (512 MB in fp32)."""


class LossSums(NamedTuple):
    """Sums over the counted positions, in fp32: what is minimised, and the two things it is made of."""

    total: Tensor
    cross_entropy: Tensor
    squared_log_z: Tensor


Computed = tuple[Tensor, tuple[Tensor, Tensor] | None]
"""The sums of the cross-entropy and of squared log Z; the gradients of hidden (times `gradient_scale` of its type) and
of weight, the latter in fp32."""


def gradient_scale(dtype: torch.dtype) -> float:
    """The factor on gradients of logits while they are in `dtype`: they are formed before the loss is scaled, and
    below 6e-8 fp16 has only 0. They never exceed 1 by much, so there is room above."""
    return 1024.0 if dtype == torch.float16 else 1.0


def sums_in_chunks(
    chunk: LossChunk, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, needs_grad: bool
) -> Computed:
    """The sums over all positions, and the gradients, by way of `chunk`."""
    grad_hidden = torch.empty_like(hidden_ND) if needs_grad else None
    grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad else None
    for start in range(0, hidden_ND.shape[0], chunk.n_rows):
        rows = slice(start, start + chunk.n_rows)
        grad_CV = chunk.add(hidden_ND[rows], targets_N[rows], needs_grad)
        if grad_hidden is not None and grad_weight is not None and grad_CV is not None:
            torch.mm(grad_CV, weight_VD, out=grad_hidden[rows])
            _accumulate(grad_weight, grad_CV, hidden_ND[rows])
    if grad_weight is not None:
        grad_weight /= gradient_scale(weight_VD.dtype)
    return chunk.sums, (grad_hidden, grad_weight) if grad_hidden is not None and grad_weight is not None else None


def rows_per_chunk(n_positions: int, dim: int, vocab_size: int) -> int:
    """Positions to take at once: few, so that the logits stay in cached, reused memory; more for wide models, because
    every chunk passes over the gradient of the whole output matrix (vocab_size x dim) once."""
    rows = max(CHUNK_LOGITS // vocab_size, 2 * dim, 64)
    return max(1, min(rows, n_positions, MAX_CHUNK_LOGITS // vocab_size))


class LossChunk:
    """The working memory of one chunk, used again for each, and the sums over all of them."""

    def __init__(self, n_rows: int, weight_VD: Tensor, z_loss: float):
        self.n_rows = n_rows
        self.sums = torch.zeros(2, dtype=torch.float32, device=weight_VD.device)
        self._weight_VD = weight_VD
        self._z_loss = z_loss
        self._allocate((n_rows, weight_VD.shape[0]), weight_VD)

    def _allocate(self, shape: tuple[int, int], weight_VD: Tensor) -> None:
        self._logits = torch.empty(shape, dtype=weight_VD.dtype, device=weight_VD.device)
        self._exp = torch.empty(shape, dtype=torch.float32, device=weight_VD.device)

    def add(self, hidden_CD: Tensor, targets_C: Tensor, needs_grad: bool) -> Tensor | None:
        """Add one chunk to `sums`; returns the gradient of its logits when asked for, valid until the next call."""
        n_rows = hidden_CD.shape[0]
        logits_CV, exp_CV = self._logits[:n_rows], self._exp[:n_rows]
        torch.mm(hidden_CD, self._weight_VD.t(), out=logits_CV)
        largest_C, sum_C, picked_C, index_C1, is_here_C = self._statistics(logits_CV, exp_CV, targets_C)
        log_z_C = largest_C + sum_C.log()
        counted_C = (targets_C >= 0).float()
        self.sums[0] += ((log_z_C - picked_C) * counted_C).sum()
        self.sums[1] += (log_z_C.square() * counted_C).sum()
        if not needs_grad:
            return None
        scaled_C = counted_C * gradient_scale(logits_CV.dtype)
        exp_CV.mul_((scaled_C * (1 + 2 * self._z_loss * log_z_C) / sum_C)[:, None])
        exp_CV.scatter_add_(1, index_C1, -(scaled_C if is_here_C is None else scaled_C * is_here_C)[:, None])
        return logits_CV.copy_(exp_CV)

    def _statistics(self, logits_CV: Tensor, exp_CV: Tensor, targets_C: Tensor) -> tuple[Any, ...]:
        """Of each row: the largest logit, the sum of exponentials relative to it (those go to `exp_CV`), the target's
        logit, its column, and whether that is here (None: always)."""
        largest_C = logits_CV.amax(-1).float()
        exponentials(logits_CV, largest_C, exp_CV)
        index_C1 = targets_C.clamp(min=0)[:, None]
        return largest_C, exp_CV.sum(-1), logits_CV.gather(1, index_C1)[:, 0].float(), index_C1, None


def exponentials(logits_CV: Tensor, largest_C: Tensor, out_CV: Tensor) -> None:
    """Write exp(logits - largest) to `out_CV`, in fp32."""
    if logits_CV.dtype == out_CV.dtype or logits_CV.is_cuda:
        torch.sub(logits_CV, largest_C[:, None], out=out_CV).exp_()
    else:  # on a CPU torch.sub would make a copy in fp32 first
        out_CV.copy_(logits_CV).sub_(largest_C[:, None]).exp_()


def _accumulate(grad_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add `grad_CV.T @ hidden_CD` to `grad_VD`, which is fp32 whatever the products are in."""
    if grad_CV.dtype == grad_VD.dtype:
        grad_VD.addmm_(grad_CV.t(), hidden_CD)
    elif grad_CV.dtype == torch.float16:  # sums of scaled gradients over positions leave its range
        if grad_CV.is_cuda:
            grad_VD += torch.mm(grad_CV.t(), hidden_CD, out_dtype=torch.float32)
        else:
            grad_VD.addmm_(grad_CV.t().float(), hidden_CD.float())
    else:
        grad_VD += grad_CV.t() @ hidden_CD
