"""Rotary position embeddings.  Shapes: B batch, T positions, H heads, K head width.

Angles are computed in fp32 whatever the type of the activations: in bf16 they would be off by radians at position 2047.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from open_lm.model.config import ModelConfig


class Angles:
    """Cosines and sines, computed once per forward pass and used by every layer.

    A plain object on purpose: FSDP casts the tensors it finds in a block's arguments to its compute type, and these
    must stay fp32.
    """

    __slots__ = ("cos", "sin")

    def __init__(self, angle: Tensor):
        self.cos, self.sin = angle.cos(), angle.sin()


def inverse_frequencies(head_dim: int, base: float, device: torch.device | None = None) -> Tensor:
    """The angle from one position to the next for each pair of channels, in fp32 (RoFormer, arXiv:2104.09864)."""
    return 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


class Rotary(nn.Module):
    """Turns the first half of a head's channels against the second, by an angle that grows with the position.

    `inv_freq` is kept in the state dict because OpenLM's checkpoints have it; it is never read, being a constant.
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.base = config.head_dim, config.rotary_base
        self.n_heads = config.n_heads
        self.register_buffer("inv_freq", inverse_frequencies(self.head_dim, self.base))

    def reset_parameters(self) -> None:
        """The frequencies again, for a model that was built without memory."""
        with torch.no_grad():
            self.inv_freq.copy_(inverse_frequencies(self.head_dim, self.base, self.inv_freq.device))

    def angles(self, places: Tensor) -> Angles | None:
        """The angles of positions (T,) or (B, T): (T, 1, K/2) or (B, T, 1, K/2)."""
        return Angles(position_angles(self.head_dim, self.base, places))

    def forward(self, x_BTHK: Tensor, angles: Angles) -> Tensor:
        return rotate_halves(x_BTHK, angles.cos, angles.sin)


class HeadRotary(Rotary):
    """Rotary by the number of the head instead of the position: how the published OpenLM models were trained."""

    part = 0
    """Number of the part of the heads that `forward` gets, where ranks divide them."""

    def angles(self, places: Tensor) -> Angles | None:
        """The angles of every head, (H, K/2)."""
        heads = torch.arange(self.n_heads, device=places.device)
        return Angles(position_angles(self.head_dim, self.base, heads)[:, 0])

    def forward(self, x_BTHK: Tensor, angles: Angles) -> Tensor:
        heads = slice(self.part * x_BTHK.shape[2], (self.part + 1) * x_BTHK.shape[2])
        return rotate_halves(x_BTHK, angles.cos[heads], angles.sin[heads])


class LlamaRotary(nn.Module):
    """Rotary over adjacent pairs of channels, as in Llama's own code; the state dict holds nothing of it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.base = config.head_dim, config.rotary_base

    def angles(self, places: Tensor) -> Angles | None:
        """The angles of positions (T,) or (B, T): (T, 1, K/2) or (B, T, 1, K/2)."""
        return Angles(position_angles(self.head_dim, self.base, places))

    def forward(self, x_BTHK: Tensor, angles: Angles) -> Tensor:
        return rotate_pairs(x_BTHK, angles.cos, angles.sin)


class NoPositions(nn.Module):
    """Attention without positions; order is seen through the causal mask alone (arXiv:2305.19466)."""

    def __init__(self, config: ModelConfig):
        super().__init__()

    def angles(self, places: Tensor) -> Angles | None:
        """Nothing."""
        return None

    def forward(self, x_BTHK: Tensor, angles: None) -> Tensor:
        return x_BTHK


def position_angles(head_dim: int, base: float, places: Tensor) -> Tensor:
    """Position times frequency, (..., 1, K/2), in fp32."""
    return (places.float()[..., None] * inverse_frequencies(head_dim, base, places.device))[..., None, :]


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with channel i turned against channel i + K/2; products in fp32, the result in the type of `x`."""
    return _Rotation.apply(x, cos, sin, False)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with channel 2i turned against channel 2i + 1; products in fp32, the result in the type of `x`."""
    return _Rotation.apply(x, cos, sin, True)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so nothing of `x` is kept and few temporaries are made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, in_pairs: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.in_pairs = in_pairs
        return turned(x, cos, sin, in_pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin, ctx.in_pairs), None, None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, in_pairs: bool) -> Tensor:
    """The rotation itself: `first cos - second sin` and `second cos + first sin` for the two channels of each pair."""
    dtype = torch.promote_types(x.dtype, cos.dtype)
    out = x.to(dtype, copy=True)
    for_first, for_second = _channels(out, in_pairs)
    first, second = _channels(x.to(dtype), in_pairs)
    for_first.mul_(cos).addcmul_(second, sin, value=-1)
    for_second.mul_(cos).addcmul_(first, sin)
    return out.type_as(x)


def _channels(x: Tensor, in_pairs: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channel of each pair, as views."""
    if in_pairs:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
