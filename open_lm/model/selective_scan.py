"""The recurrence of a Mamba: a linear state per channel, whose decay and input depend on the token.

On GPUs where the package mamba-ssm is installed its kernel computes whole sequences; everywhere else torch does.

Shapes: B batch, T positions, C positions of one chunk, I channels, N numbers of state per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 32
"""Positions solved at once. Work grows with its logarithm, memory with itself, the number of passes falls with it."""


def selective_scan(
    x_BTI: Tensor, step_BTI: Tensor, a_IN: Tensor, b_BTN: Tensor, c_BTN: Tensor, state_BIN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(step_t a) h_(t-1) + step_t x_t b_t`, `y_t = h_t c_t`, from `h_0 = state`: y (B, T, I) and the last h.

    In fp32; without a state from zero. Only the states between chunks are kept for the backward pass; those within are
    computed again. The last h has no gradient where a kernel gives it.
    """
    kernel = mamba_ssm_scan() if state_BIN is None and kernel_runs_for(x_BTI) else None
    if kernel is not None:  # it has time last
        y_BIT, end_BIN = kernel(x_BTI.mT, step_BTI.mT, a_IN, b_BTN.mT, c_BTN.mT, return_last_state=True)
        return y_BIT.mT, end_BIN
    if state_BIN is None:
        state_BIN = x_BTI.new_zeros(len(x_BTI), *a_IN.shape)
    outputs = []
    for pieces in zip(*(t.split(CHUNK, dim=1) for t in (x_BTI, step_BTI, b_BTN, c_BTN)), strict=True):
        solve: Any = partial(checkpoint, scan_chunk, use_reentrant=False) if torch.is_grad_enabled() else scan_chunk
        y_BCI, state_BIN = solve(a_IN, state_BIN, *pieces)
        outputs.append(y_BCI)
    return torch.cat(outputs, dim=1), state_BIN


@cache
def mamba_ssm_scan() -> Callable[..., Any] | None:
    """The scan of the package mamba-ssm; None where it is not installed, or not built for this torch."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


def kernel_runs_for(x: Tensor) -> bool:
    """Whether the kernel of mamba-ssm takes `x`."""
    return x.is_cuda


def scan_chunk(
    a_IN: Tensor, state_BIN: Tensor, x_BCI: Tensor, step_BCI: Tensor, b_BCN: Tensor, c_BCN: Tensor
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of a few positions, by doubling: after k rounds each holds what the last 2^k positions add."""
    decay_BCIN = torch.exp(step_BCI[..., None] * a_IN)
    added_BCIN = (step_BCI * x_BCI)[..., None] * b_BCN[:, :, None, :]
    reach = 1
    while reach < x_BCI.shape[1]:
        earlier, here = added_BCIN[:, :-reach], decay_BCIN[:, reach:]
        added_BCIN = torch.cat((added_BCIN[:, :reach], added_BCIN[:, reach:] + here * earlier), dim=1)
        decay_BCIN = torch.cat((decay_BCIN[:, :reach], here * decay_BCIN[:, :-reach]), dim=1)
        reach *= 2
    states_BCIN = added_BCIN + decay_BCIN * state_BIN[:, None]
    return torch.einsum("bcin,bcn->bci", states_BCIN, c_BCN), states_BCIN[:, -1]
