"""Linear layers in fp32 on a CPU through oneDNN, which torch itself uses for narrower types alone.

On an AMD CPU with AVX-512 products run at 96 to 105 GFLOP/s there, at 68 to 95 in MKL, which torch takes for fp32: one
thread, 128 to 1024 rows, 512 to 1536 inputs, 512 to 50432 outputs (torch 2.13).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_ROWS = 32
"""Below, there is nothing to gain."""


def linear(x: Tensor, weight_VD: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, without gradients, by oneDNN where that is faster."""
    if runs_for(x, weight_VD):
        return torch.ops.mkldnn._linear_pointwise(x, weight_VD, bias, "none", [], "")
    return F.linear(x, weight_VD, bias)


def runs_for(x: Tensor, weight_VD: Tensor) -> bool:
    """Whether oneDNN takes these."""
    on_cpu = x.device.type == weight_VD.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    plain = x.dtype == weight_VD.dtype == torch.float32 and weight_VD.is_contiguous() and type(weight_VD) in PLAIN
    return on_cpu and plain and x.numel() >= LEAST_ROWS * x.shape[-1] and not torch.is_grad_enabled() and _is_faster()


PLAIN = (Tensor, nn.Parameter)
"""Types that hold their own memory: no DTensor."""


@functools.cache
def _is_faster() -> bool:
    """Whether this is a CPU on which that was measured, and torch was built with oneDNN."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    info = Path("/proc/cpuinfo")
    return info.exists() and "AuthenticAMD" in info.read_text() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextlib.contextmanager
def dense_linear(model: nn.Module) -> Iterator[None]:
    """Let the linear layers of `model` compute so until the block ends."""
    layers: list[Any] = [m for m in model.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)
