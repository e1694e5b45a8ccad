"""Records of a ladder's runs: which promised checkpoints exist, and the metrics kept beside each of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.checkpoint.commit import committed
from open_lm.ladder.plan import SizePlan
from open_lm.ladder.run_configurator import RunCheckpointInfo
from open_lm.report.rows import read_rows

CHECKPOINTS = "checkpoints"
LOG = "metrics.jsonl"
NOT_METRICS = {"step"}


@dataclass(frozen=True)
class FoundCheckpoint:
    """A checkpoint that the ladder promises; `path` and `metrics_path` are None while they do not exist."""

    info: RunCheckpointInfo
    path: str | None
    metrics_path: str | None


def metrics_name(step: int | str) -> str:
    """The file of a checkpoint's metrics."""
    return f"metrics_step{step}.json"


def find_checkpoints(plan: SizePlan, folders: list[str]) -> list[FoundCheckpoint]:
    """Each promised checkpoint with what exists of it in any of `folders`, run folders local or remote."""
    paths: dict[int, str] = {}
    metrics: dict[int, str] = {}
    for folder in folders:
        kept = storage.join(folder, CHECKPOINTS)
        for commit in committed(kept):
            paths.setdefault(commit.step, storage.join(kept, commit.weights_name))
        for path in _metrics_files(folder):
            step = path.rpartition("metrics_step")[2].removesuffix(".json")
            if step.isdigit():
                metrics.setdefault(int(step), path)
    return [FoundCheckpoint(info, paths.get(info.step), metrics.get(info.step)) for info in plan.numbers.checkpoints]


def metrics_by_step(folder: str) -> dict[int, dict[str, float]]:
    """The rows of metrics.jsonl merged by step; a step that a resumed run repeats counts as last logged."""
    path = storage.join(folder, LOG)
    rows: dict[int, dict[str, float]] = {}
    if not storage.exists(path):
        return rows
    for row in _json_lines(storage.read_text(path)):
        rows.setdefault(int(row["step"]), {}).update({k: v for k, v in row.items() if k not in NOT_METRICS})
    return rows


def metrics_by_tokens(folder: str) -> dict[float, dict[str, Any]]:
    """The rows of metrics.jsonl with their steps, merged by tokens trained: of a run whose batch may have changed."""
    path = storage.join(folder, LOG)
    rows: dict[float, dict[str, Any]] = {}
    for row in read_rows(path) if storage.exists(path) else []:
        rows.setdefault(row.tokens, {}).update({**row.values, "step": row.step})
    return rows


def _json_lines(text: str) -> Iterator[dict[str, Any]]:
    """Objects with a step, one a line; a last line that a kill cut off is left out."""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def smoothed_loss(rows: Mapping[Any, Mapping[str, float]], step: float, n_steps: float) -> float | None:
    """Mean training loss over about `n_steps` steps up to `step` (or tokens, where `rows` go by tokens); each row holds
    the mean since the row before it."""
    logged = sorted(at for at, row in rows.items() if at <= step and row.get("train/loss") is not None)
    total, weight = 0.0, 0.0
    for before, at in reversed(list(zip([0, *logged], logged, strict=False))):
        if weight and at <= step - n_steps:
            break
        total, weight = total + (at - before or 1) * rows[at]["train/loss"], weight + (at - before or 1)
    return total / weight if weight else None


def checkpoint_metrics(plan: SizePlan, info: RunCheckpointInfo, rows: dict[int, dict[str, float]]) -> dict[str, Any]:
    """The content of metrics_step{N}.json: the point of the ladder, then all that was measured at its step."""
    measured, tokens = rows.get(info.step, {}), info.step * plan.numbers.batch_tokens
    trained = smoothed_loss(rows, info.step, plan.loss_steps(info.step))
    loss = measured.get("valid/loss", trained)
    return {
        "name": f"{plan.config.name}-{plan.name}",
        "step": info.step,
        "description": info.description,
        "tokens": tokens,
        "size": plan.name,
        "num_params": plan.n_params,
        "counting": plan.config.counting,
        "flops": 6 * plan.n_params * tokens,
        "train_flops": plan.model_size.flops_per_token * tokens,
        "loss": loss,
        "train/loss_smoothed": trained,
        **{name: value for name, value in measured.items() if name not in ("name", "tokens", "loss")},
    }


def collect_metrics(plan: SizePlan, folder: str, copies: Sequence[str] = ()) -> None:
    """Write metrics_step{N}.json in a local run folder for every checkpoint there, or in `copies`, that has none.

    They are made from metrics.jsonl, so a kill before they are written loses nothing.
    """
    found = find_checkpoints(plan, [folder, *copies])
    missing = [checkpoint.info for checkpoint in found if checkpoint.path and not checkpoint.metrics_path]
    rows = metrics_by_step(folder) if missing else {}
    for info in missing:
        if _is_measured(plan, info, rows):
            content = json.dumps(checkpoint_metrics(plan, info, rows), indent=1)
            storage.write_text(os.path.join(folder, CHECKPOINTS, metrics_name(info.step)), content)


def copy_metrics(folder: str, remote: str) -> None:
    """Copy the metrics of a local run folder to where its checkpoints are kept."""
    for path in _metrics_files(folder):
        target = storage.join(storage.join(remote, CHECKPOINTS), os.path.basename(path))
        content = storage.read_text(path)
        if not storage.exists(target) or storage.read_text(target) != content:
            storage.write_text(target, content)


def _is_measured(plan: SizePlan, info: RunCheckpointInfo, rows: dict[int, dict[str, float]]) -> bool:
    """Whether the run has logged all that is measured at a checkpoint; a save may be done before the scores are."""
    row, config = rows.get(info.step, {}), plan.config
    if config.val_data and "valid/loss" not in row:
        return False
    if config.icl_tasks and not any(name.startswith("icl/") for name in row):
        return False
    return bool(row) or info.step == 0


def read_json(path: str) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is none."""
    if not storage.exists(path):
        return None
    try:
        loaded = json.loads(storage.read_text(path))
    except ValueError:
        logging.warning("%s is damaged: left out.", path)
        return None
    return loaded if isinstance(loaded, dict) else None


def run_folders(root: str) -> list[str]:
    """The folders in `root`, local or remote, that hold a run."""
    return [storage.parent(path) for path in storage.glob_in(root, f"*/{LOG}")]


def _metrics_files(folder: str) -> list[str]:
    """The metrics kept beside the checkpoints of a run folder."""
    return storage.glob_in(storage.join(folder, CHECKPOINTS), metrics_name("*"))
