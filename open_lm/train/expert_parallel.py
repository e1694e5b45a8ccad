"""Expert parallelism: each rank holds some of the experts, and tokens travel to theirs and back (arXiv:2006.16668).

Shapes: D model width, E experts, L experts of one rank, C rows of an expert from one rank, A rows, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from open_lm.errors import ConfigError
from open_lm.model.moe import Experts
from open_lm.precision import as_multiplied


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the experts of every layer of `model` over the first dimension of `mesh`; all have the same weights.

    A second dimension is the one over which tensor parallelism has divided each expert.

    Raises:
        ConfigError: there are none, or they do not divide.
    """
    stacks = [module for module in model.modules() if isinstance(module, Experts)]
    n_ranks, number = mesh.size(0), mesh.get_local_rank(0)
    require_experts([experts.n_experts for experts in stacks], n_ranks)
    for experts in stacks:
        for name, parameter in list(experts.named_parameters(recurse=False)):
            local: Any = parameter.detach()
            placements = [Shard(0)]
            if isinstance(local, DTensor):
                local, placements = local.to_local(), [Shard(0), *local.placements]
            part = DTensor.from_local(local.chunk(n_ranks)[number].clone(), mesh, placements, run_check=False)
            setattr(experts, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        experts.__class__ = type("Spread" + type(experts).__name__, (SpreadExperts, type(experts)), {})
        cast("SpreadExperts", experts).ranks = mesh.get_group(0)


def require_experts(numbers: Sequence[int], n_ranks: int) -> None:
    """Raise ConfigError where layers with these `numbers` of experts, perhaps none, do not divide among the ranks."""
    if not numbers:
        raise ConfigError(f"--mesh ep={n_ranks}: the model has no experts. Use fsdp or tp for its weights.")
    for number in numbers:
        if number % n_ranks:
            raise ConfigError(f"--mesh ep={n_ranks}: {number} experts do not divide among {n_ranks} ranks.")


class SpreadExperts(Experts):
    """The experts of this rank, for the tokens of all."""

    ranks: dist.ProcessGroup

    def matrices(self) -> tuple[Tensor, Tensor]:
        w12, w3 = super().matrices()
        return _own(w12), _own(w3)

    def of_equal_loads(self, x_ECD: Tensor) -> Tensor:
        """Each expert applied to its C rows from every rank."""
        there = self._exchanged(as_multiplied(x_ECD)).unflatten(0, (self.ranks.size(), -1))  # (P, L, C, D)
        mixed = super().of_equal_loads(there.transpose(0, 1).flatten(1, 2))  # (L, P C, D)
        back = mixed.unflatten(1, (self.ranks.size(), -1)).transpose(0, 1).flatten(0, 1)
        return self._exchanged(back)

    def of_any_loads(self, x_AD: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert applied to its rows from every rank; every rank waits for the others' counts."""
        n_ranks = self.ranks.size()
        counts_PL = torch.empty_like(counts_E)
        dist.all_to_all_single(counts_PL, counts_E.contiguous(), group=self.ranks)
        sent, counts_PL = counts_E.view(n_ranks, -1).sum(1).tolist(), counts_PL.view(n_ranks, -1)
        received = counts_PL.sum(1).tolist()
        there_AD = self._exchanged(as_multiplied(x_AD), received, sent)
        of_expert_A = torch.arange(counts_PL.shape[1], device=x_AD.device).repeat(n_ranks)
        order_A = of_expert_A.repeat_interleave(counts_PL.flatten()).argsort(stable=True)
        mixed_AD = super().of_any_loads(there_AD[order_A], counts_PL.sum(0))
        return self._exchanged(mixed_AD[order_A.argsort()], sent, received)

    def _exchanged(self, x: Tensor, received: list[int] | None = None, sent: list[int] | None = None) -> Tensor:
        """Rows that the ranks send to this one, `received` from each, for `sent` rows to each; None: even parts."""
        even = [len(x) // self.ranks.size()] * self.ranks.size()
        return all_to_all_single_autograd(x.contiguous(), received or even, sent or even, group=self.ranks)


def _own(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
