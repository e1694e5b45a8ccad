"""The optimizer step, with gradient accumulation: one path for every precision and task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from open_lm import faults
from open_lm.data.batch import Batch
from open_lm.train.optim import set_lr
from open_lm.train.parallel import clip_grad_norm, grad_sync
from open_lm.train.state import TrainState
from open_lm.train.timing import Timing

T = TypeVar("T")


@dataclass(frozen=True)
class StepReport:
    """One step's figures. The tensors stay on the device, so that no step waits to be read.

    `parts` are this rank's shares of means over what the task counts on all ranks, one for each of the task's `names`:
    sum them over ranks to read them.
    """

    parts: Tensor
    grad_norm: Tensor
    lr: float
    taken: bool = True
    """Whether the weights were updated; an outlier loss or gradient norm may skip a step."""
    claims: Tensor | None = None
    """Number of ranks that made each of the `claims` of `train_step`; None with one process."""

    @property
    def loss(self) -> Tensor:
        """This rank's share of the mean loss."""
        return self.parts[0]


def train_step(
    state: TrainState, batch: Batch, *, accum: int, clip: float | None, timing: Timing, claims: Sequence[bool] = ()
) -> StepReport:
    """Take one optimizer step on this rank's `batch`, computed in `accum` micro-batches.

    The loss is the mean over what the task counts (tokens, pairs, sequences) on all ranks and in all micro-batches, so
    neither `accum` nor the world size changes it. `claims` are counted over the ranks along with it.
    """
    lr = set_lr(state.optimizers, state.lr_at(state.step))
    with timing("sync"):
        count, claimed = state.world.sum_with_claims(state.task.count(batch), claims)
    count = count.clamp(min=1)
    batch = state.task.prepare(state, batch, accum)
    parts = torch.zeros(len(state.task.names), device=batch.device)
    for micro, is_last in with_last(batch.split(accum)):
        with grad_sync(state.model, enabled=is_last):
            with timing("forward"), state.precision.autocast(keeps_casts=False):
                losses = faults.at("loss", state.task.loss_sums(state.model, micro))
            with timing("backward"):  # DDP and FSDP average gradients over ranks: undo that, the loss is a sum
                state.precision.backward(losses.total / first(count) * state.world.shape.n_shares)
        parts += losses.parts
    with timing("optim_step"):
        faults.at("gradients", state.model)
        state.copied.wait()  # for a save beside the training; before here nothing that it copies has changed
        grad_norm, taken = state.precision.step(
            state.model,
            state.optimizers,
            clip=lambda model: clip_grad_norm(model, clip),
            accept=lambda norm: state.accept(parts[0] / first(count), norm),
        )
    state.step += 1
    state.tokens += state.run_length.tokens_per_step
    for average in state.averages:
        average.update(state.step)
    return StepReport(parts / count, grad_norm, lr, taken, claimed)


@torch.no_grad()
def average_losses(state: TrainState, batch: Batch, *, accum: int) -> dict[str, float]:
    """The loss of each running average on this rank's `batch`, over all ranks; every rank must call this."""
    count = state.world.sum(state.task.count(batch)).clamp(min=1)
    batch = state.task.prepare(state, batch, accum)
    losses: dict[str, float] = {}
    for average in state.averages:
        with average.in_place(), state.precision.autocast():
            shares = [state.task.loss_sums(state.model, micro).parts[0] for micro in batch.split(accum)]
        losses[average.name] = (state.world.sum(torch.stack(shares).sum()) / first(count)).item()
    return losses


def first(count: Tensor) -> Tensor:
    """The count that the loss is divided by, of one or of several."""
    return count if count.ndim == 0 else count[0]


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last one."""
    iterator = iter(items)
    current = next(iterator)
    for following in iterator:
        yield current, False
        current = following
    yield current, True
