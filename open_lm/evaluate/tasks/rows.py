"""Rows of a task's file, each checked, with its line number."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.errors import DataError
from open_lm.evaluate.tasks.kinds import text_of, type_of
from open_lm.evaluate.tasks.task import EvalTask


@dataclass(frozen=True)
class TaskFile:
    """The rows of one file in order, the line each stands on, and the hash of its bytes."""

    path: str
    rows: tuple[dict[str, Any], ...]
    lines: tuple[int, ...]
    sha256: str


def read_rows(task: EvalTask) -> TaskFile:
    """The questions of `task`, checked row by row.

    Raises:
        DataError: a row is not what the task type needs (file:line), or there is none.
        StorageError: the file cannot be read.
    """
    path = task.data_path or task.dataset_uri
    content = storage.read_bytes(path)
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Give a .jsonl file.") from error
    places = tuple(number for number, line in enumerate(lines, 1) if line.strip())
    rows = tuple(_row(lines[number - 1], task, f"{path}:{number}") for number in places)
    if not rows:
        raise DataError(f"{path}: no rows in it (task {task.label}). Fetch it again with eval/download_eval_data.py.")
    return TaskFile(path, rows, places, hashlib.sha256(content).hexdigest())


def _row(line: str, task: EvalTask, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}). Repair or remove the line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds a {type(row).__name__}, need an object. Repair or remove the line.")
    row = type_of(task).checked(row, task, where)
    if task.has_categories:
        text_of(row, "category", where)
    if task.strip_dataset:
        row = {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}
    return row
