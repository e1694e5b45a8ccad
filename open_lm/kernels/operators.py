"""Declarations of the C++ operators to torch: signatures, shapes, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

torch.library.define(
    "open_lm::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, float z_loss, bool needs_grad) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("open_lm::attention_forward", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
torch.library.define(
    "open_lm::attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("open_lm::few_rows_product", "(Tensor x, Tensor weight, bool exact) -> Tensor")
torch.library.define("open_lm::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.define(
    "open_lm::decode_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, bool in_pairs, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor slots, Tensor lengths, int window, Tensor? real) -> Tensor",
)


@torch.library.register_fake("open_lm::few_rows_product")
def _(x: Tensor, weight: Tensor, exact: bool) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32 if exact else x.dtype)


@torch.library.register_fake("open_lm::attention_forward")
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.register_fake("open_lm::attention_backward")
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def aligned(x: Tensor) -> Tensor:
    """`x` with its last dimension unbroken and even strides, as the operators read it and as it nearly always is."""
    return x if x.stride(-1) == 1 and x.stride(1) % 2 == 0 else x.contiguous()


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.open_lm.attention_backward(aligned(grad_out), *ctx.saved_tensors)


torch.library.register_autograd("open_lm::attention_forward", _gradients, setup_context=_keep)
