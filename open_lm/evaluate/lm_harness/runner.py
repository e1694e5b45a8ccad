"""lm-evaluation-harness engine for the evaluation command: its tasks by name in, records out."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.evaluate.eval_model import EvalModel
from open_lm.evaluate.records import Record, identity_of

SHOWN = ("alias", "name", "sample_len", "samples")


def require_harness() -> None:
    """Raise when the harness is not installed.

    Raises:
        ConfigError: with the line that installs it.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:  # a folder of that name, such as eval/lm_eval, is no installation
        raise ConfigError("lm-eval is not installed: `pip install lm_eval==0.4.13`.")


class HarnessRunner:
    """The tasks of --tasks for one checkpoint; those in --task-path are read from there."""

    def __init__(
        self,
        eval_model: EvalModel,
        tasks: tuple[str, ...],
        task_path: str | None,
        limit: int | None,
        world: World,
        max_seq_len: int,
        precision: str,
        batch_tokens: int | None = None,
    ):
        require_harness()
        if world.size > 1:
            raise ConfigError("--engine lm-eval runs on one rank: start it without torchrun.")
        from lm_eval.tasks import TaskManager

        from open_lm.evaluate.lm_harness.adapter import OpenLMHarness

        self._limit, self._precision = limit, precision
        self._manager = TaskManager(include_path=task_path, include_defaults=task_path is None)
        known = set(self._manager.all_tasks)
        if unknown := [name for name in tasks if name not in known]:
            hint = f"in {task_path}" if task_path else "of lm-eval"
            raise ConfigError(f"--tasks {unknown[0]}: no task {hint}.")
        self.keys = list(tasks)
        self._model = OpenLMHarness(
            eval_model=eval_model, max_seq_len=max_seq_len, precision=precision, batch_tokens=batch_tokens
        )
        self._fixed = (eval_model.tokenizer.fingerprint, max_seq_len, precision, limit, task_path)

    def n_questions(self, key: str) -> int:
        """Tasks are counted, not questions: the harness reads its data only when it runs."""
        return 1

    def identity(self, key: str) -> str:
        """What decides the scores of task `key` beside the weights."""
        return identity_of("lm-eval", key, self._fixed)

    def run(self, key: str, progress: Callable[[int], None]) -> list[Record]:
        """Score task `key`."""
        from lm_eval.evaluator import simple_evaluate

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        began = time.perf_counter()
        self._model.truncated_contexts.clear()
        results: Any = simple_evaluate(
            self._model,
            tasks=[key],
            task_manager=self._manager,
            limit=self._limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
        progress(1)
        seconds = time.perf_counter() - began
        return [
            record
            for name, metrics in results["results"].items()
            for record in self._records(key, name, metrics, results, seconds)
        ]

    def _records(self, key: str, name: str, metrics: dict, results: Any, seconds: float) -> list[Record]:
        n_questions = results["n-samples"].get(name, {}).get("effective", 0)
        shared: dict[str, Any] = {
            "key": name,  # a group's row and those of its tasks each stand for themselves
            "label": name,
            "shots": int(results.get("n-shot", {}).get(name, 0) or 0),
            "category": None,
            "chance": None,
            "questions": n_questions,
            "truncated": len(self._model.truncated_contexts),
            "seconds": round(seconds, 3),
            "data_sha256": "",
            "identity": self.identity(key),
        }
        found = []
        for metric, value in metrics.items():
            plain = metric.split(",")[0]
            if plain in SHOWN or plain.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(metric.replace(plain, f"{plain}_stderr", 1))
            error = float(error) if isinstance(error, int | float) else None
            found.append(Record(metric=plain, value=float(value), stderr=error, **shared))
        return found
