"""How well a model predicts text it was not trained on: the mean loss over every token of a set, each counted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from open_lm.data.batch import IGNORED, Batch
from open_lm.distributed import World
from open_lm.errors import DataError
from open_lm.kernels.linear_cross_entropy import linear_cross_entropy
from open_lm.precision import Precision


@dataclass(frozen=True)
class ValidationSet:
    """A held-out set: its name, the data it came from, and a way to read this rank's batches of it from the start."""

    name: str
    url: str
    batches: Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class HeldOut:
    """The result on one set: the mean loss in nats per token, and what it is a mean of."""

    name: str
    url: str
    loss: float
    sequences: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate(model: nn.Module, sets: Iterable[ValidationSet], world: World, precision: Precision) -> list[HeldOut]:
    """The held-out loss on each set, the same on every rank; every rank must call this.

    Ranks read different sequences and add up their sums, so the result depends on the number of ranks only by rounding.

    Raises:
        DataError: a set has no token to predict.
    """
    was_training = model.training
    model.eval()
    try:
        return [_evaluate_one(model, held_out, world, precision) for held_out in sets]
    finally:
        model.train(was_training)


def _evaluate_one(model: nn.Module, held_out: ValidationSet, world: World, precision: Precision) -> HeldOut:
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for batch in held_out.batches():
        sums += _sums(model, batch.to(world.device), precision)
    loss_sum, tokens, sequences = world.sum(sums).tolist()
    if not tokens:
        raise DataError(f"--val-data {held_out.url}: no token to predict in it.")
    return HeldOut(held_out.name, held_out.url, loss_sum / tokens, int(sequences), int(tokens))


def _sums(model: nn.Module, batch: Batch, precision: Precision) -> Tensor:
    """Summed loss, counted tokens and counted sequences of one batch, in fp64."""

    def head(hidden_BTD: Tensor, weight_VD: Tensor, **_: object) -> Tensor:
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), weight_VD, batch.targets_BT.flatten()).cross_entropy

    with precision.autocast():
        loss = model(batch.inputs_BT, **batch.model_inputs, head=head)
    counted_BT = batch.targets_BT != IGNORED
    return torch.stack((loss.double(), counted_BT.sum().double(), counted_BT.any(-1).sum().double()))
