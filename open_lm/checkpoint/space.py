"""Space for a checkpoint on the disks that its ranks write to, asked before anything is written."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from open_lm import storage, text
from open_lm.checkpoint.together import outcome_of
from open_lm.checkpoint.tree import tensors_of
from open_lm.distributed import World

MARGIN = 1.02
"""Factor for all that is not tensors."""


def lack_of_space(world: World, folder: str, tree: Mapping[str, Any], *, own_disks: bool) -> str:
    """The message where a disk has too little space for `tree`, "" where none has; the same on every rank.

    All of it lands on the disk of rank 0's `folder`, or with `own_disks` each rank's part in its own `folder`, which
    may be on a disk of several. Every rank must call this.
    """
    if own_disks:
        needed = sum(_own_bytes(tensor, world.size) for tensor in tensors_of(tree))
    else:
        needed = sum(t.numel() * t.element_size() for t in tensors_of(tree)) if world.is_master else 0.0
    found, problem = outcome_of(lambda: _disk_and_space(folder))
    on_disks: dict[Any, tuple[float, float]] = {}
    for wanted, there, why in world.gather((needed, found, problem)):
        if why and wanted:
            return why
        disk, free = there or (None, None)
        if wanted and free is not None:
            others, least = on_disks.get(disk, (0.0, free))
            on_disks[disk] = others + wanted, min(free, least)
    for wanted, free in on_disks.values():
        if free < MARGIN * wanted:
            return f"no space left: {text.size(wanted)} are needed, {text.size(free)} free."
    return ""


def _disk_and_space(folder: str) -> tuple[tuple[str, int], int | None]:
    """The disk that `folder` is on, or will be, and the bytes that are left there."""
    free = storage.free_bytes(folder)
    path = storage.local_path(folder).absolute()
    while not path.exists():
        path = path.parent
    return (socket.gethostname(), os.stat(path).st_dev), free


def _own_bytes(tensor: Tensor, n_ranks: int) -> float:
    """Bytes that this rank writes of `tensor`: its shard, or its share where several hold the same."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    n_shards = 1
    if isinstance(tensor, DTensor):
        sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        n_shards = prod(size for size, placement in sizes if placement.is_shard())
    return local.numel() * local.element_size() * n_shards / n_ranks
