"""How a model is scored on tasks: every question once over all ranks, the same numbers at any world size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from open_lm.data.tokenizers import Tokenizer
from open_lm.distributed import World
from open_lm.evaluate.icl.batching import ScoringBatch, plan_batches
from open_lm.evaluate.icl.encode import PromptEncoder, Question, encode_questions, row_names
from open_lm.evaluate.icl.metrics import Metric, measure
from open_lm.evaluate.icl.prompts import prompts
from open_lm.evaluate.icl.rows import TaskFile, read_rows
from open_lm.evaluate.icl.scoring import Score, Scorer
from open_lm.evaluate.icl.task import Task
from open_lm.precision import Precision

CPU_BATCH_TOKENS = 4096
GPU_BATCH_TOKENS = 65536

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """One task asked in one way: with a number of examples before each question, about one category or all."""

    task: Task
    n_shots: int
    category: str | None = None

    @property
    def key(self) -> str:
        """`label/3-shot` or `label/3-shot/category`, as in LLM Foundry's logs."""
        return "/".join([self.task.label, f"{self.n_shots}-shot", *([self.category] if self.category else [])])


@dataclass(frozen=True)
class JobResult:
    """The metrics of one job, and what they were measured on."""

    job: Job
    metrics: dict[str, Metric]
    n_questions: int
    n_truncated: int
    seconds: float
    data: TaskFile


class IclEngine:
    """Scores a model on jobs. All ranks hold the same model (or a sharded one) and must call `run` alike.

    `batch_tokens` bounds the tokens of one forward pass, padding included.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        world: World | None = None,
        precision: str = "fp32",
        batch_tokens: int | None = None,
        subset_batches: int | None = None,
        batch_size: int = 8,
    ):
        self.model, self.max_seq_len = model, max_seq_len
        self.world = world or World(device=next(model.parameters()).device)
        self.encoder = PromptEncoder(tokenizer)
        self.scorer = Scorer(model, self.world.device, Precision(precision, self.world.device.type))
        on_gpu = self.world.device.type == "cuda"
        self.batch_tokens = batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)
        self.subset_batches, self.batch_size = subset_batches, batch_size
        self._files: dict[str, TaskFile] = {}

    def jobs(self, tasks: Iterable[Task]) -> list[Job]:
        """Everything that `tasks` ask for, in order."""
        return [
            Job(task, n_shots, category)
            for task in tasks
            for n_shots in task.num_fewshot
            for category in self._categories(task)
        ]

    def n_questions(self, job: Job) -> int:
        """How many questions `job` asks."""
        n_rows = len(self._rows(job))
        return n_rows if (limit := self._limit(job)) is None else min(n_rows, limit)

    def data_sha256(self, job: Job) -> str:
        """The hash of the file that `job` asks from."""
        return self._file(job.task).sha256

    def run(self, job: Job, progress: Progress = lambda n_questions: None) -> JobResult:
        """Score `job`; `progress` is told of questions as they are done on this rank."""
        began = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        try:
            questions = self._questions(job)
            scores = self._score(questions, progress)
        finally:
            self.model.train(was_training)
        metrics = measure(job.task.metric_names, questions, scores)
        truncated = sum(question.truncated for question in questions)
        seconds = time.perf_counter() - began
        return JobResult(job, metrics, len(questions), truncated, seconds, self._file(job.task))

    def _file(self, task: Task) -> TaskFile:
        if task.label not in self._files:
            self._files[task.label] = read_rows(task)
        return self._files[task.label]

    def _categories(self, task: Task) -> Sequence[str | None]:
        if not task.has_categories:
            return [None]
        return sorted({row["category"] for row in self._file(task).rows})

    def _rows(self, job: Job) -> Sequence[dict[str, Any]]:
        rows = self._file(job.task).rows
        return rows if job.category is None else [row for row in rows if row["category"] == job.category]

    def _limit(self, job: Job) -> int | None:
        """How many questions icl_subset_num_batches leaves, counted as LLM Foundry counts them."""
        if self.subset_batches is None or job.category is not None:
            return None
        size = job.task.batch_size or self.batch_size
        if job.task.choices_key:
            n_choices = len(self._rows(job)[0][job.task.choices_key])
            size = max(n_choices, size) // n_choices
        return self.subset_batches * size

    def _questions(self, job: Job) -> list[Question]:
        rows, n_questions = self._rows(job), self.n_questions(job)
        asked = prompts(job.task, rows, job.n_shots, prefix_space=self.encoder.prefix_space)
        chosen = [prompt for _, prompt in zip(range(n_questions), asked, strict=False)]
        names = row_names(self._file(job.task).path, rows)[:n_questions]
        limit = job.task.max_seq_len or self.max_seq_len
        return encode_questions(chosen, self.encoder, limit, names)

    def _score(self, questions: Sequence[Question], progress: Progress) -> dict[tuple[int, int], Score]:
        batches = plan_batches(questions, self.batch_tokens, share_contexts=self.scorer.shares_contexts)
        mine = batches[self.world.rank :: self.world.size]
        scores: dict[tuple[int, int], Score] = {}
        for batch in mine:
            scores.update(self.scorer.score(batch))
            progress(batch.n_questions)
        self.scorer.idle(_most_forwards(batches, self.world.size) - sum(batch.n_forwards for batch in mine))
        return {name: score for share in self.world.gather(scores) for name, score in share.items()}


def _most_forwards(batches: Sequence[ScoringBatch], n_ranks: int) -> int:
    """The forward passes of the rank that has most."""
    return max(sum(batch.n_forwards for batch in batches[rank::n_ranks]) for rank in range(n_ranks))


@torch.no_grad()
def evaluate_icl(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Iterable[Task],
    *,
    world: World,
    max_seq_len: int,
    precision: str = "fp32",
) -> dict[str, float]:
    """Every metric of every job as `label/3-shot[/category]/metric`, the same on every rank.

    Each question is scored once over all ranks; `model` may be wrapped for them (DDP, FSDP). Every rank must call this.
    """
    engine = IclEngine(model, tokenizer, max_seq_len=max_seq_len, world=world, precision=precision)
    results = (engine.run(job) for job in engine.jobs(tasks))
    return {f"{r.job.key}/{name}": metric.value for r in results for name, metric in r.metrics.items()}
