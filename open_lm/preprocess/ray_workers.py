"""Ray executor of preprocessing tasks; Ray retries a task elsewhere when its worker or node dies.

Nothing but small records passes through Ray: tasks read and write files that every node can reach.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from open_lm.errors import ConfigError, DataError, OpenLMError
from open_lm.preprocess.workers import Task
from open_lm.progress import progress

_ROOT = str(Path(__file__).resolve().parents[2])
_TIMES_STARTED_AGAIN = 5
_SHARED_BYTES = 10_000


def connect(address: str | None, *, n_cores: int | None, dashboard_host: str) -> Any:
    """The module `ray`, connected to the cluster at `address` ($RAY_ADDRESS when None) or to one started here.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("tokenize_shuffle.py needs Ray, which is not installed: pip install ray==2.60.0") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    here: dict[str, Any] = {"num_cpus": n_cores, "dashboard_host": dashboard_host, "object_store_memory": 100 << 20}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **({} if address else here))
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--ray_address {address}: no cluster to work on ({reason}).") from error
    return ray


class RayTasks:
    """Runs tasks on the cluster of `ray`, one core each, spread over the nodes."""

    def __init__(self, ray: Any):
        self._ray = ray

    def __call__(self, tasks: Sequence[Task], n_workers: int, /, *, label: str, total_bytes: int) -> None:
        """Run all tasks, at most `n_workers` at a time. The first error of a task ends the others and is raised.

        Raises:
            DataError: a task's worker was killed again and again.
        """
        start = self._starter()
        waiting: list[Task] = list(reversed(tasks))
        running: list[Any] = []
        bar = progress(total=total_bytes, unit="B", label=label)
        with bar:
            try:
                while waiting or running:
                    while waiting and len(running) < n_workers:
                        running.append(start(waiting.pop()))
                    done, running = self._ray.wait(running, num_returns=1)
                    for n_bytes in self._ray.get(done):
                        bar.update(n_bytes)
            except self._ray.exceptions.RayTaskError as error:
                self._cancel(running)
                if isinstance(error.cause, OpenLMError):
                    raise error.cause from None
                raise
            except self._ray.exceptions.RayError as error:
                self._cancel(running)
                raise DataError(
                    f"{label}: a task's worker died {_TIMES_STARTED_AGAIN + 1} times ({type(error).__name__}), most "
                    "likely for want of memory. Go on with --resume and a smaller --force_parallelism."
                ) from error

    def _starter(self) -> Any:
        """A function that gives one task to the cluster; arguments that several tasks have are sent once."""

        def run_pickled(root: str, *parts: bytes) -> int:  # nested, so that it travels by value to any node
            if root not in sys.path:
                sys.path.append(root)
            os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "false", "1"
            function, *arguments = (pickle.loads(part) for part in parts)
            return sum(function(*arguments))

        options = {"max_retries": _TIMES_STARTED_AGAIN, "scheduling_strategy": "SPREAD", "num_cpus": 1}
        remote, known = self._ray.remote(**options)(run_pickled), {}

        def start(task: Task) -> Any:
            call = cast("partial[Any]", task)
            for value in (call.func, *call.args):
                if id(value) not in known:
                    content = pickle.dumps(value)
                    known[id(value)] = self._ray.put(content) if len(content) > _SHARED_BYTES else content
            return remote.remote(_ROOT, *(known[id(value)] for value in (call.func, *call.args)))

        return start

    def _cancel(self, running: list[Any]) -> None:
        for reference in running:
            self._ray.cancel(reference, force=True)
