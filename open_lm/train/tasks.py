"""What a batch is trained to do: a task turns a model and a batch into a summed loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from open_lm.data.batch import Batch
from open_lm.kernels.linear_cross_entropy import linear_cross_entropy


class Losses(NamedTuple):
    """Sums over the unmasked targets of one micro-batch."""

    total: Tensor
    """What is minimised, with gradients."""
    parts: Tensor
    """What is reported, without gradients: one sum for each of the task's `names`."""


class Task(Protocol):
    """Pretraining, fine-tuning and preference training differ in this."""

    @property
    def names(self) -> tuple[str, ...]:
        """What `Losses.parts` are, as they are called in metrics; the first is `loss`."""
        ...

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses summed (not averaged) over the unmasked targets of `batch`."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Predict each token from those before it.

    `z_loss` weighs the squared log-normaliser of the output; `balance_loss` the load-balancing loss of a model with
    experts, whose mean over the micro-batches is taken by their numbers of targets.
    """

    z_loss: float = 0.0
    balance_loss: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        experts = ("load_balancing_loss", "tokens_dropped", "expert_load_max")
        return ("loss", "z_loss", *(experts if self.balance_loss is not None else ()))

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        def head(hidden_BTD: Tensor, weight_VD: Tensor, routing: Any = None) -> Losses:
            hidden_ND, targets_N = hidden_BTD.flatten(0, 1), batch.targets_BT.flatten()
            sums = linear_cross_entropy(hidden_ND, weight_VD, targets_N, self.z_loss)
            parts = [sums.cross_entropy, sums.squared_log_z]
            if routing is None:
                return Losses(sums.total, torch.stack(parts).detach())
            n_targets = batch.n_targets
            parts += [routing.balance_loss * n_targets, routing.n_dropped.float(), routing.load.max() * n_targets]
            total = sums.total + (self.balance_loss or 0.0) * n_targets * routing.balance_loss
            return Losses(total, torch.stack(parts).detach())

        return model(batch.inputs_BT, **batch.model_inputs, head=head)
