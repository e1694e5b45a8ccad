"""A matrix times a handful of rows, as decoding has them: by a C++ kernel for the CPU where one is in use, else torch.

Shapes: N rows, D and V widths of inputs and outputs.

Such a product is as fast as the matrix is read. torch's reads it at half of memory bandwidth, or repacks it every
time; the kernel's sums stay in registers while it streams by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from open_lm.kernels import native

MOST_ROWS = 64
"""Above, products in blocks are faster."""
TYPES = (torch.float32, torch.bfloat16)


def linear(weight_VD: Tensor, x: Tensor, *, exact: bool = False) -> Tensor:
    """`x @ weight.T` for `x` of any shape (..., D), without gradients; `exact` gives sums in fp32."""
    if not runs_for(weight_VD, x):
        return F.linear(x, weight_VD).float() if exact else F.linear(x, weight_VD)
    out = torch.ops.open_lm.few_rows_product(x.reshape(-1, x.shape[-1]).contiguous(), weight_VD, exact)
    return out.view(*x.shape[:-1], -1)


def runs_for(weight_VD: Tensor, x: Tensor) -> bool:
    """Whether the kernel takes these."""
    if not native.in_use() or torch.is_grad_enabled() or weight_VD.device.type != "cpu":
        return False
    n_rows, dim = x.numel() // x.shape[-1], x.shape[-1]
    plain = weight_VD.is_contiguous() and dim % 32 == 0 and 0 < n_rows <= MOST_ROWS
    return plain and x.dtype == weight_VD.dtype and x.dtype in TYPES and not torch.is_autocast_enabled("cpu")
