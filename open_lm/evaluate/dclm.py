"""Scores in DCLM's form: one JSON a checkpoint, with Core, Extended and the other means over its tasks."""

from __future__ import annotations

import csv
import io
import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.evaluate.averages import accuracies
from open_lm.evaluate.records import CheckpointRecords

KNOWN = Path(__file__).resolve().parent / "suites" / "dclm_tasks.json"
CORE = "low_variance_datasets"
"""DCLM's name of the group of tasks whose mean is Core."""


NO_TABLE = "N/A without --dclm-metadata: give eval/eval_meta_data.csv of github.com/mlfoundations/dclm"


@dataclass(frozen=True)
class Metadata:
    """DCLM's tasks: the category of each, blind guessing's share of right answers, and named groups of tasks.

    `corrected` are the baselines of version 2; `is_whole` says whether they are known for all tasks or only for Core's.
    """

    category: Mapping[str, str]
    baseline: Mapping[str, float]
    corrected: Mapping[str, float]
    groups: Mapping[str, tuple[str, ...]]
    is_whole: bool


def read_metadata(path: str | None) -> Metadata:
    """Categories, baselines and groups of DCLM's tasks; `path`, its eval/eval_meta_data.csv, gives those of version 2.

    Raises:
        ConfigError: it is no such file.
    """
    known = json.loads(KNOWN.read_text())
    category = {name: task["category"] for name, task in known["tasks"].items()}
    baseline = {name: task["baseline"] / 100 for name, task in known["tasks"].items()}
    groups = {name: tuple(tasks) for name, tasks in known["groups"].items()}
    if path is None:
        corrected = baseline | {name: percent / 100 for name, percent in known["v2"].items()}
        return Metadata(category, baseline, corrected, groups, is_whole=False)
    try:
        content = storage.read_text(path).removeprefix("\ufeff")  # a mark that spreadsheets put before it
        rows = list(csv.DictReader(io.StringIO(content)))
        category |= {row["Eval Task"]: row["Task Category"] for row in rows}
        corrected = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
        if wrong := [name for name, share in corrected.items() if not 0 <= share < 1]:
            raise ValueError(f"the baseline of {wrong[0]} is none: 0 to below 100 percent")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ConfigError(f"--dclm-metadata {path}: need DCLM's eval/eval_meta_data.csv ({error!r}).") from error
    return Metadata(category, baseline, corrected, groups, is_whole=True)


def dclm_results(run: CheckpointRecords, suite: str, known: Metadata) -> dict[str, Any]:
    """The scores of one checkpoint under the keys of DCLM's exp_data/evals.

    As there, means are over the tasks that were scored, and Core and Extended are texts where one is missing. Core and
    Extended are those of version 1, the paper's and those of its published files.
    """
    scores = scores_by_task(run)
    first = _centred(scores, known.baseline)
    second = _centred(scores, known.corrected)
    categories = sorted({known.category[name] for name in first})
    found: dict[str, Any] = {
        "name": suite,
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{run.weights} {suite}")),
        "model": run.model,
        "creation_date": time.strftime("%Y_%m_%d-%H_%M_%S"),
        "eval_metrics": {"icl": scores},
        "missing tasks": str([name for name in known.baseline if name not in scores]),
        "aggregated_task_categories_centered": {
            category: _mean(first, [name for name in first if known.category[name] == category])
            for category in categories
        },
        "aggregated_centered_results": _mean(first, known.baseline),
        "aggregated_results": _mean(scores, known.baseline),
    }
    for name, tasks in known.groups.items():
        found |= {name: _mean(scores, tasks), f"{name}_centered": _mean(first, tasks)}
    core, every = known.groups[CORE], tuple(known.baseline)
    found["Core"] = found["Core_v1"] = _whole_mean(first, core)
    found["Extended"] = found["Extended_v1"] = _whole_mean(first, every)
    found["Core_v2"] = _whole_mean(second, core)
    found["Extended_v2"] = _whole_mean(second, every) if known.is_whole else NO_TABLE
    return found


def scores_by_task(run: CheckpointRecords) -> dict[str, float]:
    """The accuracy of each label, the mean over categories where there are any; one asked in several ways has a key for
    each: `label/3-shot`."""
    found = accuracies(run.records)
    labels = [key.rpartition("/")[0] for key in found]
    return {label if labels.count(label) == 1 else key: found[key] for key, label in zip(found, labels, strict=True)}


def write_dclm(runs: Iterable[CheckpointRecords], suite_path: str, folder: str, metadata: str | None) -> list[str]:
    """A file for each checkpoint in `folder`/dclm; returns their paths."""
    known, suite = read_metadata(metadata), Path(suite_path).stem
    paths = []
    for run in runs:
        name = re.sub(r"[^\w.=-]+", "_", f"evaluation_{run.name}_{suite}")
        paths.append(storage.join(storage.join(folder, "dclm"), f"{name}.json"))
        storage.write_text(paths[-1], json.dumps(dclm_results(run, suite, known), indent=4) + "\n")
    return paths


def _centred(scores: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """0 for blind guessing, 1 for all right, of each task that has a baseline."""
    return {name: (scores[name] - base) / (1 - base) for name, base in baseline.items() if name in scores}


def _mean(values: Mapping[str, float], names: Iterable[str]) -> float | None:
    """The mean over those of `names` that have a value."""
    found = [values[name] for name in names if name in values]
    return sum(found) / len(found) if found else None


def _whole_mean(values: Mapping[str, float], names: Iterable[str]) -> float | str | None:
    """The mean over all of `names`, or which of them are missing."""
    missing = [name for name in names if name not in values]
    return f"N/A due to missing tasks: {missing}" if missing else _mean(values, names)
