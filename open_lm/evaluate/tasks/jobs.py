"""Evaluation jobs: every task at every number of few-shot examples, by category, from checked files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.evaluate.tasks.rows import TaskFile, read_rows
from open_lm.evaluate.tasks.task import EvalTask


@dataclass(frozen=True)
class EvalJob:
    """One task asked in one way: with a number of examples before each question, about one category or all."""

    task: EvalTask
    n_shots: int
    category: str | None = None

    @property
    def key(self) -> str:
        """`label/3-shot` or `label/3-shot/category`, as in LLM Foundry's logs."""
        return "/".join([self.task.label, f"{self.n_shots}-shot", *([self.category] if self.category else [])])


class JobBook:
    """The jobs of `tasks` in order, and the rows of each; files are read once, when first needed.

    `subset_batches` (icl_subset_num_batches) keeps so many batches of `batch_size` of each task, counted as LLM
    Foundry counts them.
    """

    def __init__(self, tasks: Iterable[EvalTask], *, subset_batches: int | None = None, batch_size: int = 8):
        self._subset_batches, self._batch_size = subset_batches, batch_size
        self._files: dict[str, TaskFile] = {}
        self.jobs = [
            EvalJob(task, n_shots, category)
            for task in tasks
            for n_shots in task.num_fewshot
            for category in self._categories(task)
        ]

    def file(self, task: EvalTask) -> TaskFile:
        """The checked file of `task`."""
        path = f"{task.data_path or task.dataset_uri} {task.label}"
        if path not in self._files:
            self._files[path] = read_rows(task)
        return self._files[path]

    def rows(self, job: EvalJob) -> Sequence[dict[str, Any]]:
        """The rows `job` draws on, those beyond its subset included: examples may come from them."""
        rows = self.file(job.task).rows
        return rows if job.category is None else [row for row in rows if row["category"] == job.category]

    def names(self, job: EvalJob) -> list[str]:
        """Place of each row, as messages write it: file:line."""
        file = self.file(job.task)
        places = zip(file.rows, file.lines, strict=True)
        return [f"{file.path}:{line}" for row, line in places if job.category in (None, row.get("category"))]

    def n_questions(self, job: EvalJob) -> int:
        """Number of questions of `job`."""
        n_rows = len(self.rows(job))
        if self._subset_batches is None or job.category is not None:
            return n_rows
        size = job.task.batch_size or self._batch_size
        if job.task.choices_key:
            n_choices = len(self.rows(job)[0][job.task.choices_key])
            size = max(n_choices, size) // n_choices
        return min(n_rows, self._subset_batches * size)

    def _categories(self, task: EvalTask) -> Sequence[str | None]:
        if not task.has_categories:
            return [None]
        return sorted({row["category"] for row in self.file(task).rows})
