"""Metric sinks: opened for one run folder, written at each report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from open_lm.tracking.config import SINKS, TrackingConfig


@dataclass(frozen=True)
class RunFacts:
    """Facts of the run that a sink writes for."""

    name: str
    folder: str
    flags: Mapping[str, Any]
    tracking: TrackingConfig


@dataclass(frozen=True)
class Resumed:
    """The point a run goes on from: its step, the tokens trained by then, and the step as what was written before
    counts it, which is another after a change of the batch."""

    step: int
    tokens: int
    step_before: int

    @property
    def counts_otherwise(self) -> bool:
        """Whether a step has another number of tokens from here on."""
        return self.step != self.step_before

    @property
    def batch_before(self) -> float:
        """Tokens of a step before that point."""
        return self.tokens / self.step_before if self.step_before else 1.0

    def forgets(self, tokens: float) -> bool:
        """Whether what was measured after so many tokens comes later, so that the run measures it again."""
        return tokens > self.tokens + 0.5  # a place that was worked out may be a fraction


class Sink(Protocol):
    """One way to write metrics down; made with the facts of the run."""

    def __init__(self, run: RunFacts): ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of `step`, all at once."""
        ...

    def close(self) -> None:
        """Write whatever is still held back."""
        ...


@runtime_checkable
class RewindingSink(Protocol):
    """A sink that can forget what a run measures again when it goes on from an earlier checkpoint."""

    def rewind(self, to: Resumed) -> None:
        """Forget what was measured after that point, and nothing else."""
        ...


@runtime_checkable
class TableSink(Protocol):
    """A sink that also shows tables, such as answers with their rewards."""

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show `rows` under `name` at `step`."""
        ...


def open_sinks(run: RunFacts) -> list[Sink]:
    """The sinks that the flags ask for."""
    return [SINKS.load(name)(run) for name in run.tracking.sinks]
