"""Weight initialisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def scaled_normal_(weight: Tensor, std: float) -> None:
    """Fill `weight` from a normal distribution cut at three standard deviations; zeros where `std` is 0."""
    if std == 0:
        nn.init.zeros_(weight)
        return
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


LIBRARIES = ("torch.", "transformers.", "megablocks.")
"""Whose modules have a `reset_parameters` that is not for a model of ours."""


def initialises(module: nn.Module) -> bool:
    """Whether `module` gives first values to itself and to the layers of torch in it: ours, and those of users."""
    return hasattr(module, "reset_parameters") and not type(module).__module__.startswith(LIBRARIES)


def init_weights(model: nn.Module) -> None:
    """Give every parameter and buffer of `model` its first value; needed after `to_empty` of a model built on `meta`.

    Each of our modules has one `reset_parameters` that covers the layers it builds, so torch's own are not called.
    """
    for module in model.modules():
        if initialises(module):
            reset: Any = module.reset_parameters
            reset()
