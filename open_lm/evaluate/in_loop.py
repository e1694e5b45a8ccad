"""Downstream tasks scored while a model trains; read and encoded once, before the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from open_lm.data.tokenizer import Tokenizer, load_tokenizer
from open_lm.distributed import World
from open_lm.evaluate.averages import gauntlet_averages, means_of_categories
from open_lm.evaluate.engine.icl import IclEngine, JobResult
from open_lm.evaluate.eval_model import require_same_vocabulary
from open_lm.evaluate.records import short
from open_lm.evaluate.tasks.jobs import EvalJob, JobBook
from open_lm.evaluate.tasks.suite import Suite, read_suite, require_data


@dataclass(frozen=True)
class PreparedSuite:
    """A suite with its questions and the tokenizer they are encoded with: all that is read from files."""

    suite: Suite
    book: JobBook
    tokenizer: Tokenizer


def prepare_suite(path: str, tokenizer: str, n_embeddings: int) -> PreparedSuite:
    """The tasks of the YAML at `path`, every row of every file read and checked.

    Raises:
        ConfigError: the YAML is malformed, a file is missing, or the tokenizer has ids that the model has not.
        DataError: a row is not what its task needs (file:line).
    """
    suite = read_suite(path, flag="--icl-tasks")
    require_data(suite)
    loaded = load_tokenizer(tokenizer)
    require_same_vocabulary(loaded, n_embeddings)
    book = JobBook(suite.tasks, subset_batches=suite.subset_batches, batch_size=suite.batch_size)
    for task in suite.tasks:
        book.file(task)
    return PreparedSuite(suite, book, loaded)


class InLoopEvaluator:
    """Scores a prepared suite with one model, plain or wrapped in DDP or FSDP; every rank makes one and calls `score`.

    Raises:
        DataError: a question does not fit the model's context.
    """

    def __init__(self, prepared: PreparedSuite, model: nn.Module, world: World, *, seq_len: int, precision: str):
        self._gauntlet = prepared.suite.gauntlet
        self._engine = IclEngine(
            model,
            prepared.tokenizer,
            max_seq_len=min(prepared.suite.max_seq_len or seq_len, seq_len),
            world=world,
            precision=precision,
        )
        self._prepared = [self._engine.prepare(job, prepared.book) for job in prepared.book.jobs]
        n_questions = sum(prepared.book.n_questions(job) for job in prepared.book.jobs)
        n_cut = sum(prepared.n_truncated for prepared in self._prepared)
        logging.info("%s: %d questions, %d prompts cut to the context", prepared.suite.origin, n_questions, n_cut)

    def score(self) -> dict[str, float]:
        """Current scores, the same on every rank: `TASK/METRIC`, and the averages of the gauntlet.

        Each question is asked once over all ranks. A compiled model is run as it is written: the lengths of questions
        differ, and each would be compiled for.
        """
        with torch.compiler.set_stance("force_eager"):
            results = [self._engine.ask(prepared) for prepared in self._prepared]
        return metrics_of(results) | self._averages(results)

    def _averages(self, results: list[JobResult]) -> dict[str, float]:
        if self._gauntlet is None:
            return {}
        accuracy = means_of_categories(
            (f"{r.job.task.label}/{r.job.n_shots}-shot", metric.value)
            for r in results
            for name, metric in r.metrics.items()
            if "Accuracy" in name
        )
        return gauntlet_averages(self._gauntlet, accuracy)


def metrics_of(results: list[JobResult]) -> dict[str, float]:
    """`TASK/METRIC` for each result; a task with categories has their mean under its own name too.

    TASK is the label, followed by `3-shot` only where a task is asked in several ways, and by the category.
    """
    values = [
        (r.job, short(name).replace(" ", "_"), metric.value) for r in results for name, metric in r.metrics.items()
    ]
    single = {f"{_name(job)}/{job.category}/{metric}": value for job, metric, value in values if job.category}
    return means_of_categories((f"{_name(job)}/{metric}", value) for job, metric, value in values) | single


def _name(job: EvalJob) -> str:
    return job.task.label if len(job.task.num_fewshot) == 1 else f"{job.task.label}/{job.n_shots}-shot"
