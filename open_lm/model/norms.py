"""Norms: the six variants by name.  Shapes: D width of what is normalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.model.config import ModelConfig
from open_lm.model.variants import NORMS


def build_norm(config: ModelConfig, dim: int) -> nn.Module:
    """The norm of `config` over vectors of width `dim`."""
    return NORMS.load(config.model_norm)(dim, config.norm_eps)


class LayerNorm(nn.Module):
    """Layer norm (arXiv:1607.06450), with a weight and a bias where asked for; statistics in fp32."""

    def __init__(self, dim: int, eps: float, *, weight: bool = True, bias: bool = True):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim)) if weight else None
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """The weight and the bias that `forward` computes with."""
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), *self.affine(), self.eps)


class LowPrecisionLayerNorm(LayerNorm):
    """Layer norm computed in the autocast type, as MPT does; without autocast the same as LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight, bias = (None if part is None else part.to(dtype) for part in self.affine())
        with torch.autocast(kind, enabled=False):
            return F.layer_norm(x.to(dtype), (self.dim,), weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467) in fp32, times a weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Weight 1."""
        nn.init.ones_(self.weight)

    def affine(self) -> tuple[Tensor, None]:
        """The weight that `forward` computes with; there is no bias."""
        return self.weight, None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (self.dim,), None, self.eps).type_as(x) * self.affine()[0]


def gain_only_layer_norm(dim: int, eps: float) -> LayerNorm:
    """Layer norm with a weight and no bias."""
    return LayerNorm(dim, eps, bias=False)


def gain_only_lp_layer_norm(dim: int, eps: float) -> LayerNorm:
    """Low-precision layer norm with a weight and no bias."""
    return LowPrecisionLayerNorm(dim, eps, bias=False)


def no_wb_layer_norm(dim: int, eps: float) -> LayerNorm:
    """Layer norm without parameters (OLMo's)."""
    return LayerNorm(dim, eps, weight=False, bias=False)
