"""How the native engine serves the evaluation command: tasks by key, records out."""

from __future__ import annotations

from collections.abc import Callable

from open_lm.distributed import World
from open_lm.evaluate.icl.engine import IclEngine, Job, JobResult
from open_lm.evaluate.icl.records import Record, identity_of
from open_lm.evaluate.icl.subject import Subject
from open_lm.evaluate.icl.suite import Suite


class NativeRunner:
    """The jobs of a suite for one checkpoint, in order."""

    def __init__(
        self, subject: Subject, suite: Suite, world: World, max_seq_len: int, precision: str, batch_tokens: int | None
    ):
        self.engine = IclEngine(
            subject.model,
            subject.tokenizer,
            max_seq_len=max_seq_len,
            world=world,
            precision=precision,
            batch_tokens=batch_tokens,
            subset_batches=suite.subset_batches,
            batch_size=suite.batch_size,
        )
        self._fixed = (subject.tokenizer.fingerprint, max_seq_len, precision, suite.subset_batches, suite.batch_size)
        self._jobs = {job.key: job for job in self.engine.jobs(suite.tasks)}

    @property
    def keys(self) -> list[str]:
        """What there is to run."""
        return list(self._jobs)

    def n_questions(self, key: str) -> int:
        """How many questions job `key` asks."""
        return self.engine.n_questions(self._jobs[key])

    def identity(self, key: str) -> str:
        """What decides the scores of job `key` beside the weights."""
        return job_identity("native", self._jobs[key], self.engine.data_sha256(self._jobs[key]), self._fixed)

    def run(self, key: str, progress: Callable[[int], None]) -> list[Record]:
        """Score job `key`; every rank must call this and gets the same records."""
        return records_of(self.engine.run(self._jobs[key], progress), self.identity(key))


def job_identity(engine: str, job: Job, data_sha256: str, fixed: tuple) -> str:
    """A short text that two askings share only when engine, task, data and settings are the same."""
    task = {name: value for name, value in vars(job.task).items() if name not in ("data_path", "num_fewshot")}
    return identity_of(engine, task, job.n_shots, job.category, data_sha256, fixed)


def records_of(result: JobResult, identity: str) -> list[Record]:
    """One record for each metric of a job."""
    job = result.job
    return [
        Record(
            key=job.key,
            label=job.task.label,
            shots=job.n_shots,
            category=job.category,
            metric=name,
            value=metric.value,
            stderr=metric.stderr,
            chance=job.task.random_baseline,
            questions=metric.n_questions,
            truncated=result.n_truncated,
            seconds=round(result.seconds, 3),
            data_sha256=result.data.sha256,
            identity=identity,
        )
        for name, metric in result.metrics.items()
    ]
