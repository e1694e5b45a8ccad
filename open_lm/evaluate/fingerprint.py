"""Weights fingerprint: a text that two models share only if all their weights are equal, bit by bit."""

from __future__ import annotations

import hashlib
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

CHUNK = 1 << 22
MULTIPLIERS = (0x9E3779B97F4A7C15 - (1 << 64), 0xD1B54A32D192ED03 - (1 << 64))
"""Odd 64-bit numbers; the sums below wrap around, so neither order nor device changes them."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """`w1:` and 32 hex digits, over names, shapes, types and bits of all parameters and stored buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sums = _sums_over_ranks(tensor) if isinstance(tensor, DTensor) else _sums(tensor)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums.tolist()}\n".encode())
    return f"w1:{digest.hexdigest()[:32]}"


def _sums_over_ranks(tensor: DTensor) -> Tensor:
    """The sums of a tensor whose rows ranks share out; every rank must call this."""
    assert tensor.placements == (Shard(0),), f"sharded as {tensor.placements}"
    mesh, rows = tensor.device_mesh, -(-tensor.shape[0] // tensor.device_mesh.size())
    row_size = math.prod(tensor.shape[1:])
    totals = _sums(tensor.to_local(), first=mesh.get_local_rank() * rows * row_size)
    dist.all_reduce(totals, group=mesh.get_group())
    return totals


def _sums(tensor: Tensor, first: int = 0) -> Tensor:
    """Two sums of all bits, each number weighted by its place; the first number stands at place `first`."""
    bits_N = tensor.detach().contiguous().flatten().view(INTEGERS[tensor.element_size()])
    totals = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits_N), CHUNK):
        part_N = bits_N[start : start + CHUNK].long()
        places_N = torch.arange(first + start, first + start + len(part_N), device=tensor.device)
        for i, multiplier in enumerate(MULTIPLIERS):
            weight_N = (places_N * 2 + 1) * multiplier
            totals[i] += ((part_N ^ (weight_N >> 32)) * weight_N).sum()
    return totals
