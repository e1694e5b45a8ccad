"""lm-evaluation-harness engine for the evaluation command: its tasks by name in, records out."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from typing import Any

from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.evaluate.eval_model import EvalModel
from open_lm.evaluate.records import Record, identity_of
from open_lm.progress import CountDone

SHOWN = ("alias", "name", "sample_len", "samples")


def require_harness() -> None:
    """Raise when the harness is not installed.

    Raises:
        ConfigError: with the line that installs it.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:  # a folder of that name, such as eval/lm_eval, is no installation
        raise ConfigError("lm-eval is not installed: `pip install lm_eval==0.4.13`.")


class HarnessData:
    """The tasks of --tasks, those in --task-path read from there; each is loaded once, when it is first scored.

    Raises:
        ConfigError: the harness is not installed, or there is no such task.
    """

    def __init__(self, tasks: tuple[str, ...], task_path: str | None):
        require_harness()
        from lm_eval.tasks import TaskManager

        self.manager: Any = TaskManager(include_path=task_path, include_defaults=task_path is None)
        known = set(self.manager.all_tasks)
        if unknown := [name for name in tasks if name not in known]:
            hint = f"in {task_path}" if task_path else "of lm-eval"
            raise ConfigError(f"--tasks {unknown[0]}: no task {hint}.")
        self._load: Any = self.manager.load
        self._loaded: dict[str, Any] = {}
        self.manager.load = self._load_once

    def _load_once(self, names: list[str], **settings: Any) -> Any:
        """The manager's `load`, which the harness calls for every evaluation; tasks keep their data for the next."""
        at = json.dumps([names, settings], default=str)
        if at not in self._loaded:
            self._loaded[at] = self._load(names, **settings)
        return self._loaded[at]


class HarnessRunner:
    """The tasks of --tasks for one checkpoint. Every rank runs the harness, which knows of one: its requests are shared
    out below it."""

    @staticmethod
    def read(tasks: tuple[str, ...], task_path: str | None, limit: int | None) -> HarnessData:
        """Task data that the runners of all checkpoints share, given to each as `data`."""
        return HarnessData(tasks, task_path)

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
        data: HarnessData | None = None,
    ):
        self._data = data or HarnessData(tasks, task_path)
        from open_lm.evaluate.lm_harness.adapter import OpenLMHarness

        self._limit, self._precision = limit, precision
        self.keys = list(tasks)
        self._model = OpenLMHarness(
            eval_model=eval_model, max_seq_len=max_seq_len, precision=precision, batch_tokens=batch_tokens, world=world
        )
        self._fixed = (eval_model.tokenizer.fingerprint, max_seq_len, precision, limit, task_path)

    def n_questions(self, key: str) -> int:
        """Tasks are counted, not questions: the harness reads its data only when it runs."""
        return 1

    def identity(self, key: str) -> str:
        """A fingerprint of all that the scores of task `key` depend on beside the weights."""
        return identity_of("lm-eval", key, self._fixed)

    def run(self, key: str, progress: CountDone) -> list[Record]:
        """Score task `key`."""
        from lm_eval.evaluator import simple_evaluate

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else it forks for its error bars, and a fork that inherits a
        # handler of SIGTERM (a run that trains has one) may never end
        began = time.perf_counter()
        self._model.truncated_contexts.clear()
        with _as_first_rank():
            results: Any = simple_evaluate(
                self._model,
                tasks=[key],
                task_manager=self._data.manager,
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
            "part_of": next((g for g, parts in results.get("group_subtasks", {}).items() if name in parts), None),
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


@contextlib.contextmanager
def _as_first_rank() -> Iterator[None]:
    """The environment of local rank 0: the harness gives results to no other."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        os.environ.pop("LOCAL_RANK") if before is None else os.environ.update(LOCAL_RANK=before)
