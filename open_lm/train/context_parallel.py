"""Context parallelism over ranks: the part of each sequence that a rank trains on."""

from __future__ import annotations

import torch.distributed._functional_collectives as collectives
from torch import Tensor

from open_lm.distributed import World
from open_lm.model.context import SequencePart

_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
"""With gradients; the second is its name before torch 2.13."""


def sequence_part(world: World) -> SequencePart | None:
    """The positions of every sequence that this rank holds; None where each rank holds whole sequences."""
    if world.shape.cp == 1:
        return None
    group = world.meshes.context.get_group()

    def gathered(x_BTGK: Tensor) -> Tensor:
        return _all_gather(x_BTGK.contiguous(), gather_dim=1, group=group)

    return SequencePart(world.shape.place(world.rank)["cp"], world.shape.cp, gathered)
