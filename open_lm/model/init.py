"""How weights begin."""

from __future__ import annotations

from torch import Tensor, nn


def scaled_normal_(weight: Tensor, std: float) -> None:
    """Fill `weight` from a normal distribution cut at three standard deviations."""
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
