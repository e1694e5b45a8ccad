"""Evaluation records: one per metric, in results.json, results.csv and results.md."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from open_lm import storage
from open_lm.errors import DataError

FORMAT = "open_lm evaluation 1"
PACKAGES = ("torch", "transformers", "tokenizers", "llm-foundry", "mosaicml", "lm_eval")


@dataclass(frozen=True)
class Record:
    """One metric of one task."""

    key: str  # label/3-shot[/category]
    label: str
    shots: int
    category: str | None
    metric: str
    value: float
    stderr: float | None
    chance: float | None
    questions: int
    truncated: int | None  # prompts that lost their start; None: the engine does not say
    seconds: float
    data_sha256: str
    identity: str  # of what was asked: the task's settings, its data, the precision, the engine
    part_of: str | None = None  # the group whose row holds the mean of this task and others


@dataclass
class CheckpointRecords:
    """Results of one checkpoint: its step and tokens, its records, and averages over them."""

    name: str
    checkpoint: str
    model: str
    tokenizer: str
    step: int | None = None
    tokens: int | None = None
    weights: str = ""  # path, size and time of the file: a changed file is scored again
    records: list[Record] = field(default_factory=list)
    averages: dict[str, float] = field(default_factory=dict)


@dataclass
class Results:
    """An evaluation of checkpoints, as results.json holds it."""

    engine: str
    settings: dict[str, Any]
    runs: list[CheckpointRecords] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> str:
        """The text of results.json."""
        head = {"format": FORMAT, "engine": self.engine, "seconds": round(self.seconds, 2), "settings": self.settings}
        versions = {"python": platform.python_version(), **{name: v for name in PACKAGES if (v := _version(name))}}
        return json.dumps({**head, "versions": versions, "runs": [asdict(run) for run in self.runs]}, indent=1) + "\n"

    def write(self, folder: str) -> None:
        """Write the three files, each whole or not at all."""
        storage.write_text(storage.join(folder, "results.json"), self.to_json())
        storage.write_text(storage.join(folder, "results.csv"), _csv(self.runs))
        storage.write_text(storage.join(folder, "results.md"), markdown(self.runs))


def read_results(path: str) -> Results:
    """The results in the results.json at `path`.

    Raises:
        DataError: it is not such a file.
    """
    try:
        content = json.loads(storage.read_text(path))
        runs = [
            CheckpointRecords(**{**run, "records": [Record(**record) for record in run["records"]]})
            for run in content["runs"]
        ]
        return Results(content["engine"], content["settings"], runs, content["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a results.json of `openlm evaluate` ({error!r}). Give another, or move it away."
        ) from error


def identity_of(*parts: Any) -> str:
    """A short text that two askings share only when they are the same."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def terminal_table(records: Sequence[Record]) -> str:
    """The records as a table of text."""
    rows = [["task", "metric", "score", "±", "chance", "questions", "seconds"]]
    for r in records:
        numbers = (f"{r.value:.4f}", _shown(r.stderr), _shown(r.chance), str(r.questions), f"{r.seconds:.1f}")
        rows.append([r.key, short(r.metric), *numbers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(_aligned(cell, width, place) for place, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(runs: Sequence[CheckpointRecords]) -> str:
    """A table with one line a task and one column a checkpoint, as in OpenLM's README.

    A task with categories is one line, their mean. The last line is the mean accuracy of the columns that have all; a
    group counts there as one task, its parts do not.
    """
    rows = list(dict.fromkeys((_task_of(r), r.metric) for run in runs for r in run.records))
    lines = ["| task | " + " | ".join(_headings(runs)) + " |", "|---|" + "---|" * len(runs)]
    for key, metric in rows:
        lines.append(f"| {key} ({short(metric)}) | " + " | ".join(_cell(run, key, metric) for run in runs) + " |")
    parts = {_task_of(r) for run in runs for r in run.records if r.part_of}
    measured = [row for row in rows if "accuracy" in row[1].lower() or row[1] == "acc"]
    accuracies = [row for row in measured if row[0] not in parts]
    if len(accuracies) > 1:
        lines.append("| **average** | " + " | ".join(_average(run, accuracies) for run in runs) + " |")
    for name in dict.fromkeys(name for run in runs for name in run.averages):
        cells = (f"{run.averages[name]:.4f}" if name in run.averages else "" for run in runs)
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _headings(runs: Sequence[CheckpointRecords]) -> list[str]:
    """The name of each column; with the beginning of the weights' hash where several share a name."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({run.weights[:9]})" for name, run in zip(names, runs, strict=True)
    ]


def _task_of(record: Record) -> str:
    """A record's key without its category."""
    return record.key.removesuffix(f"/{record.category}") if record.category else record.key


def _values(run: CheckpointRecords, key: str, metric: str) -> list[Record]:
    return [record for record in run.records if (_task_of(record), record.metric) == (key, metric)]


def _mean(records: Sequence[Record]) -> float:
    return sum(record.value for record in records) / len(records)


def _average(run: CheckpointRecords, rows: Sequence[tuple[str, str]]) -> str:
    found = [_values(run, key, metric) for key, metric in rows]
    return f"{sum(map(_mean, found)) / len(found):.4f}" if all(found) else ""


def _cell(run: CheckpointRecords, key: str, metric: str) -> str:
    found = _values(run, key, metric)
    if not found:
        return ""
    error = found[0].stderr if len(found) == 1 else None
    return f"{_mean(found):.4f}" + (f" ± {error:.4f}" if error is not None else "")


def short(metric: str) -> str:
    """`InContextLearningLMAccuracy` as `accuracy`."""
    if metric.endswith("ExactMatchAccuracy"):
        return "exact match"
    if metric.endswith("CalibrationError"):
        return "calibration error"
    return "accuracy" if metric.endswith("Accuracy") else metric


def _csv(runs: Iterable[CheckpointRecords]) -> str:
    out = io.StringIO()
    names = ["name", "checkpoint", "step", "tokens", *(f.name for f in fields(Record)), "weights"]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        about = {"name": run.name, "checkpoint": run.checkpoint, "step": run.step, "tokens": run.tokens}
        writer.writerows({**about, **asdict(record), "weights": run.weights} for record in run.records)
    return out.getvalue()


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
