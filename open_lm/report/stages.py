"""Stages of post-training in the report: what each run measured at its beginning and at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from open_lm.report import page
from open_lm.report.facts import RunSummary

MEASURES = {
    "valid/loss": "validation loss, nats a token",
    "train/preference_accuracy": "pairs ordered rightly",
    "train/reward_margin": "margin between chosen and rejected",
    "train/reward": "mean reward of a sampled answer",
}
"""Metric -> what the table calls it; a run that has none of them shows its training loss."""
N_AVERAGED = 3
"""Logged values of training that an end is the mean of; a validation stands for itself."""


def stage_table(runs: Sequence[RunSummary]) -> str:
    """One row for each run and each of MEASURES that it logged."""
    head = ("stage", "task", "steps", "what", "at first", "at last")
    return page.table(head, [row for run in runs for row in _rows(run)], words=(0, 1, 3))


def _rows(run: RunSummary) -> list[tuple[str, ...]]:
    measured = [metric for metric in MEASURES if run.metrics.get(metric)] or ["train/loss"]
    return [
        (run.name, run.task, f"{run.steps:,}", MEASURES.get(metric, "training loss"), *_ends(run, metric))
        for metric in measured
    ]


def _ends(run: RunSummary, metric: str) -> tuple[str, str]:
    values = [value for _, value in sorted(run.metrics.get(metric, {}).items()) if math.isfinite(value)]
    n = 1 if metric.startswith("valid/") else max(1, min(N_AVERAGED, len(values) // 2))
    write = "{:.1%}".format if metric == "train/preference_accuracy" else "{:.3f}".format
    ends = [part for part in (values[:n], values[-n:]) if part]
    return tuple(write(sum(part) / len(part)) for part in ends) if len(ends) == 2 else ("–", "–")  # type: ignore[return-value]
