"""LLM Foundry engine for the evaluation command: jobs by key in, records out."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from open_lm.evaluate.engine.metrics import Metric, mean_of
from open_lm.evaluate.engine.runner import Runner
from open_lm.evaluate.foundry.imports import require_llm_foundry
from open_lm.evaluate.records import Record
from open_lm.evaluate.tasks.jobs import EvalJob
from open_lm.evaluate.tasks.kinds import type_of
from open_lm.evaluate.tasks.task import EvalTask
from open_lm.progress import CountDone

COMPOSER_PRECISION = {"fp32": "fp32", "amp_bf16": "amp_bf16", "fp16": "amp_fp16", "bf16": "fp32"}
TASK_KEYS = ("label", "icl_task_type", "prompt_string", "example_delimiter", "continuation_delimiter", "prelimiter",
             "has_categories", "strip_dataset", "fewshot_random_seed")  # fmt: skip


class FoundryRunner(Runner):
    """Jobs scored by LLM Foundry's datasets and metrics and Composer's Trainer."""

    engine_name = "llm-foundry"

    def __init__(self, *args: Any, batch_tokens: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        require_llm_foundry()
        import datasets
        from composer.models.huggingface import HuggingFaceModel
        from composer.trainer import Trainer

        from open_lm.evaluate.foundry.transformers_model import transformers_tokenizer, wrapped

        self._tokenizer = transformers_tokenizer(self.eval_model.tokenizer)
        model = HuggingFaceModel(
            wrapped(self.eval_model.model), self._tokenizer, metrics=[], eval_metrics=all_metrics(), shift_labels=True
        )
        with _quiet():
            self._trainer = Trainer(
                model=model,
                device="gpu" if self.world.device.type == "cuda" else "cpu",
                precision=COMPOSER_PRECISION[self.precision],
                seed=self.suite.seed,
                progress_bar=False,
                log_to_console=False,
                load_weights_only=True,
            )
        self._folder = tempfile.TemporaryDirectory(prefix="open_lm_eval_")
        datasets.disable_progress_bars()
        datasets.config.HF_DATASETS_CACHE = f"{self._folder.name}/cache"  # nothing is left in the user's home
        self._destination = self.world.broadcast(self._folder.name)
        self._built: tuple[Any, dict[str, Any]] = (None, {})

    def run(self, key: str, progress: CountDone) -> list[Record]:
        """Score job `key`."""
        began = time.perf_counter()
        job = self.jobs[key]
        with _quiet():
            evaluator = self._evaluator(job)
            self._trainer.eval(eval_dataloader=[evaluator], subset_num_batches=-1)
        computed = self._trainer.state.eval_metrics[evaluator.label]
        metrics = {name: _metric(computed[name], self.n_questions(key)) for name in job.task.metric_names}
        progress(self.n_questions(key))
        return self.records(job, metrics, truncated=None, seconds=time.perf_counter() - began)

    def _evaluator(self, job: EvalJob) -> Any:
        """LLM Foundry's evaluator of `job`; those of all categories are built together and kept."""
        from llmfoundry.utils.builders import build_icl_evaluators

        asked = (job.task.label, job.n_shots)
        if self._built[0] != asked:
            evaluators, _ = build_icl_evaluators(
                [task_entry(job.task, job.n_shots)],
                self._tokenizer,
                self.max_seq_len,
                self.suite.batch_size,
                destination_dir=self._destination,
                icl_subset_num_batches=self.suite.subset_batches,
            )
            self._built = (asked, {evaluator.label: evaluator for evaluator in evaluators})
        return self._built[1][job.key]


def task_entry(task: EvalTask, n_shots: int) -> dict[str, Any]:
    """`task` as LLM Foundry's `icl_tasks` want it: only keys its constructors know."""
    entry: dict[str, Any] = {key: getattr(task, key) for key in TASK_KEYS}
    entry |= {"dataset_uri": task.data_path or task.dataset_uri, "num_fewshot": [n_shots]}
    entry["metric_names"] = list(task.metric_names)
    for key in type_of(task).foundry_keys:
        value = getattr(task, key)
        entry[key] = list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
    for key in ("max_seq_len", "batch_size"):
        if getattr(task, key) is not None:
            entry[key] = getattr(task, key)
    return entry


def all_metrics() -> list[Any]:
    """LLM Foundry's metrics of all task types."""
    from llmfoundry.eval.metrics import nlp

    return [
        nlp.InContextLearningLMAccuracy(),
        nlp.InContextLearningMultipleChoiceAccuracy(),
        nlp.InContextLearningGenerationExactMatchAccuracy(),
        nlp.InContextLearningLMExpectedCalibrationError(),
        nlp.InContextLearningMCExpectedCalibrationError(),
    ]


def _metric(computed: Any, n_questions: int) -> Metric:
    """One of LLM Foundry's metrics; its standard error follows from its counts."""
    value = computed.compute().item()
    if not hasattr(computed, "correct"):
        return Metric(value, None, n_questions)
    n_correct = round(value * n_questions)
    return Metric(value, mean_of([True] * n_correct + [False] * (n_questions - n_correct)).stderr, n_questions)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that Composer's imports and start bring on current torch."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
