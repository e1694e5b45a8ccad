"""Facts of a run for its report: its folder and the files around it, read without torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from open_lm import storage
from open_lm.errors import DataError
from open_lm.report.rows import TOKENS, read_rows

Curve = list[tuple[float, float]]
FIRST_SET = "valid/loss"
"""The metric of the first validation set; that of a further one has its name inside."""
REINFORCED = ("grpo", "rloo", "ppo")


@dataclass(frozen=True)
class RunSummary:
    """The figures of one run: `metrics` maps a metric to its value by tokens trained (steps where it counts those);
    `config` is its newest checkpoint's; `checkpoints` are their places, and `steps` the last step, as counted last."""

    name: str
    folder: str
    metrics: Mapping[str, Mapping[float, float]]
    config: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: tuple[float, ...] = ()
    steps: int = 0
    validation: Mapping[str, str] = field(default_factory=dict)
    """Metric -> the validation set it was measured on, "" where its name is not known."""

    @property
    def counts_steps(self) -> bool:
        """Whether its charts run over steps: answers of reinforcement learning have no fixed number of tokens."""
        return task_of(self.config) in REINFORCED

    @property
    def tokens_per_step(self) -> float:
        """Tokens in one batch, that of the last step logged."""
        return (self.last(TOKENS) or 0.0) / max(self.steps, 1)

    def over_tokens(self, metric: str) -> Curve:
        """The metric as (tokens trained, value), in order."""
        return sorted(self.metrics.get(metric, {}).items())

    def last(self, metric: str) -> float | None:
        """The metric's last finite value; None when there is none."""
        values = {place: value for place, value in self.metrics.get(metric, {}).items() if math.isfinite(value)}
        return values[max(values)] if values else None

    @property
    def task(self) -> str:
        """--task of its newest checkpoint."""
        return task_of(self.config)

    @property
    def vocab_size(self) -> int | None:
        return self.config.get("model", {}).get("vocab_size")

    @property
    def uniform_loss(self) -> float | None:
        """ln(vocabulary): the loss of a uniform guess."""
        return math.log(self.vocab_size) if self.vocab_size else None


def task_of(config: Mapping[str, Any]) -> str:
    """--task of a checkpoint's config."""
    return config.get("flags", {}).get("task") or "pretrain"


def read_run(folder: str) -> RunSummary:
    """The facts in a run folder; what was logged twice, by a run and its resumption, counts as last logged.

    Raises:
        DataError: metrics.jsonl is missing or damaged.
    """
    path = storage.join(folder, "metrics.jsonl")
    if not storage.exists(path):
        raise DataError(f"--run {folder}: no metrics.jsonl there. Name the folder of a run: <logs>/<name>.")
    rows, commits = read_rows(path), _commits(folder)
    config = commits[-1]["facts"].get("config", {}) if commits else {}
    over_steps = task_of(config) in REINFORCED
    metrics: dict[str, dict[float, float]] = {}
    for row in rows:
        for name, value in row.values.items():
            metrics.setdefault(name, {})[row.step if over_steps else row.tokens] = value
    steps = max(rows, key=lambda row: row.tokens).step if rows else 0
    per_step = 1.0 if over_steps or not steps else max(row.tokens for row in rows) / steps
    places = [None if over_steps else commit["facts"].get("tokens") for commit in commits]
    checkpoints = [place or commit["step"] * per_step for place, commit in zip(places, commits, strict=True)]
    sets = validation_sets(metrics, folder)
    return RunSummary(distinct_names([folder])[0], folder, metrics, config, tuple(checkpoints), steps, sets)


def validation_sets(metrics: Iterable[str], folder: str) -> dict[str, str]:
    """The metrics that are losses on validation sets, with the names of these; that of the first stands in the run's
    results.jsonl."""
    further = [name for name in metrics if re.fullmatch("valid/.+/loss", name)]
    names = {name: name.removeprefix("valid/").removesuffix("/loss") for name in further}
    return {FIRST_SET: _first_set(folder), **names} if FIRST_SET in metrics else names


def _first_set(folder: str) -> str:
    path = storage.join(folder, "checkpoints/results.jsonl")
    lines = storage.read_text(path).splitlines() if storage.exists(path) else []
    with contextlib.suppress(ValueError, KeyError, TypeError, IndexError):
        return str(json.loads(lines[0])[0]["name"])
    return ""


def distinct_names(folders: Sequence[str]) -> list[str]:
    """The names of runs: of its folder, with as many of the folders above as tell it from the others."""
    paths = [_parts(folder) for folder in folders]
    tails = [["/".join(path[-n:]) for n in range(1, len(path) + 1)] for path in paths]
    return [
        next((tail for tail in own if sum(tail in others for others in tails) == 1), own[0] if own else folder)
        for own, folder in zip(tails, folders, strict=True)
    ]


def _parts(folder: str) -> list[str]:
    """The names on the way to a folder, local or remote."""
    path = folder if storage.is_remote(folder) else os.path.abspath(storage.local_path(folder))
    return [part for part in path.split("/") if part]


def _commits(folder: str) -> list[dict]:
    """The commit files of the run's checkpoints, oldest first: by branch, then by step."""
    paths = storage.glob_in(folder, "checkpoints/epoch_*.commit.json")
    commits = (json.loads(storage.read_text(path)) for path in paths)
    return sorted(commits, key=lambda commit: (commit["facts"].get("branch", 0), commit["step"]))


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
