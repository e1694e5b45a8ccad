"""Log-probabilities of given tokens from hidden states, without the logits of a whole batch in memory.

Shapes: N positions, D model width, V vocabulary, B sequences, T positions of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.data.batch import IGNORED, Batch
from open_lm.kernels.linear_cross_entropy import rows_per_chunk


def token_log_probs(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log p(target) at each position of `batch` in fp32, (B, T); 0 where nothing is predicted.

    `temperature` is that of the distribution: the logits are divided by it.
    """
    return model(batch.inputs_BT, **batch.model_inputs, head=log_prob_head(batch, temperature))


def log_prob_head(batch: Batch, temperature: float = 1.0) -> Callable[..., Tensor]:
    """The head that gives `token_log_probs`."""

    def head(hidden_BTD: Tensor, weight_VD: Tensor, **_: Any) -> Tensor:
        log_p_N = linear_log_probs(hidden_BTD.flatten(0, 1), weight_VD, batch.targets_BT.flatten(), temperature)
        return log_p_N.view_as(batch.targets_BT)

    return head


def linear_log_probs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(hidden @ weight.T / temperature) at each target, (N,) in fp32; 0 for negative targets.

    Products are taken in the autocast type (or that of `hidden`), everything after them in fp32. Only a chunk of logits
    exists at a time; the backward pass computes them again.
    """
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    with torch.autocast(kind, enabled=False):
        return _LinearLogProbs.apply(hidden_ND.to(dtype), weight_VD.to(dtype), targets_N, temperature)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        log_p_N = torch.zeros(len(hidden_ND), dtype=_precise(hidden_ND), device=hidden_ND.device)
        log_z_N = torch.zeros_like(log_p_N)
        for rows in _chunks(hidden_ND, weight_VD):
            logits_CV = _logits(hidden_ND[rows], weight_VD, temperature)
            log_z_N[rows] = logits_CV.logsumexp(-1)
            chosen_C = logits_CV.gather(1, targets_N[rows].clamp(min=0)[:, None])[:, 0]
            log_p_N[rows] = (chosen_C - log_z_N[rows]) * (targets_N[rows] >= 0)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, log_z_N)
        ctx.temperature = temperature
        return log_p_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_ND, weight_VD, targets_N, log_z_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=log_z_N.dtype)
        grad_N = grad_N * (targets_N >= 0) / ctx.temperature
        for rows in _chunks(hidden_ND, weight_VD):
            logits_CV = _logits(hidden_ND[rows], weight_VD, ctx.temperature)
            grad_CV = logits_CV.sub_(log_z_N[rows, None]).exp_().mul_(-grad_N[rows, None])
            grad_CV.scatter_add_(1, targets_N[rows].clamp(min=0)[:, None], grad_N[rows, None])
            grad_CV = grad_CV.to(hidden_ND.dtype)
            grad_hidden[rows] = grad_CV @ weight_VD
            grad_weight += grad_CV.t() @ hidden_ND[rows]
        return grad_hidden, grad_weight.to(weight_VD.dtype), None, None


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _logits(hidden_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    return (hidden_CD @ weight_VD.t()).to(_precise(hidden_CD)) / temperature


def _chunks(hidden_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    size = rows_per_chunk(hidden_ND.shape[0], hidden_ND.shape[1], weight_VD.shape[0])
    return [slice(start, start + size) for start in range(0, hidden_ND.shape[0], size)]


def sums_and_lengths(log_p_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The log-probability of each sequence's targets together, and how many they are, (B,) each."""
    return log_p_BT.sum(-1), (batch.targets_BT != IGNORED).sum(-1)
