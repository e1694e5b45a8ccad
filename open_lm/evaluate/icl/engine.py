"""How a model is scored on tasks: every question once over all ranks, the same numbers at any world size."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from open_lm.data.tokenizers import Tokenizer
from open_lm.distributed import World
from open_lm.evaluate.icl.batching import ScoringBatch, plan_batches
from open_lm.evaluate.icl.encode import PromptEncoder, Question, encode_questions, row_names
from open_lm.evaluate.icl.generation import (
    Writer,
    encode_prompts,
    is_right,
    longest_answer,
    plan_generation,
    require_greedy,
)
from open_lm.evaluate.icl.jobs import Job, JobBook
from open_lm.evaluate.icl.metrics import Metric, mean_of, measure
from open_lm.evaluate.icl.prompts import Prompt, prompts
from open_lm.evaluate.icl.scoring import Score, Scorer
from open_lm.evaluate.icl.task import EXACT_MATCH, Task
from open_lm.precision import Precision

CPU_BATCH_TOKENS = 4096
GPU_BATCH_TOKENS = 65536
BATCHES_PER_RANK = 8

Progress = Callable[[int], None]


@dataclass(frozen=True)
class JobResult:
    """The metrics of one job, and what they were measured on."""

    job: Job
    metrics: dict[str, Metric]
    n_truncated: int
    seconds: float


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
    ):
        self.model, self.max_seq_len = model, max_seq_len
        self.world = world or World(device=next(model.parameters()).device)
        self.encoder = PromptEncoder(tokenizer)
        self.scorer = Scorer(model, self.world.device, Precision(precision, self.world.device.type))
        on_gpu = self.world.device.type == "cuda"
        self.batch_tokens = batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)

    def run(self, job: Job, book: JobBook, progress: Progress = lambda n_questions: None) -> JobResult:
        """Score `job`; `progress` is told of questions as they are done on this rank."""
        began = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        measured = self._generated if job.task.icl_task_type == "generation_task_with_answers" else self._scored
        try:
            metrics, truncated = measured(job, book, progress)
        finally:
            self.model.train(was_training)
        return JobResult(job, metrics, truncated, time.perf_counter() - began)

    def _scored(self, job: Job, book: JobBook, progress: Progress) -> tuple[dict[str, Metric], int]:
        """Metrics of questions whose possible continuations are scored, and how many prompts were cut."""
        rows = book.rows(job)
        names = row_names(book.file(job.task).path, rows)
        chosen = self._prompts(job, book)
        questions = encode_questions(chosen, self.encoder, self._max_seq_len(job), names[: len(chosen)])
        scores = self._score(questions, progress)
        return measure(job.task.metric_names, questions, scores), sum(question.truncated for question in questions)

    def _generated(self, job: Job, book: JobBook, progress: Progress) -> tuple[dict[str, Metric], int]:
        """The metric of questions that the model answers in writing, and how many prompts were cut."""
        require_greedy(job.task)
        rows = book.rows(job)
        n_new = longest_answer(job.task, rows, self.encoder)
        path = book.file(job.task).path
        asked = encode_prompts(self._prompts(job, book), self.encoder, self._max_seq_len(job), n_new, path)
        batches = plan_generation(asked, n_new, self.batch_tokens)
        writer = Writer(self.scorer, self.encoder, self.world)
        texts = writer.write(batches, n_new, job.task.early_stopping_criteria, progress)
        right = [is_right(texts[prompt.number], rows[prompt.number]["aliases"], job.task) for prompt in asked]
        return {EXACT_MATCH: mean_of(right)}, sum(prompt.truncated for prompt in asked)

    def _prompts(self, job: Job, book: JobBook) -> list[Prompt]:
        """The questions `job` asks, as text."""
        asked = prompts(job.task, book.rows(job), job.n_shots, prefix_space=self.encoder.prefix_space)
        return list(itertools.islice(asked, book.n_questions(job)))

    def _budget_tokens(self, questions: Sequence[Question]) -> int:
        """Tokens in a batch: with several ranks no more than leaves each some batches, so that they end together."""
        if self.world.size == 1:
            return self.batch_tokens
        total = sum(len(c.context) + len(c.continuation) for question in questions for c in question.choices)
        return min(self.batch_tokens, max(1, total // (BATCHES_PER_RANK * self.world.size)))

    def _max_seq_len(self, job: Job) -> int:
        return job.task.max_seq_len or self.max_seq_len

    def _score(self, questions: Sequence[Question], progress: Progress) -> dict[tuple[int, int], Score]:
        batches = plan_batches(questions, self._budget_tokens(questions), share_contexts=self.scorer.shares_contexts)
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
    book = JobBook(tasks)
    results = (engine.run(job, book) for job in book.jobs)
    return {f"{r.job.key}/{name}": metric.value for r in results for name, metric in r.metrics.items()}
