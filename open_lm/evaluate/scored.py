"""Scored tasks: `records.jsonl`, one line for each (weights, task, settings) that was ever scored into a folder.

A line is appended whole and never changed, so a kill loses at most the task it interrupted, and processes may share the
folder. results.json, .csv and .md are views of it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from open_lm import storage
from open_lm.evaluate.records import CheckpointRecords, Record, read_results

NAME = "records.jsonl"


@dataclass(frozen=True)
class ScoredTask:
    """The records of one job of one checkpoint; `identity` is that of the settings, `about` has no records."""

    key: str
    identity: str
    about: CheckpointRecords
    records: tuple[Record, ...]

    @property
    def asked(self) -> tuple[str, str, str]:
        """The key of a line: weights, task and settings; equal only when two lines answer the same question."""
        return (self.about.weights, self.key, self.identity)

    def to_line(self) -> str:
        about = {name: value for name, value in asdict(self.about).items() if name not in ("records", "averages")}
        return json.dumps(
            {"weights": self.about.weights, "key": self.key, "identity": self.identity, "about": about,
             "records": [asdict(record) for record in self.records]}
        )  # fmt: skip

    @classmethod
    def from_line(cls, line: str) -> ScoredTask:
        values = json.loads(line)
        records = tuple(Record(**record) for record in values["records"])
        return cls(values["key"], values["identity"], CheckpointRecords(**values["about"]), records)


class ScoredFolder:
    """The scored tasks of a folder; with `keep` those of earlier evaluations count, else only this one's."""

    def __init__(self, folder: str, *, keep: bool):
        self.folder, self.path, self.keep = folder, storage.join(folder, NAME), keep
        self.session: list[ScoredTask] = []

    def read(self) -> list[ScoredTask]:
        """Every whole line, oldest first, behind what a results.json from before this file was kept holds."""
        if not storage.exists(self.path):
            return _from_results(self.folder)
        found = []
        for number, line in enumerate(storage.read_text(self.path).splitlines(), 1):
            try:
                found.append(ScoredTask.from_line(line))
            except (ValueError, KeyError, TypeError):
                logging.warning("%s:%d: not a whole line; that task is scored again.", self.path, number)
        return found

    def add(self, task: ScoredTask) -> None:
        """Append the task, whole or not at all, and keep it."""
        if not storage.exists(self.path):  # what is known only from results.json becomes lines first
            for known in _from_results(self.folder) if self.keep else ():
                _append(self.path, known.to_line())
        _append(self.path, task.to_line())
        self.session.append(task)

    def reuse(self, task: ScoredTask) -> None:
        """Take a kept task as the answer to what is asked now."""
        self.session.append(task)

    def runs(self) -> list[CheckpointRecords]:
        """Records of each checkpoint, under its present name: the newest, or those requested."""
        names: dict[str, dict[str, CheckpointRecords]] = {}
        for task in self.session:
            names.setdefault(task.about.weights, {})[task.about.name] = task.about
        earlier = [
            replace(task, about=about)
            for task in (self.read() if self.keep else ())
            for about in names.get(task.about.weights, {task.about.name: task.about}).values()
        ]
        return runs_of([*earlier, *self.session])


def runs_of(tasks: Iterable[ScoredTask]) -> list[CheckpointRecords]:
    """One entry for each checkpoint, in the order they come in; the last of several lines for a task counts."""
    runs: dict[tuple[str, str], tuple[CheckpointRecords, dict[str, Sequence[Record]]]] = {}
    for task in tasks:
        at = (task.about.weights, task.about.name)
        jobs = runs[at][1] if at in runs else {}
        jobs[task.key] = task.records
        runs[at] = (task.about, jobs)
    return [
        replace(about, records=[record for records in jobs.values() for record in records], averages={})
        for about, jobs in runs.values()
    ]


def _append(path: str, line: str) -> None:
    if storage.is_remote(path):
        before = storage.read_text(path) if storage.exists(path) else ""
        storage.write_text(path, before + "\n" * bool(before and not before.endswith("\n")) + line + "\n")
        return
    with open(storage.local_path(path), "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"  # behind a line that a kill cut off
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _from_results(folder: str) -> list[ScoredTask]:
    """The tasks in a results.json that was written before there were lines."""
    path = storage.join(folder, "results.json")
    if not storage.exists(path):
        return []
    tasks: dict[Any, ScoredTask] = {}
    for run in read_results(path).runs:
        for record in run.records:
            at = (run.weights, record.key, record.identity)
            before = tasks[at].records if at in tasks else ()
            tasks[at] = ScoredTask(record.key, record.identity, run, (*before, record))
    return list(tasks.values())
