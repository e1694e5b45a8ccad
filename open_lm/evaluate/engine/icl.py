"""In-context learning engine: every question scored once over all ranks, with the same numbers at any world size."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from open_lm.data.tokenizer import Tokenizer
from open_lm.distributed import World
from open_lm.evaluate.engine.encode import PromptEncoder, Question, encode_questions
from open_lm.evaluate.engine.generation import (
    AnswerWriter,
    EncodedPrompt,
    encode_prompts,
    is_right,
    longest_answer,
    plan_generation,
)
from open_lm.evaluate.engine.metrics import Metric, mean_of, measure
from open_lm.evaluate.engine.ranks import score_questions
from open_lm.evaluate.engine.sampling import Sampling, sampling_of
from open_lm.evaluate.engine.scoring import Scorer
from open_lm.evaluate.tasks.jobs import EvalJob, JobBook
from open_lm.evaluate.tasks.kinds import TaskPrompt, type_of
from open_lm.evaluate.tasks.prompts import prompts
from open_lm.evaluate.tasks.task import EXACT_MATCH, EvalTask
from open_lm.precision import Precision
from open_lm.progress import CountDone

CPU_BATCH_TOKENS = 4096
GPU_BATCH_TOKENS = 65536


@dataclass(frozen=True)
class JobResult:
    """The metrics of one job, and what they were measured on."""

    job: EvalJob
    metrics: dict[str, Metric]
    n_truncated: int
    seconds: float


@dataclass(frozen=True)
class LoglikelihoodRequest:
    """A job whose possible continuations are scored, as ids."""

    job: EvalJob
    questions: list[Question]

    @property
    def n_truncated(self) -> int:
        """Questions that lost the start of a context."""
        return sum(question.truncated for question in self.questions)

    @property
    def n_tokens(self) -> int:
        """Ids that are held: a context that choices share is held once."""
        contexts = {id(choice.context): len(choice.context) for q in self.questions for choice in q.choices}
        return sum(contexts.values()) + sum(len(choice.continuation) for q in self.questions for choice in q.choices)


@dataclass(frozen=True)
class GenerationRequest:
    """A job whose answers the model writes itself: `n_new` tokens at most, right when they begin with an alias."""

    job: EvalJob
    asked: list[EncodedPrompt]
    aliases: list[Sequence[str]]
    n_new: int
    sampling: Sampling

    @property
    def n_truncated(self) -> int:
        """Prompts that lost their start."""
        return sum(prompt.truncated for prompt in self.asked)

    @property
    def n_tokens(self) -> int:
        """Ids that are held."""
        return sum(len(prompt.ids) for prompt in self.asked)


class IclEngine:
    """Scores a model on jobs. All ranks hold the same model (or a sharded one) and must call `ask` and `run` alike.

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

    def run(self, job: EvalJob, book: JobBook, progress: CountDone = lambda n_questions: None) -> JobResult:
        """Score `job`; `progress` is told of questions as they are done on this rank."""
        return self.ask(self.prepare(job, book), progress)

    def prepare(self, job: EvalJob, book: JobBook) -> LoglikelihoodRequest | GenerationRequest:
        """The questions of `job` as ids, which may be asked any number of times.

        Raises:
            DataError: a row does not fit the context, or holds nothing to predict (file and row are named).
            ConfigError: the task asks for what this engine does not have.
        """
        rows, names = book.rows(job), book.names(job)
        chosen = self._prompts(job, book)
        max_seq_len = job.task.max_seq_len or self.max_seq_len
        if not type_of(job.task).generates:
            return LoglikelihoodRequest(job, encode_questions(chosen, self.encoder, max_seq_len, names[: len(chosen)]))
        sampling = sampling_of(job.task)
        longest = longest_answer(job.task, rows, self.encoder)
        asked = encode_prompts(chosen, self.encoder, max_seq_len, longest, names)
        return GenerationRequest(
            job, asked, [row["aliases"] for row in rows], sampling.max_new_tokens or longest, sampling
        )

    def ask(
        self, prepared: LoglikelihoodRequest | GenerationRequest, progress: CountDone = lambda n_questions: None
    ) -> JobResult:
        """Score what `prepare` gave, with the current weights; the model is in eval mode meanwhile."""
        began = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        try:
            if isinstance(prepared, LoglikelihoodRequest):
                metrics = self._scored(prepared, progress)
            else:
                metrics = self._written(prepared, progress)
        finally:
            self.model.train(was_training)
        return JobResult(prepared.job, metrics, prepared.n_truncated, time.perf_counter() - began)

    def _scored(self, prepared: LoglikelihoodRequest, progress: CountDone) -> dict[str, Metric]:
        scores = score_questions(self.scorer, self.world, prepared.questions, self.batch_tokens, progress)
        return measure(prepared.job.task.metric_names, prepared.questions, scores)

    def _written(self, prepared: GenerationRequest, progress: CountDone) -> dict[str, Metric]:
        task = prepared.job.task
        batches = plan_generation(prepared.asked, prepared.n_new, self.batch_tokens)
        writer = AnswerWriter(self.scorer, self.encoder, self.world, prepared.sampling)
        texts = writer.write(batches, prepared.n_new, task.early_stopping_criteria, progress)
        right = [is_right(texts[prompt.number], prepared.aliases[prompt.number], task) for prompt in prepared.asked]
        return {EXACT_MATCH: mean_of(right)}

    def _prompts(self, job: EvalJob, book: JobBook) -> list[TaskPrompt]:
        """The questions `job` asks, as text."""
        asked = prompts(job.task, book.rows(job), job.n_shots, prefix_space=self.encoder.prefix_space)
        return list(itertools.islice(asked, book.n_questions(job)))


def evaluate_icl(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Iterable[EvalTask],
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
