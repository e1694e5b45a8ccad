"""Weight initialisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from open_lm.model import random_weights


def scaled_normal_(weight: Tensor, std: float) -> None:
    """Fill `weight` from a normal distribution cut at three standard deviations; zeros where `std` is 0.

    Of a large one on the meta device it is noted what its numbers would be, as `weight.first_values`.
    """
    if std == 0:
        nn.init.zeros_(weight)
    elif weight.numel() < random_weights.LARGE or weight.device.type not in ("cpu", "meta"):
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
    else:
        values = random_weights.NormalWeight(std, int(torch.randint(1 << 62, (), device="cpu")))
        if weight.is_meta:
            noted: Any = weight
            noted.first_values = values
        else:
            whole = torch.empty(weight.numel())
            values.fill(whole)
            weight.data.copy_(whole.view(weight.shape))


LIBRARIES = ("torch.", "torchao.", "transformers.", "megablocks.")
"""Packages whose modules have a `reset_parameters` that is not for a model of ours."""


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
