"""Weight initialisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def scaled_normal_(weight: Tensor, std: float) -> None:
    """Fill `weight` from a normal distribution cut at three standard deviations."""
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def init_weights(model: nn.Module) -> None:
    """Give every parameter and buffer of `model` its first value; needed after `to_empty` of a model built on `meta`.

    Each of our modules has one `reset_parameters` that covers the layers it builds, so torch's own are not called.
    """
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset and type(module).__module__.startswith("open_lm."):
            reset()
