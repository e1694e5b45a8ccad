"""Training tasks: a model and a batch become a summed loss, and the count that it is divided by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from open_lm.data.batch import Batch
from open_lm.kernels.linear_cross_entropy import linear_cross_entropy
from open_lm.kernels.linear_divergence import linear_divergence


class Losses(NamedTuple):
    """Sums over what the task counts in one micro-batch."""

    total: Tensor
    """The value that is minimised, with gradients."""
    parts: Tensor
    """Metrics, without gradients: one sum for each of the task's `names`."""


class Task:
    """An objective: pretraining, fine-tuning, preference training and reinforcement learning differ in this."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of `Losses.parts` in metrics; the first is `loss`."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor:
        """The number that divides the summed losses of `batch`, on its device: by default of unmasked targets.

        A scalar, or one for each of `names`, the first of which divides what is minimised.
        """
        return batch.n_targets

    def prepare(self, state: Any, batch: Batch, accum: int) -> Batch:
        """`batch` with what the loss needs to know of the whole of it, computed before its first micro-batch."""
        return batch

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        """Losses summed (not averaged) over what `count` counts in `batch`."""
        raise NotImplementedError


@dataclass(frozen=True)
class NextToken(Task):
    """Predict each token from those before it.

    `z_loss` weighs the squared log-normaliser of the output; `balance_loss` the load-balancing loss of a model with
    `n_experts` experts, whose mean over the micro-batches is taken by their numbers of targets. `logit_mean` also
    reports the mean logit.
    """

    z_loss: float = 0.0
    balance_loss: float | None = None
    logit_mean: bool = False
    n_experts: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        loads = (f"expert_load_{expert}" for expert in range(self.n_experts))
        experts = ("load_balancing_loss", "tokens_dropped", "expert_load_max", *loads)
        return (
            "loss",
            "z_loss",
            *(("logit_mean",) if self.logit_mean else ()),
            *(experts if self.balance_loss is not None else ()),
        )

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        def head(hidden_BTD: Tensor, weight_VD: Tensor, routing: Any = None) -> Losses:
            return self._losses(batch, hidden_BTD.flatten(0, 1), weight_VD, routing)

        return model(batch.inputs_BT, **batch.model_inputs, head=head)

    def _losses(
        self, batch: Batch, hidden_ND: Tensor, weight_VD: Tensor, routing: Any = None, share: float = 1.0
    ) -> Losses:
        """`share` weighs the cross-entropy in the total; z-loss and balance loss keep their own weights."""
        targets_N = batch.targets_BT.flatten()
        sums = linear_cross_entropy(hidden_ND, weight_VD, targets_N, self.z_loss / share if share else 0.0)
        total = sums.total * share
        if not share and self.z_loss:
            total = linear_cross_entropy(hidden_ND, weight_VD, targets_N, self.z_loss).total - sums.total
        parts = [sums.cross_entropy, sums.squared_log_z]
        if self.logit_mean:
            parts.append(sum_of_mean_logits(hidden_ND, weight_VD, targets_N >= 0))
        if routing is None:
            return Losses(total, torch.stack(parts).detach())
        n_targets = batch.n_targets
        parts += [routing.balance_loss * n_targets, routing.n_dropped.float(), routing.load.max() * n_targets]
        parts += (routing.load.mean(0) * n_targets).unbind()
        total = total + (self.balance_loss or 0.0) * n_targets * routing.balance_loss
        return Losses(total, torch.stack(parts).detach())


@torch.no_grad()
def sum_of_mean_logits(hidden_ND: Tensor, weight_VD: Tensor, counted_N: Tensor) -> Tensor:
    """The mean logit of each counted position, summed; the mean of products is the product with the mean row."""
    mean_D = weight_VD.float().mean(0)
    mean_D = mean_D.full_tensor() if isinstance(mean_D, DTensor) else mean_D  # ranks may divide the vocabulary
    return (hidden_ND.float() * counted_N[:, None]).sum(0) @ mean_D


@dataclass(frozen=True)
class Distillation(Task):
    """Predict the next token and what a teacher thinks of it: `(1 - weight) * cross-entropy + weight * divergence`
    (Hinton et al., arXiv:1503.02531), beside z-loss and balance loss at their own weights."""

    teacher: nn.Module
    """In eval mode, without gradients, of the same vocabulary; not saved with the run."""
    weight: float = 0.5
    temperature: float = 1.0
    next_token: NextToken = NextToken()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.next_token.names, "distill_loss")

    def loss_sums(self, model: nn.Module, batch: Batch) -> Losses:
        with torch.no_grad():
            teacher_hidden_BTE, teacher_weight_VE = self.teacher(
                batch.inputs_BT, **batch.model_inputs, head=lambda *both: both
            )

        def head(hidden_BTD: Tensor, weight_VD: Tensor, routing: Any = None) -> Losses:
            hidden_ND, counted_N = hidden_BTD.flatten(0, 1), batch.targets_BT.flatten() >= 0
            plain = self.next_token._losses(batch, hidden_ND, weight_VD, routing, share=1 - self.weight)
            teacher_ND = teacher_hidden_BTE.flatten(0, 1)
            divergence = linear_divergence(
                hidden_ND, weight_VD, teacher_ND, teacher_weight_VE, counted_N, self.temperature
            )
            return Losses(plain.total + self.weight * divergence, torch.cat((plain.parts, divergence.detach()[None])))

        return model(batch.inputs_BT, **batch.model_inputs, head=head)
