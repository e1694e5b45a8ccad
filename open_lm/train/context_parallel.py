"""Context parallelism over ranks: the part of each sequence that a rank trains on."""

from __future__ import annotations

from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor_autograd

from open_lm.distributed import World
from open_lm.model.context import SequencePart


def sequence_part(world: World) -> SequencePart | None:
    """The positions of every sequence that this rank holds; None where each rank holds whole sequences."""
    if world.shape.cp == 1:
        return None
    group = world.meshes.context.get_group()

    def gathered(x_BTGK: Tensor) -> Tensor:
        return all_gather_tensor_autograd(x_BTGK.contiguous(), gather_dim=1, group=group)

    return SequencePart(world.shape.place(world.rank)["cp"], world.shape.cp, gathered)
