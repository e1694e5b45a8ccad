"""Validation loss: the mean over every token of a set, each counted once.

Shapes: B sequences, T positions, N = B*T, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.data.batch import IGNORED, Batch
from open_lm.distributed import World
from open_lm.errors import DataError
from open_lm.evaluate.bootstrap import Bootstrap, interval_95
from open_lm.kernels.linear_cross_entropy import linear_cross_entropy, rows_per_chunk
from open_lm.precision import Precision

Interval = tuple[float, float]


@dataclass(frozen=True)
class ValidationSet:
    """A validation set: its name, the data it came from, and a way to read this rank's batches of it from the start.

    `bytes_of_V` is the number of bytes each id stands for, where the tokenizer is known.
    """

    name: str
    url: str
    batches: Callable[[], Iterable[Batch]]
    bytes_of_V: Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class ValidationResult:
    """The result on one set: the mean loss in nats per token, and what it is a mean of.

    `bytes` are those of the text that the targets decode to; None where the tokenizer is not known. The intervals of
    95 % are of the mean over sequences of their mean losses, and of the mean over tokens; None where not asked for.
    """

    name: str
    url: str
    loss: float
    sequences: int
    tokens: int
    bytes: int | None = None
    sequence_interval: Interval | None = None
    token_interval: Interval | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The loss of all targets in bits, over the bytes they decode to: the same unit for every tokenizer."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None


@dataclass
class Tally:
    """Sums over the batches of one rank; the losses of single sequences and tokens only where they are needed."""

    sums: Tensor  # loss, tokens, sequences, bytes, in fp64
    of_sequences: list[Tensor] = field(default_factory=list)
    of_tokens: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    sets: Iterable[ValidationSet],
    world: World,
    precision: Precision,
    bootstrap: Bootstrap | None = None,
) -> list[ValidationResult]:
    """The validation loss on each set, the same on every rank; every rank must call this.

    Ranks read different sequences and add up their sums, so the result depends on the number of ranks only by rounding.
    With `bootstrap`, rank 0 draws intervals.

    Raises:
        DataError: a set has no token to predict.
    """
    was_training = model.training
    model.eval()
    try:
        return [_evaluate_one(model, one, world, precision, bootstrap) for one in sets]
    finally:
        model.train(was_training)


def _evaluate_one(
    model: nn.Module, one: ValidationSet, world: World, precision: Precision, bootstrap: Bootstrap | None
) -> ValidationResult:
    tally = Tally(torch.zeros(4, dtype=torch.float64, device=world.device))
    for batch in one.batches():
        _add(tally, model, batch.to(world.device), precision, one.bytes_of_V, bootstrap)
    loss_sum, tokens, sequences, n_bytes = world.sum(tally.sums).tolist()
    if not tokens:
        raise DataError(f"--val-data {one.url}: no token to predict in it.")
    return ValidationResult(
        one.name,
        one.url,
        loss_sum / tokens,
        int(sequences),
        int(tokens),
        bytes=int(n_bytes) if one.bytes_of_V is not None else None,
        sequence_interval=_interval(tally.of_sequences, world, bootstrap)
        if bootstrap and bootstrap.sequences
        else None,
        token_interval=_interval(tally.of_tokens, world, bootstrap) if bootstrap and bootstrap.tokens else None,
    )


def _add(
    tally: Tally,
    model: nn.Module,
    batch: Batch,
    precision: Precision,
    bytes_of_V: Tensor | None,
    bootstrap: Bootstrap | None,
) -> None:
    """Add one batch to `tally`."""
    counted_BT = batch.targets_BT != IGNORED
    head = _losses_head(batch) if bootstrap else _sum_head(batch)
    with precision.autocast():
        loss = model(batch.inputs_BT, **batch.model_inputs, head=head)
    if bootstrap:
        n_counted_B = counted_BT.sum(-1)
        mean_B = loss.sum(-1) / n_counted_B
        tally.of_sequences.append(mean_B[n_counted_B > 0].cpu())
        if bootstrap.tokens:
            tally.of_tokens.append(loss[counted_BT].cpu())
    targets_N = batch.targets_BT[counted_BT]
    n_bytes = bytes_of_V[targets_N].sum() if bytes_of_V is not None else targets_N.new_zeros(())
    parts = (loss.double().sum(), counted_BT.sum(), counted_BT.any(-1).sum(), n_bytes)
    tally.sums += torch.stack([part.double() for part in parts])


def _sum_head(batch: Batch) -> Callable[..., Tensor]:
    """The summed loss of `batch`."""

    def head(hidden_BTD: Tensor, weight_VD: Tensor, **_: object) -> Tensor:
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), weight_VD, batch.targets_BT.flatten()).cross_entropy

    return head


def _losses_head(batch: Batch) -> Callable[..., Tensor]:
    """The loss of each target of `batch`, 0 where there is none, (B, T)."""

    def head(hidden_BTD: Tensor, weight_VD: Tensor, **_: object) -> Tensor:
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), batch.targets_BT.flatten()
        n_rows = rows_per_chunk(hidden_ND.shape[0], hidden_ND.shape[1], weight_VD.shape[0])
        chunks = zip(hidden_ND.split(n_rows), targets_N.split(n_rows), strict=True)
        losses = [
            F.cross_entropy(F.linear(hidden, weight_VD).float(), targets, reduction="none", ignore_index=IGNORED)
            for hidden, targets in chunks
        ]
        return torch.cat(losses).view_as(batch.targets_BT)

    return head


def _interval(losses: list[Tensor], world: World, bootstrap: Bootstrap) -> Interval:
    """The interval of the mean over the losses of all ranks, drawn on rank 0."""
    shares = world.gather_shares(torch.cat(losses) if losses else torch.zeros(0))
    return world.on_rank0(lambda: interval_95(torch.cat(shares), bootstrap))
