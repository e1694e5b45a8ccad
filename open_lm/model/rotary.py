"""How positions enter attention.  Shapes: B batch, T positions, H heads, K head width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BASE = 10_000.0


def inverse_frequencies(head_dim: int) -> Tensor:
    """One angle per position and pair of channels, in fp32 (RoFormer, arXiv:2104.09864)."""
    return 1.0 / BASE ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


class Rotary(nn.Module):
    """Rotates the first half of a head's channels against the second, by an angle that grows with the position.

    Angles are computed in fp32 whatever the type of the activations: at position 2047 bf16 would be off by radians.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("inv_freq", inverse_frequencies(head_dim))

    def reset_parameters(self) -> None:
        """The frequencies again, for a model built without memory."""
        self.inv_freq = inverse_frequencies(self.head_dim).to(self.inv_freq.device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of shape (len(positions), K), in fp32."""
        frequencies = inverse_frequencies(self.head_dim).to(positions.device)
        angle = torch.outer(positions.float(), frequencies)
        both = torch.cat((angle, angle), dim=-1)
        return both.cos(), both.sin()

    def forward(self, q_BTHK: Tensor, k_BTHK: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(offset, offset + q_BTHK.shape[1], device=q_BTHK.device)
        cos, sin = (table[None, :, None, :] for table in self.angles(positions))
        return rotate_halves(q_BTHK, cos, sin), rotate_halves(k_BTHK, cos, sin)


class HeadRotary(Rotary):
    """Rotary by the number of the head instead of the position: how the published OpenLM models were trained."""

    def forward(self, q_BTHK: Tensor, k_BTHK: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        def rotated(x_BTHK: Tensor) -> Tensor:
            heads = torch.arange(x_BTHK.shape[2], device=x_BTHK.device)
            cos, sin = (table[None, None, :, :] for table in self.angles(heads))
            return rotate_halves(x_BTHK, cos, sin)

        return rotated(q_BTHK), rotated(k_BTHK)


class LlamaRotary(nn.Module):
    """Rotary over adjacent pairs of channels, as in Llama's own code; nothing is stored."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim

    def forward(self, q_BTHK: Tensor, k_BTHK: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(offset, offset + q_BTHK.shape[1], device=q_BTHK.device)
        angle = torch.outer(positions.float(), inverse_frequencies(self.head_dim).to(positions.device))
        cos, sin = angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]
        return rotate_pairs(q_BTHK, cos, sin), rotate_pairs(k_BTHK, cos, sin)


class NoPositions(nn.Module):
    """Attention without positions; order is seen through the causal mask alone."""

    def __init__(self, head_dim: int):
        super().__init__()

    def forward(self, q_BTHK: Tensor, k_BTHK: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        return q_BTHK, k_BTHK


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with channel i rotated against channel i + K/2, in fp32, in the type of `x`."""
    first, second = x.float().chunk(2, dim=-1)
    return (torch.cat((first, second), -1) * cos + torch.cat((-second, first), -1) * sin).type_as(x)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with channel 2i rotated against channel 2i + 1, in fp32, in the type of `x`."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)
