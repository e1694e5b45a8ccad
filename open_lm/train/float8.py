"""Float8 matrix products in training, through torchao: the weights stay what they are, and so do checkpoints.

Shapes: I inputs, O outputs.

torchao's linear layers round inputs, weights and gradients to 8 bits as they multiply: with one scale for a tensor
(tensorwise, fastest) or one for each row (rowwise, more exact). Experts, routers, norms, token embedding and the loss
are computed as without.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from open_lm.errors import ConfigError
from open_lm.train.tensor_parallel import ColumnsOf, RowsOf

MULTIPLE = 16
"""Divisor of all widths: the kernels take nothing else."""
LEAST_CAPABILITY = (8, 9)
"""The first GPUs with float8 products: Ada and Hopper."""


def convert_to_float8(blocks: Iterable[nn.Module], recipe: str, device: torch.device) -> None:
    """Let the linear layers of `blocks` multiply in float8, in place; names and tensors of parameters stay.

    Raises:
        ConfigError: torchao is not installed, the GPU has no such products, or no layer has widths that fit.
    """
    float8 = _torchao(recipe)
    _require_products(recipe, device)
    blocks = list(blocks)
    found = [layer for block in blocks for layer in _layers(block)]
    fitting = [layer for layer in found if _fits(layer)]
    if not fitting:
        raise ConfigError(f"--float8 {recipe}: no linear layer of this model has widths that divide by {MULTIPLE}.")
    config = float8.Float8LinearConfig.from_recipe_name(recipe)
    for layer in fitting:
        if isinstance(layer, RowsOf | ColumnsOf):
            layer.product = DividedProduct(float8, config, *_widths(layer))
    plain = {id(layer) for layer in fitting if type(layer) is nn.Linear}
    for block in blocks:
        float8.convert_to_float8_training(block, config=config, module_filter_fn=lambda layer, _: id(layer) in plain)
    logging.info("float8 %s: %d of %d linear layers of the blocks", recipe, len(fitting), len(found))


def _torchao(recipe: str) -> Any:
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it names kernels of newer GPUs that it does not find
    try:
        import torchao.float8
    except ImportError as error:
        raise ConfigError(f"--float8 {recipe} needs torchao ({error}): pip install 'torchao>=0.17,<0.20'") from error
    return torchao.float8


def _require_products(recipe: str, device: torch.device) -> None:
    if device.type != "cuda":
        logging.warning("--float8 %s: the numbers of float8 without its speed, which only GPUs have.", recipe)
    elif torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"--float8 {recipe}: {name} has no float8 products; Ada and Hopper are the first. Leave it.")


def _layers(block: nn.Module) -> Iterator[nn.Module]:
    """Linear layers, whole or divided by tensor parallelism; not routers, nor layers with adapters."""
    for name, layer in block.named_modules():
        if (type(layer) is nn.Linear or isinstance(layer, RowsOf | ColumnsOf)) and not name.endswith("router"):
            yield layer


def _widths(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of what this rank computes."""
    parts = layer.parallel.size if hasattr(layer, "parallel") else 1
    inputs, outputs = layer.in_features, layer.out_features
    return (inputs, outputs // parts) if isinstance(layer, RowsOf) else (inputs // parts, outputs)


def _fits(layer: nn.Module) -> bool:
    return all(width % MULTIPLE == 0 for width in _widths(layer))


class DividedProduct:
    """The product of a layer of which this rank holds a part; each part has scales of its own."""

    def __init__(self, float8: Any, config: Any, n_in: int, n_out: int):
        with torch.device("meta"):
            holder = nn.ModuleList([nn.Linear(n_in, n_out, bias=False)])
        self._layer: Any = float8.convert_to_float8_training(holder, config=config)[0]
        del self._layer.weight  # each call brings it

    def __call__(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        self._layer.__dict__["weight"] = weight_OI  # no parameter: it belongs to the divided layer
        y = self._layer(x)
        return y if bias_O is None else y + bias_O.type_as(y)
