"""Share of a large weight that a rank holds, made from the numbers of its place alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from open_lm.model.random_weights import NormalWeight
from open_lm.train.row_order import RowOrder

PIECE = 1 << 24
"""Numbers that are made at once, beside the share itself."""


def fill_share(values: NormalWeight, shape: tuple[int, ...], share: Tensor, order: RowOrder | None) -> None:
    """Write this rank's part of a weight of `shape` that holds `values`, in the `order` of its rows, into `share`."""
    own = share.to_local() if isinstance(share, DTensor) else share
    if own.numel() == 0:
        return
    places = [_places(share, dim, order) for dim in range(len(shape))]
    rows = torch.zeros(1, dtype=torch.long)
    for place, size in zip(places[:-1], shape[:-1], strict=True):
        rows = (rows[:, None] * size + place).flatten()
    columns = None if len(places[-1]) == shape[-1] and order_of_last(order, shape) else places[-1]
    out = own.detach().view(len(rows), -1)
    for start, first, n_rows in _runs(rows, max(1, PIECE // shape[-1])):
        made = torch.empty(n_rows * shape[-1])
        values.fill(made, first * shape[-1])
        piece = made.view(n_rows, -1)
        out[start : start + n_rows] = (piece if columns is None else piece[:, columns]).to(out.device, out.dtype)


def order_of_last(order: RowOrder | None, shape: tuple[int, ...]) -> bool:
    """Whether the last dimension is in its own order."""
    return order is None or order.dim != len(shape) - 1


def _places(share: Tensor, dim: int, order: RowOrder | None) -> Tensor:
    """Indices along `dim` of the weight, as a file has it, that this rank holds, in its order."""
    n = share.shape[dim]
    everywhere = torch.arange(n) if order is None or order.dim != dim else order.rows()
    if not isinstance(share, DTensor):
        return everywhere
    placements = [p if getattr(p, "dim", None) == dim else Replicate() for p in share.placements]
    if all(isinstance(placement, Replicate) for placement in placements):
        return everywhere
    along = everywhere.view([n if d == dim else 1 for d in range(share.ndim)])
    return distribute_tensor(along, share.device_mesh, placements, src_data_rank=None).to_local().flatten().cpu()


def _runs(rows: Tensor, most: int) -> Iterator[tuple[int, int, int]]:
    """`(offset in the share, first row, count)` of rows that follow each other, at most `most` at once."""
    breaks, start = (rows.diff() != 1).nonzero().flatten() + 1, 0
    for run in rows.tensor_split(breaks):
        for part in run.split(most):
            yield start, int(part[0]), len(part)
            start += len(part)
