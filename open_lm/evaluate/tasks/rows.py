"""Rows of a task's file, each checked, with its line number."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.errors import DataError
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
    _CHECKS[task.icl_task_type](row, task, where)
    if task.has_categories:
        _text(row, "category", where)
    if task.icl_task_type == "generation_task_with_answers":
        row["aliases"] = list(dict.fromkeys([row["answer"], *(row.get("aliases") or [])]))
    if task.strip_dataset:
        row = {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}
    return row


def _check_multiple_choice(row: dict[str, Any], task: EvalTask, where: str) -> None:
    _text(row, task.context_key, where)
    _gold(row, _texts(row, task.choices_key, where, at_least=2), where)


def _check_language_modeling(row: dict[str, Any], task: EvalTask, where: str) -> None:
    _text(row, task.context_key, where)
    _text(row, task.answer_key, where, empty=False)


def _check_schema(row: dict[str, Any], task: EvalTask, where: str) -> None:
    _text(row, "continuation", where, empty=False)
    _gold(row, _texts(row, task.choices_key, where, at_least=2), where)


def _check_generation(row: dict[str, Any], task: EvalTask, where: str) -> None:
    _text(row, "context", where)
    _text(row, "answer", where)
    if row.get("aliases") is not None:
        _texts(row, "aliases", where, at_least=0)


_CHECKS = {
    "multiple_choice": _check_multiple_choice,
    "language_modeling": _check_language_modeling,
    "schema": _check_schema,
    "generation_task_with_answers": _check_generation,
}


def _text(row: dict[str, Any], key: str, where: str, *, empty: bool = True) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not (empty or value.strip()):
        found = "nothing" if key not in row else repr(value)
        raise DataError(f"{where}: key {key!r}: found {found}, need text. Keys there: {', '.join(row) or 'none'}.")
    return value


def _texts(row: dict[str, Any], key: str, where: str, *, at_least: int) -> list[str]:
    value = row.get(key)
    if not isinstance(value, list) or len(value) < at_least or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: key {key!r}: found {value!r:.80}, need a list of at least {at_least} texts.")
    return value


def _gold(row: dict[str, Any], choices: list[str], where: str) -> None:
    gold = row.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise DataError(f"{where}: key 'gold': found {gold!r}, need the number of a choice, 0 to {len(choices) - 1}.")
