"""Facts of a run for its report: its folder and the files around it, read without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from open_lm import storage
from open_lm.errors import DataError

Curve = list[tuple[float, float]]
REINFORCED = ("grpo", "rloo", "ppo")


@dataclass(frozen=True)
class RunSummary:
    """The figures of one run: `metrics` maps a metric to its value by step; `config` is its newest checkpoint's."""

    name: str
    folder: str
    metrics: Mapping[str, Mapping[int, float]]
    config: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_steps: tuple[int, ...] = ()

    @property
    def counts_steps(self) -> bool:
        """Whether its charts run over steps: answers of reinforcement learning have no fixed number of tokens."""
        return self.task in REINFORCED

    @cached_property
    def tokens_per_step(self) -> float:
        """Tokens in one batch, from the last step that was logged; 1 where charts run over steps."""
        if self.counts_steps:
            return 1.0
        tokens = self.metrics.get("train/tokens", {})
        return tokens[max(tokens)] / max(tokens) if tokens else 1.0

    def over_tokens(self, metric: str) -> Curve:
        """The metric as (tokens trained, value), in order."""
        return [(step * self.tokens_per_step, value) for step, value in sorted(self.metrics.get(metric, {}).items())]

    def last(self, metric: str) -> float | None:
        """The metric's last finite value; None when there is none."""
        values = {step: value for step, value in self.metrics.get(metric, {}).items() if math.isfinite(value)}
        return values[max(values)] if values else None

    @property
    def task(self) -> str:
        """--task of its newest checkpoint."""
        return self.config.get("flags", {}).get("task") or "pretrain"

    @property
    def vocab_size(self) -> int | None:
        return self.config.get("model", {}).get("vocab_size")

    @property
    def uniform_loss(self) -> float | None:
        """ln(vocabulary): the loss of a uniform guess."""
        return math.log(self.vocab_size) if self.vocab_size else None


def read_run(folder: str) -> RunSummary:
    """The facts in a run folder; a step logged twice, by a run and its resumption, counts as last logged.

    Raises:
        DataError: metrics.jsonl is missing or damaged.
    """
    path = storage.join(folder, "metrics.jsonl")
    if not storage.exists(path):
        raise DataError(f"--run {folder}: no metrics.jsonl there. Name the folder of a run: <logs>/<name>.")
    metrics: dict[str, dict[int, float]] = {}
    for row in read_json_lines(path, needed=("step",)):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                metrics.setdefault(name, {})[row["step"]] = value
    commits = _commits(folder)
    config = commits[-1]["facts"].get("config", {}) if commits else {}
    name = folder.rstrip("/").rpartition("/")[2]
    return RunSummary(name, folder, metrics, config, tuple(commit["step"] for commit in commits))


def _commits(folder: str) -> list[dict]:
    """The commit files of the run's checkpoints, oldest first."""
    paths = storage.glob_in(folder, "checkpoints/epoch_*.commit.json")
    return sorted((json.loads(storage.read_text(path)) for path in paths), key=lambda commit: commit["step"])


def read_json_lines(path: str, needed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a jsonl file.

    Raises:
        DataError: a line is no JSON object with the keys `needed`.
    """
    rows = []
    for number, line in enumerate(storage.read_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({**row, **{key: row[key] for key in needed}})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: no JSON object as expected ({error!r}). Remove the line.") from error
    return rows


def read_json(path: str, flag_name: str) -> Any:
    """The content of a JSON file that a flag names.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(storage.read_text(path))
    except ValueError as error:
        raise DataError(f"{flag_name} {path}: not JSON ({error}). Make the file again.") from error


def smoothed(points: Curve, n_points: int) -> Curve:
    """The running mean over `n_points` points, centred; near the ends over as many as there are on both sides, and of
    finite values only."""
    values = [value for _, value in points]
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(i, len(points) - 1 - i, n_points // 2)
        around = [value for value in values[i - reach : i + reach + 1] if math.isfinite(value)]
        result.append((x, sum(around) / len(around) if around else math.nan))
    return result
