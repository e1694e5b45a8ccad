"""Order of the rows of packed matrices under tensor parallelism: each rank's part of every block, side by side.

A file holds the rows of `in_proj` as queries, keys, values and those of `w12` as gates, values. In memory a rank's rows
must be adjacent to be one shard: its queries, keys and values, then those of the next. Files stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


@dataclass(frozen=True)
class RowOrder:
    """Order of dimension `dim` of a parameter that packs `blocks`, for `n_parts` ranks."""

    blocks: tuple[int, ...]
    n_parts: int
    dim: int = 0

    def rows(self) -> Tensor:
        """The row of the file that stands at each place in memory."""
        starts = [sum(self.blocks[:k]) for k in range(len(self.blocks))]
        parts = [
            torch.arange(start + part * (size // self.n_parts), start + (part + 1) * (size // self.n_parts))
            for part in range(self.n_parts)
            for start, size in zip(starts, self.blocks, strict=True)
        ]
        return torch.cat(parts)

    def in_memory(self, tensor: Tensor) -> Tensor:
        """A whole tensor in the file's order, reordered for the ranks."""
        return tensor.index_select(self.dim, self.rows().to(tensor.device))

    def in_file(self, tensor: Tensor) -> Tensor:
        """A whole tensor in the ranks' order, reordered for the file."""
        return tensor.index_select(self.dim, self.rows().argsort().to(tensor.device))


def row_orders(model: nn.Module) -> Mapping[str, RowOrder]:
    """The parameters of `model` whose rows are ordered for ranks, by name; empty without tensor parallelism."""
    return getattr(model, "row_orders", {})


def to_file_order(tensor: Tensor, order: RowOrder) -> Tensor:
    """`tensor` with its rows as a file has them; every rank of its mesh must call this, as it is gathered meanwhile."""
    if not isinstance(tensor, DTensor):
        return order.in_file(tensor)
    whole = order.in_file(tensor.full_tensor())
    mesh = tensor.device_mesh
    placements = [Shard(0) if whole.shape[0] >= mesh.size() else Replicate(), *[Replicate()] * (mesh.ndim - 1)]
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def copy_from_file_order(stored: Tensor, target: Tensor, order: RowOrder) -> None:
    """Copy what `to_file_order` gave of `target`, with other values by now, back into `target`."""
    with torch.no_grad():
        if not isinstance(target, DTensor):
            target.copy_(order.in_memory(stored))
            return
        whole = order.in_memory(stored.full_tensor() if isinstance(stored, DTensor) else stored)
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())


def order_of(path: str, tensor: Tensor, orders: Mapping[str, RowOrder]) -> RowOrder | None:
    """The order of a weight, moment or average at `path`, such as `optimizer/state/NAME/exp_avg`; None for others."""
    order = next((orders[name] for name in path.split("/") if name in orders), None)
    fits = order is not None and tensor.ndim > order.dim and tensor.shape[order.dim] == sum(order.blocks)
    return order if fits else None
