"""What a batch is trained to do: a task turns a model and a batch into a summed loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from open_lm.data.batch import Batch
from open_lm.kernels.linear_cross_entropy import LossSums, linear_cross_entropy


class Task(Protocol):
    """Pretraining, fine-tuning and preference training differ in this one method."""

    def loss_sums(self, model: nn.Module, batch: Batch) -> LossSums:
        """Losses summed (not averaged) over the unmasked targets of `batch`; `total` carries the gradient."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Predict each token from those before it; `z_loss` weighs the squared log-normaliser of the output."""

    z_loss: float = 0.0

    def loss_sums(self, model: nn.Module, batch: Batch) -> LossSums:
        def head(hidden_BTD: Tensor, weight_VD: Tensor) -> LossSums:
            return linear_cross_entropy(hidden_BTD.flatten(0, 1), weight_VD, batch.targets_BT.flatten(), self.z_loss)

        return model(batch.inputs_BT, head=head)
