"""Grouped matrix product of experts: one kernel where there is one, else a loop.

Shapes: A rows, those of expert 0 first; E experts, D and F widths of inputs and outputs.
Every back end has the signature `product(x_AD, weights_EFD, loads) -> out_AF`: the rows of `x` that expert `e` has, by
`loads`, times matrix `e` transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.errors import ConfigError
from open_lm.model.architecture import ModelConfig
from open_lm.model.variants import GROUPED_PRODUCTS


class Loads:
    """The rows of each expert, for all products of a layer: on the device, and on the host for back ends that need them
    there. The host waits for the device then, once a layer."""

    def __init__(self, counts_E: Tensor):
        self._counts_E = counts_E
        self.ends_E = counts_E.cumsum(0)

    @cached_property
    def on_host(self) -> list[int]:
        """The number of rows of each."""
        return self._counts_E.tolist()


GroupedProduct = Callable[[Tensor, Tensor, Loads], Tensor]


def build_grouped_product(config: ModelConfig) -> GroupedProduct:
    """The back end that `config.moe_backend` names, ready to call."""
    return GROUPED_PRODUCTS.load(config.moe_backend)()


def through_torch() -> GroupedProduct:
    """torch's own grouped product where it runs, else one product after the other."""

    def product(x_AD: Tensor, weights_EFD: Tensor, loads: Loads) -> Tensor:
        x_AD, weights_EFD = in_autocast_type(x_AD, weights_EFD)
        return (torch_kernel if torch_kernel_runs_for(x_AD) else one_by_one)(x_AD, weights_EFD, loads)

    return product


def through_megablocks() -> GroupedProduct:
    """The grouped products of megablocks (arXiv:2211.15841), on GPUs and in bf16; everywhere else torch's.

    Raises:
        ConfigError: megablocks, or what it needs for grouped products, is not installed.
    """
    try:
        from megablocks import grouped_gemm_util
    except ImportError as error:
        raise ConfigError(_missing("megablocks")) from error
    if grouped_gemm_util.ops is None:
        raise ConfigError(_missing("grouped_gemm, beside megablocks,"))
    gmm, fallback = grouped_gemm_util.ops.gmm, through_torch()

    def product(x_AD: Tensor, weights_EFD: Tensor, loads: Loads) -> Tensor:
        x_AD, weights_EFD = in_autocast_type(x_AD, weights_EFD)
        if not megablocks_runs_for(x_AD):
            return fallback(x_AD, weights_EFD, loads)
        return gmm(x_AD, weights_EFD.contiguous(), torch.tensor(loads.on_host), trans_b=True)

    return product


def _missing(package: str) -> str:
    return (
        f"--moe-backend megablocks needs {package} which is not installed: pip install 'megablocks[gg]' (it builds "
        "with nvcc), or use --moe-backend torch, which computes the same."
    )


def torch_kernel(x_AD: Tensor, weights_EFD: Tensor, loads: Loads) -> Tensor:
    """torch's grouped product."""
    return F.grouped_mm(x_AD, weights_EFD.mT, offs=loads.ends_E.to(torch.int32))


def one_by_one(x_AD: Tensor, weights_EFD: Tensor, loads: Loads) -> Tensor:
    """One product per expert."""
    return torch.cat([x @ weight.t() for x, weight in zip(x_AD.split(loads.on_host), weights_EFD, strict=True)])


def torch_kernel_runs_for(x: Tensor) -> bool:
    """Whether torch's grouped product runs for `x` as a kernel: bf16 on GPUs of compute capability 9 and newer."""
    known = x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
    return known and torch.cuda.get_device_capability(x.device)[0] >= 9


def megablocks_runs_for(x: Tensor) -> bool:
    """Whether megablocks' grouped product runs for `x`: bf16 on GPUs."""
    return x.is_cuda and x.dtype == torch.bfloat16


def in_autocast_type(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type of autocast, where it is on: it does not know grouped products."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, weights
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weights.to(dtype)
