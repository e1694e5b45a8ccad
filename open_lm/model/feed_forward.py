"""Feed-forward layers.  Shapes: B batch, T positions, D model width, F hidden width."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.model.init import scaled_normal_
from open_lm.model.split import SplitColumns, SplitRows, TensorPlan


def gated_width(dim: int) -> int:
    """Hidden width of the gated layers: 8/3 of the model width, rounded up to a multiple of 256."""
    return 256 * math.ceil(int(8 * dim / 3) / 256)


def default_width(ffn_type: str, dim: int) -> int:
    """Hidden width of a feed-forward layer that is not told its own."""
    return 4 * dim if ffn_type == "gelu" else gated_width(dim)


class SwiGLU(nn.Module):
    """`w3(silu(gate) * value)` (arXiv:2002.05202); `w12` holds gate and value, as published checkpoints do."""

    def __init__(self, dim: int, branch_divisor: float, width: int | None = None):
        super().__init__()
        self.dim, self.branch_divisor, self.width = dim, branch_divisor, width or gated_width(dim)
        self.w12 = nn.Linear(dim, 2 * self.width, bias=False)
        self.w3 = nn.Linear(self.width, dim, bias=False)

    def tensor_plan(self) -> TensorPlan:
        """A part of the hidden width for each rank: the same of gate and of value."""
        return {"w12": SplitRows((self.width, self.width)), "w3": SplitColumns()}

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """The rows of each matrix that a parameter packs, for optimizers that work on matrices."""
        return {"w12.weight": (self.width, self.width)}

    def reset_parameters(self) -> None:
        """w12: 1/sqrt(D); w3: 1/sqrt(F) / branch_divisor."""
        scaled_normal_(self.w12.weight, self.dim**-0.5)
        scaled_normal_(self.w3.weight, self.width**-0.5 / self.branch_divisor)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, value_BTF = self.w12(x_BTD).chunk(2, dim=-1)
        return self.w3(F.silu(gate_BTF) * value_BTF)


class Gelu(nn.Sequential):
    """`w2(gelu(w1(x)))` with the exact (erf) gelu, four times as wide as the model unless told otherwise."""

    def __init__(self, dim: int, branch_divisor: float, width: int | None = None):
        width = width or 4 * dim
        super().__init__(nn.Linear(dim, width, bias=False), nn.GELU(), nn.Linear(width, dim, bias=False))
        self.dim, self.branch_divisor, self.width = dim, branch_divisor, width

    def tensor_plan(self) -> TensorPlan:
        """A part of the hidden width for each rank."""
        return {"0": SplitRows(), "2": SplitColumns()}

    def reset_parameters(self) -> None:
        """w1: 1/sqrt(D); w2: 1/sqrt(F) / branch_divisor."""
        first: Any = self[0]
        last: Any = self[2]
        scaled_normal_(first.weight, self.dim**-0.5)
        scaled_normal_(last.weight, self.width**-0.5 / self.branch_divisor)


class GemmaGeGLU(nn.Module):
    """`down(gelu(gate(x)) * up(x))` with biases, as in Gemma."""

    def __init__(self, dim: int, branch_divisor: float, width: int | None = None):
        super().__init__()
        self.dim, self.branch_divisor, self.width = dim, branch_divisor, width or gated_width(dim)
        self.gate_proj = nn.Linear(dim, self.width)
        self.up_proj = nn.Linear(dim, self.width)
        self.down_proj = nn.Linear(self.width, dim)

    def tensor_plan(self) -> TensorPlan:
        """A part of the hidden width for each rank."""
        return {"gate_proj": SplitRows(), "up_proj": SplitRows(), "down_proj": SplitColumns()}

    def reset_parameters(self) -> None:
        """gate, up: 1/sqrt(D); down: 1/sqrt(F) / branch_divisor; biases 0."""
        scaled_normal_(self.gate_proj.weight, self.dim**-0.5)
        scaled_normal_(self.up_proj.weight, self.dim**-0.5)
        scaled_normal_(self.down_proj.weight, self.width**-0.5 / self.branch_divisor)
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.zeros_(projection.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
