"""Parametrization of a transformer: how initialisation, learning rate and AdamW's epsilon follow width and depth.

`standard` is OpenLM's: the best learning rate moves as the model grows. `mup` (µP, arXiv:2203.03466) keeps it over
widths, `completep` (arXiv:2505.01618) over widths and depths: what is tuned on a small model holds for a large one.

Both papers multiply activations: the output by 1/m, m = width / base width, and each branch of the residual stream by
1/l, l = depth / base depth. Adam's steps do not depend on the scale of gradients, so a factor in the forward pass is
the same as that factor on a weight's initial values and learning rate (and its inverse on epsilon and weight decay).
That is done here: the model stays a plain one, whatever it was trained with, for every exporter and every server.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from open_lm.model.architecture import ModelConfig
from open_lm.model.feed_forward import default_width

Role = Literal["embedding", "output", "hidden", "branch_end", "vector"]
"""Token embedding; output head; matrices inside blocks; the last matrix of a branch; norms and biases."""
_BRANCH_ENDS = (".out_proj.", ".w3.", ".feed_forward.2.", ".down_proj.")


@dataclass(frozen=True)
class Scale:
    """Factors of one parameter's learning rate and epsilon; weight decay is divided by that of the learning rate, so
    that every parameter decays alike."""

    lr: float = 1.0
    eps: float = 1.0


def role_of(name: str, ndim: int) -> Role:
    """The role of a parameter of our transformer, by its name; wrappers may have put words before it."""
    if "tok_embeddings" in name:
        return "embedding"
    if ndim < 2:
        return "vector"
    if "layers." not in name:
        return "output"
    return "branch_end" if any(end in name for end in _BRANCH_ENDS) else "hidden"


def width_ratio(config: ModelConfig) -> float:
    """m: how many times the base width the model is wide; 1 under `standard`."""
    return 1.0 if config.parametrization == "standard" else config.hidden_dim / config.base_width


def ffn_ratio(config: ModelConfig) -> float:
    """Width of the feed-forward layers as a multiple of that at the base width; not quite m, for they are rounded."""
    if config.ffn_dim is not None:
        return width_ratio(config)
    return default_width(config.ffn_type, config.hidden_dim) / default_width(config.ffn_type, config.base_width)


def depth_ratio(config: ModelConfig) -> float:
    """l: how many times the base depth it is deep; 1 but for `completep`."""
    return config.n_layers / config.base_depth if config.parametrization == "completep" else 1.0


def scale_of(config: ModelConfig, name: str, ndim: int) -> Scale:
    """The factors of the parameter `name`."""
    if config.parametrization == "standard":
        return Scale()
    m, depth, role = width_ratio(config), depth_ratio(config), role_of(name, ndim)
    if role == "embedding":
        return Scale(eps=1 / m)
    if role == "output":  # a step 1/m as large, on gradients that are m times those through an output divided by m
        return Scale(lr=1 / m)
    inside = depth if "layers." in name else 1.0
    if role == "vector":
        return Scale(eps=1 / (m * inside))
    if role == "branch_end":
        fan_in = ffn_ratio(config) if "feed_forward" in name else m
        return Scale(lr=1 / (fan_in * depth), eps=1 / m)
    return Scale(lr=1 / m, eps=1 / (m * depth))


def embedding_std(config: ModelConfig) -> float:
    """Standard deviation of the token embedding at the start; it does not shrink with the width under µP."""
    return (config.hidden_dim if config.parametrization == "standard" else config.base_width) ** -0.5


def output_std(config: ModelConfig) -> float:
    """Standard deviation of the output head at the start: 0 under µP, so that no width begins with noise to unlearn
    (arXiv:2203.03466, appendix D.2)."""
    return config.hidden_dim**-0.5 if config.parametrization == "standard" else 0.0


def branch_divisor(config: ModelConfig, layer: int) -> float:
    """The divisor of the initial values of the last matrix of a branch in block `layer`, counted from 0.

    OpenLM takes the root of twice the block's number, so that the sum over blocks stays small. Under `completep` it is
    infinite: every block begins as the identity, so that no depth begins with noise to unlearn.
    """
    if config.parametrization == "completep":
        return math.inf
    return math.sqrt(2 * (layer + 1))
