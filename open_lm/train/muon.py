"""Muon (Keller Jordan, 2024): momentum whose matrices are orthogonalised by Newton–Schulz before they are applied.

A fused projection is several matrices in one parameter: modules name the rows of each in `fused_rows()`, and each is
orthogonalised by itself. Ranks divide the parameters among them: each update is computed on one rank and handed back,
sharded parameters after they were gathered in buckets, so it does not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from open_lm.train.row_order import RowOrder

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: they grow small singular values fastest and leave all of them between 0.7 and 1.2."""
BUCKET_ELEMENTS = 32 << 20
"""Elements of updates that ranks exchange at the same time."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""The second names are those before torch 2.13, which warns of them."""


@dataclass(frozen=True)
class Packing:
    """The matrices in one parameter: the rows of each, below each other, and the order that ranks give all rows."""

    rows: tuple[int, ...]
    order: RowOrder | None = None


Packings = Mapping[int, Packing]
"""By id of the parameter."""
Direction = Callable[[Tensor, Tensor], Tensor]
"""Of a parameter and its whole update."""


class Muon(Optimizer):
    """Steps along the orthogonalised Nesterov momentum, scaled to the size of AdamW's updates (arXiv:2502.16982)."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        ns_steps: int = 5,
        ns_dtype: torch.dtype = torch.bfloat16,
        packings: Packings | None = None,
    ):
        """`packings`: by id of a parameter the matrices that it holds."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps})
        self.ranks: dist.ProcessGroup | None = None
        """Ranks that hold equal weights and gradients (DDP) and divide the computing; None: each does all of it."""
        self._dtype = ns_dtype
        self._packings = dict(packings or {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step with the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates = self._nesterov(parameters, group["momentum"])

            def direction(parameter: Tensor, whole: Tensor, steps: int = group["ns_steps"]) -> Tensor:
                return self._orthogonal(whole, self._packings.get(id(parameter)), steps)

            for parameter, update in whole_by_whole(parameters, updates, direction, self.ranks):
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(local.dtype), alpha=-group["lr"])
        return None

    def _nesterov(self, parameters: Sequence[Tensor], momentum: float) -> list[Tensor]:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        if not parameters:
            return []
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        local_gradients = [local(t) for t in gradients]
        local_buffers = [local(t) for t in buffers]
        torch._foreach_lerp_(local_buffers, local_gradients, 1 - momentum)
        return list(torch._foreach_lerp(local_gradients, local_buffers, momentum))

    def _orthogonal(self, update: Tensor, packing: Packing | None, steps: int) -> Tensor:
        """The update with each of its matrices orthogonalised, and scaled so that its root mean square is 0.2."""
        if packing is None:
            return self._one(update, steps)
        order = packing.order
        in_file = order.in_file(update) if order else update
        done = torch.cat([self._one(part, steps) for part in in_file.split(packing.rows, dim=-2)], dim=-2)
        return order.in_memory(done) if order else done

    def _one(self, matrix: Tensor, steps: int) -> Tensor:
        scale = 0.2 * max(matrix.shape[-2:]) ** 0.5
        return newton_schulz(matrix.to(self._dtype), steps).to(matrix.dtype) * scale


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """About the nearest matrix with orthonormal rows (or columns, where those are fewer); batches of matrices alike."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def whole_by_whole(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    direction: Direction,
    replicas: dist.ProcessGroup | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter with this rank's part of `direction(parameter, update)` of its whole update; `replicas` hold the
    same whole parameters."""
    bucket: list[tuple[Tensor, Tensor]] = []
    plain: list[tuple[Tensor, Tensor]] = []
    for parameter, update in zip(parameters, updates, strict=True):
        if not isinstance(parameter, DTensor):
            plain.append((parameter, update))
        elif _row_group(parameter) is None:
            yield parameter, _redistributed(parameter, update, direction)
        else:
            bucket.append((parameter, update))
    for full in _buckets(bucket):
        yield from _on_one_rank_each(full, direction)
    if replicas is None or dist.get_world_size(replicas) == 1:
        yield from ((parameter, direction(parameter, update)) for parameter, update in plain)
    else:
        for full in _buckets(plain):
            yield from _divided(full, direction, replicas)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _row_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that share the rows of `parameter`, where it is sharded by rows, once; else None."""
    if not isinstance(parameter, DTensor):
        return None
    sharded = [dim for dim, placement in enumerate(parameter.placements) if not isinstance(placement, Replicate)]
    if len(sharded) != 1 or parameter.placements[sharded[0]] != Shard(0):
        return None
    return parameter.device_mesh.get_group(sharded[0])


def _redistributed(parameter: DTensor, update: Tensor, direction: Direction) -> Tensor:
    """For parameters that are sharded in other ways: gathered alone, computed on every rank."""
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = DTensor.from_local(update, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    whole = direction(parameter, sharded.full_tensor())
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()


def _buckets(items: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The parameters in order, as many together as are exchanged at once; those of one group of ranks."""
    bucket: list[tuple[Tensor, Tensor]] = []
    n_elements = 0
    for parameter, update in items:
        is_other = bool(bucket) and _row_group(bucket[0][0]) is not _row_group(parameter)
        if bucket and (is_other or n_elements + parameter.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, n_elements = [], 0
        bucket.append((parameter, update))
        n_elements += parameter.numel()
    if bucket:
        yield bucket


def _divided(
    bucket: list[tuple[Tensor, Tensor]], direction: Direction, group: dist.ProcessGroup
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute each whole update of `bucket` on one rank, and give it to all."""
    rank, lengths = dist.get_rank(group), [parameter.numel() for parameter, _ in bucket]
    results = bucket[0][1].new_zeros(sum(lengths))
    owners = rank_of_each(lengths, dist.get_world_size(group))
    for (parameter, update), owner, out in zip(bucket, owners, results.split(lengths), strict=True):
        if owner == rank:
            out.copy_(direction(parameter, update).reshape(-1))
    dist.all_reduce(results, group=group)  # the others sent zeros: nothing is rounded
    for (parameter, update), whole in zip(bucket, results.split(lengths), strict=True):
        yield parameter, whole.view_as(update)


def rank_of_each(lengths: Sequence[int], n_ranks: int) -> list[int]:
    """The rank that computes each update: the largest first, each goes to the rank that has least to do."""
    load, owners = [0] * n_ranks, [0] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        owners[number] = load.index(min(load))
        load[owners[number]] += lengths[number]
    return owners


def _on_one_rank_each(bucket: list[tuple[Tensor, Tensor]], direction: Direction) -> Iterator[tuple[Tensor, Tensor]]:
    """Gather all updates of `bucket` at once, compute each on one rank, and give every rank its rows of all of them.

    Shards of rows are padded to the longest, as torch cuts them: the last ranks may hold fewer, or none.
    """
    group = _row_group(bucket[0][0])
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    rows = [-(-p.shape[0] // size) for p, _ in bucket]
    widths = [math.prod(p.shape[1:]) for p, _ in bucket]
    lengths = [n_rows * width for n_rows, width in zip(rows, widths, strict=True)]
    mine = torch.cat([_padded(update, length) for (_, update), length in zip(bucket, lengths, strict=True)])
    everyone = mine.new_empty(size * len(mine))
    _all_gather(everyone, mine, group=group)
    shards = everyone.view(size, -1).split(lengths, dim=1)
    results = torch.zeros_like(everyone).view(size, -1)
    owners = rank_of_each([parameter.numel() for parameter, _ in bucket], size)
    for (parameter, _), owner, shard, out in zip(bucket, owners, shards, results.split(lengths, dim=1), strict=True):
        if owner == rank:
            whole = shard.reshape(-1)[: parameter.numel()].view(parameter.shape)
            made = direction(parameter, whole).reshape(-1)
            out.copy_(_padded(made, out.numel()).view_as(out))
    _reduce_scatter(mine, results.view(-1), group=group)  # the others sent zeros: nothing is rounded
    for (parameter, update), part in zip(bucket, mine.split(lengths), strict=True):
        yield parameter, part[: update.numel()].view_as(update)


def _padded(tensor: Tensor, length: int) -> Tensor:
    flat = tensor.reshape(-1)
    return flat if len(flat) == length else torch.cat((flat, flat.new_zeros(length - len(flat))))
