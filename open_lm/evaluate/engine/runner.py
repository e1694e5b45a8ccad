"""Native engine for the evaluation command: jobs by key in, records out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from open_lm.distributed import World
from open_lm.evaluate.engine.icl import GenerationRequest, IclEngine, LoglikelihoodRequest
from open_lm.evaluate.engine.metrics import Metric
from open_lm.evaluate.eval_model import EvalModel
from open_lm.evaluate.records import Record, identity_of
from open_lm.evaluate.tasks.jobs import EvalJob, JobBook
from open_lm.evaluate.tasks.suite import Suite
from open_lm.progress import CountDone

KEPT_TOKENS = 1 << 23
"""Tokens of encoded questions that are kept for the next checkpoint, about 300 MB; further ones are encoded again."""


class SuiteData:
    """A suite with its rows, read and checked once, and its questions as ids, for any number of checkpoints."""

    def __init__(self, suite: Suite):
        self.book = JobBook(suite.tasks, subset_batches=suite.subset_batches, batch_size=suite.batch_size)
        for task in suite.tasks:
            self.book.file(task)
        self._kept: dict[Any, LoglikelihoodRequest | GenerationRequest] = {}
        self._room = KEPT_TOKENS

    def prepared(self, job: EvalJob, engine: IclEngine) -> LoglikelihoodRequest | GenerationRequest:
        """The questions of `job` as ids of the tokenizer of `engine`, cut to its context."""
        at = (job.key, engine.encoder.tokenizer.fingerprint, engine.max_seq_len)
        if at in self._kept:
            return self._kept[at]
        request = engine.prepare(job, self.book)
        if request.n_tokens <= self._room:
            self._kept[at] = request
            self._room -= request.n_tokens
        return request


class Runner:
    """The jobs of a suite for one checkpoint, in order; each engine says how one is scored."""

    engine_name = ""

    def __init__(
        self,
        eval_model: EvalModel,
        suite: Suite,
        world: World,
        max_seq_len: int,
        precision: str,
        data: SuiteData | None = None,
    ):
        self.eval_model, self.suite, self.world = eval_model, suite, world
        self.max_seq_len, self.precision = max_seq_len, precision
        self.data = data or SuiteData(suite)
        self.book = self.data.book
        self.jobs = {job.key: job for job in self.book.jobs}

    @staticmethod
    def read(suite: Suite) -> SuiteData:
        """Task data that the runners of all checkpoints share, given to each as `data`."""
        return SuiteData(suite)

    @property
    def keys(self) -> list[str]:
        """The keys of the jobs."""
        return list(self.jobs)

    def n_questions(self, key: str) -> int:
        """Number of questions of job `key`."""
        return self.book.n_questions(self.jobs[key])

    def identity(self, key: str) -> str:
        """A short text that two askings share only when engine, task, data and settings are the same."""
        job, suite = self.jobs[key], self.suite
        task = {name: value for name, value in vars(job.task).items() if name not in ("data_path", "num_fewshot")}
        settings = (self.max_seq_len, self.precision, suite.subset_batches, suite.batch_size)
        data = self.book.file(job.task).sha256
        fingerprint = self.eval_model.tokenizer.fingerprint
        return identity_of(self.engine_name, task, job.n_shots, job.category, data, fingerprint, settings)

    def run(self, key: str, progress: CountDone) -> list[Record]:
        """Score job `key`; every rank must call this and gets the same records."""
        raise NotImplementedError

    def records(
        self, job: EvalJob, metrics: Mapping[str, Metric], *, truncated: int | None, seconds: float
    ) -> list[Record]:
        """One record for each metric of a job."""
        shared: dict[str, Any] = {
            "key": job.key,
            "label": job.task.label,
            "shots": job.n_shots,
            "category": job.category,
            "chance": job.task.random_baseline,
            "truncated": truncated,
            "seconds": round(seconds, 3),
            "data_sha256": self.book.file(job.task).sha256,
            "identity": self.identity(job.key),
        }
        return [
            Record(metric=name, value=m.value, stderr=m.stderr, questions=m.n_questions, **shared)
            for name, m in metrics.items()
        ]


class NativeRunner(Runner):
    """Jobs scored by the native engine."""

    engine_name = "native"

    def __init__(self, *args: Any, batch_tokens: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.engine = IclEngine(
            self.eval_model.model,
            self.eval_model.tokenizer,
            max_seq_len=self.max_seq_len,
            world=self.world,
            precision=self.precision,
            batch_tokens=batch_tokens,
        )

    def run(self, key: str, progress: CountDone) -> list[Record]:
        """Score job `key`."""
        began = time.perf_counter()
        result = self.engine.ask(self.data.prepared(self.jobs[key], self.engine), progress)
        seconds = time.perf_counter() - began
        return self.records(result.job, result.metrics, truncated=result.n_truncated, seconds=seconds)
