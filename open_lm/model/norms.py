"""How activations are normalised: the six norms by name.  Shapes: D model width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


class LayerNorm(nn.Module):
    """Layer norm (arXiv:1607.06450) in fp32, with a weight and a bias where asked for."""

    low_precision = False

    def __init__(self, dim: int, *, weight: bool = True, bias: bool = True):
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(dim)) if weight else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), self.weight, self.bias, EPS)


class LowPrecisionLayerNorm(LayerNorm):
    """Layer norm computed in the autocast type, as MPT does; without autocast the same as LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight = self.weight.to(dtype) if self.weight is not None else None
        bias = self.bias.to(dtype) if self.bias is not None else None
        with torch.autocast(kind, enabled=False):
            return F.layer_norm(x.to(dtype), (self.dim,), weight, bias, EPS)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467) in fp32, times a weight."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Weight 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)
        return normed.type_as(x) * self.weight


def gain_only_layer_norm(dim: int) -> LayerNorm:
    """Layer norm with a weight and no bias."""
    return LayerNorm(dim, bias=False)


def gain_only_lp_layer_norm(dim: int) -> LayerNorm:
    """Low-precision layer norm with a weight and no bias."""
    return LowPrecisionLayerNorm(dim, bias=False)


def no_wb_layer_norm(dim: int) -> LayerNorm:
    """Layer norm without parameters (OLMo's)."""
    return LayerNorm(dim, weight=False, bias=False)
