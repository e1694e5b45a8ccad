"""Output layer and cross-entropy where each rank holds a part of the vocabulary: no rank ever has all logits of a row.

Shapes: N positions, D model width, V vocabulary entries of this rank, C positions of one chunk.

A chunk's log-normaliser needs two small sums over the ranks, (C,) and (2, C), as in Megatron-LM (arXiv:1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from open_lm.kernels.loss_chunks import (
    LossChunk,
    LossSums,
    exponentials,
    gradient_scale,
    rows_per_chunk,
    sums_in_chunks,
)


@dataclass(frozen=True)
class VocabularyPart:
    """The rows `start` to `start + n` of the output matrix, and the ranks that hold the others."""

    start: int
    n: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, weight_VD: DTensor) -> VocabularyPart:
        """The part that this rank holds of a matrix whose rows are divided."""
        assert weight_VD.placements == (Shard(0),), weight_VD.placements
        mesh, n = weight_VD.device_mesh, weight_VD.to_local().shape[0]
        assert n * mesh.size() == weight_VD.shape[0], (n, weight_VD.shape)
        return cls(mesh.get_local_rank() * n, n, mesh.get_group())

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the parts, in place."""
        dist.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The maximum over the parts, in place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values


def vocabulary_parallel_loss(hidden_ND: Tensor, weight_VD: DTensor, targets_N: Tensor, z_loss: float) -> LossSums:
    """As linear_cross_entropy.py; every rank of the part's group gets the same sums.

    The gradient of `hidden_ND` is this rank's part of a sum over the group; that of `weight_VD` is whole.
    """
    part = VocabularyPart.of(weight_VD)
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    with torch.autocast(kind, enabled=False):
        return LossSums(*_Loss.apply(hidden_ND, weight_VD.to_local(), targets_N, z_loss, dtype, part))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        z_loss: float,
        dtype: torch.dtype,
        part: VocabularyPart,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        n_rows = rows_per_chunk(len(hidden), hidden.shape[1], len(weight))
        chunk = _PartChunk(n_rows, weight, z_loss, part)
        sums, gradients = sums_in_chunks(chunk, hidden, weight, targets_N, any(ctx.needs_input_grad[:2]))
        if gradients is not None:
            ctx.save_for_backward(gradients[0].to(hidden_ND.dtype), gradients[1].to(weight_VD.dtype))
            ctx.scale = gradient_scale(dtype)
        cross_entropy, squared_log_z = sums
        return cross_entropy + z_loss * squared_log_z, cross_entropy.clone(), squared_log_z.clone()

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * (grad_total / ctx.scale), grad_weight * grad_total, None, None, None, None


class _PartChunk(LossChunk):
    """A chunk whose logits are those of a part of the vocabulary."""

    def __init__(self, n_rows: int, weight_VD: Tensor, z_loss: float, part: VocabularyPart):
        super().__init__(n_rows, weight_VD, z_loss)
        self._part = part

    def _statistics(self, logits_CV: Tensor, exp_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, ...]:
        part = self._part
        largest_C = part.max(logits_CV.amax(-1).float())
        exponentials(logits_CV, largest_C, exp_CV)
        index_C = targets_C - part.start
        is_here_C = (index_C >= 0) & (index_C < part.n)
        index_C1 = index_C.clamp(0, part.n - 1)[:, None]
        picked_C = logits_CV.gather(1, index_C1)[:, 0].float() * is_here_C
        sum_C, picked_C = part.sum(torch.stack((exp_CV.sum(-1), picked_C))).unbind()
        return largest_C, sum_C, picked_C, index_C1, is_here_C.float()
