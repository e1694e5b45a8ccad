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


class Sink(Protocol):
    """One way to write metrics down; made with the facts of the run."""

    def __init__(self, run: RunFacts): ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of `step`, all at once."""
        ...

    def rewind(self, step: int) -> None:
        """Forget what comes after `step`, where that can be done: the run goes on from there."""
        ...

    def close(self) -> None:
        """Write whatever is still held back."""
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
