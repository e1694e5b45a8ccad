"""Cross-entropy of a chunk of logits on a GPU, in one Triton kernel: loss, log-normaliser and gradient of each row.

Shapes: C positions of one chunk, V vocabulary.

The kernel reads a row twice and writes its gradient over the logits, where plain torch passes over the chunk nine times
(online softmax, arXiv:1805.02867; gradients in place as in Liger Kernel, arXiv:2410.10989). Products stay cuBLAS's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from open_lm.kernels.loss_chunks import LossChunk, gradient_scale

LARGEST_BLOCK = 1 << 14
"""Logits of a row that one program holds at once."""


class FusedChunk(LossChunk):
    """A chunk whose rows are reduced by the kernel."""

    def _allocate(self, shape: tuple[int, int], weight_VD: Tensor) -> None:
        self._logits = torch.empty(shape, dtype=weight_VD.dtype, device=weight_VD.device)
        self._of_rows = torch.empty((2, shape[0]), dtype=torch.float32, device=weight_VD.device)

    def add(self, hidden_CD: Tensor, targets_C: Tensor, needs_grad: bool) -> Tensor | None:
        """As in Chunk."""
        n_rows = hidden_CD.shape[0]
        logits_CV, of_rows_2C = self._logits[:n_rows], self._of_rows[:, :n_rows]
        torch.mm(hidden_CD, self._weight_VD.t(), out=logits_CV)
        reduce_rows(logits_CV, targets_C.contiguous(), of_rows_2C, self._z_loss, needs_grad)
        self.sums += of_rows_2C.sum(1)
        return logits_CV if needs_grad else None


def reduce_rows(logits_CV: Tensor, targets_C: Tensor, of_rows_2C: Tensor, z_loss: float, needs_grad: bool) -> None:
    """Write the cross-entropy and the squared log-normaliser of each row to `of_rows_2C`, zeros where the target is
    negative; with `needs_grad` the gradient of their weighted sum, times `gradient_scale` of its type, takes the place
    of the logits."""
    n_rows, vocab_size = logits_CV.shape
    block = min(LARGEST_BLOCK, triton.next_power_of_2(vocab_size))
    kernel: Any = _reduce_row
    kernel[(n_rows,)](
        logits_CV,
        targets_C,
        of_rows_2C[0],
        of_rows_2C[1],
        logits_CV.stride(0),
        vocab_size,
        z_loss,
        gradient_scale(logits_CV.dtype),
        needs_grad=needs_grad,
        block=block,
        num_warps=8 if block >= 4096 else 4,
    )


@triton.jit
def _reduce_row(  # type: ignore[no-untyped-def]
    logits, targets, losses, squares, stride, vocab_size, z_loss, factor, needs_grad: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    target = tl.load(targets + row)
    largest = -float("inf")
    total = 0.0
    for start in range(0, vocab_size, block):
        columns = start + tl.arange(0, block)
        x = tl.load(base + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        largest = new
    log_z = largest + tl.log(total)
    counted = (target >= 0).to(tl.float32)
    picked = tl.load(base + tl.maximum(target, 0)).to(tl.float32)
    tl.store(losses + row, (log_z - picked) * counted)
    tl.store(squares + row, log_z * log_z * counted)
    if needs_grad:
        counted *= factor
        scale = counted * (1.0 + 2.0 * z_loss * log_z) / total
        for start in range(0, vocab_size, block):
            columns = start + tl.arange(0, block)
            x = tl.load(base + columns, mask=columns < vocab_size, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - largest) * scale - tl.where(columns == target, counted, 0.0)
            tl.store(base + columns, gradient.to(logits.dtype.element_ty), mask=columns < vocab_size)
