"""The training loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from open_lm import faults
from open_lm.data.batch import Batch
from open_lm.train.state import TrainState
from open_lm.train.step import StepReport, train_step
from open_lm.train.timing import Timing


class RunHooks(Protocol):
    """The run around the loop; each method decides itself whether anything is due."""

    def claims(self) -> Sequence[bool]: ...

    def observe(self, state: TrainState) -> AbstractContextManager[None]: ...

    def record(self, report: StepReport, state: TrainState, timing: Timing) -> None: ...

    def score_averages_if_due(self, state: TrainState, batch: Batch) -> None: ...

    def validate_if_due(self, state: TrainState) -> None: ...

    def save_if_due(self, state: TrainState) -> None: ...

    def stop_if_asked(self, state: TrainState) -> None: ...


def train(state: TrainState, batches: Iterable[Batch], run: RunHooks, *, accum: int, clip: float | None) -> None:
    """Train on `batches`, one optimizer step each, from `state.step` on."""
    state.model.train()
    timing = Timing(state.world.device)
    for host_batch in timed(batches, timing, state):
        batch = host_batch.to(state.world.device)
        if state.part is not None:
            batch = batch.of_part(state.part)
        with run.observe(state):
            faults.at("step", state.step)
            report = train_step(state, batch, accum=accum, clip=clip, timing=timing, claims=run.claims())
        run.record(report, state, timing)
        run.score_averages_if_due(state, batch)
        run.validate_if_due(state)
        run.save_if_due(state)
        run.stop_if_asked(state)


def timed(batches: Iterable[Batch], timing: Timing, state: TrainState) -> Iterator[Batch]:
    """`batches`, with the wait for each counted as `data`."""
    iterator = iter(batches)
    while True:
        with timing("data", on_host=True):
            faults.at("data", state.step)
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch
