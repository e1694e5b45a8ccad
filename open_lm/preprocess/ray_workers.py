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

from open_lm.errors import ConfigError, DataError, OpenLMError, StorageError
from open_lm.preprocess.workers import WorkerTask
from open_lm.progress import progress

_ROOT = str(Path(__file__).resolve().parents[2])
_TIMES_STARTED_AGAIN = 5
_SHARED_BYTES = 10_000
_IN_FLIGHT = 10_000

log = logging.getLogger(__name__)


def connect(
    address: str | None, *, n_cores: int | None, dashboard_host: str, runtime_env: dict[str, Any] | None = None
) -> Any:
    """The module `ray`, connected to the cluster at `address` ($RAY_ADDRESS when None) or to one started here.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("openlm prepare-ray needs Ray, which is not installed: pip install ray") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    here: dict[str, Any] = {"num_cpus": n_cores, "dashboard_host": dashboard_host, "object_store_memory": 100 << 20}
    try:
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, "runtime_env": runtime_env}
        ray.init(address=address, **common, **({} if address else here))
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--ray_address {address}: no cluster to work on ({reason}).") from error
    return ray


class RayTasks:
    """Runs tasks on the cluster of `ray`, one core each, spread over the nodes.

    With `follow` tasks wait in Ray's own queue: a node that joins in the middle is used, and an autoscaler sees the
    demand. `memory_bytes` is reserved for each.
    """

    def __init__(self, ray: Any, *, follow: bool = False, memory_bytes: int | None = None):
        self._ray, self._follow, self._memory_bytes = ray, follow, memory_bytes

    def __call__(self, tasks: Sequence[WorkerTask], n_workers: int, /, *, label: str, total_bytes: int) -> None:
        """Run all tasks, at most `n_workers` at a time unless the cluster is followed.

        The first error of a task ends the others and is raised; a StorageError is tried again first. A task whose
        worker is killed again and again is set aside, and named when the others are done.

        Raises:
            DataError: tasks were set aside.
        """
        start, at_once = self._starter(label), _IN_FLIGHT if self._follow else n_workers
        waiting: list[WorkerTask] = list(reversed(tasks))
        running: dict[Any, WorkerTask] = {}
        poisoned: list[str] = []
        with progress(total=total_bytes, unit="B", label=label) as bar:
            try:
                while waiting or running:
                    while waiting and len(running) < at_once:
                        task = waiting.pop()
                        running[start(task)] = task
                    done, _ = self._ray.wait(list(running), num_returns=1)
                    for reference in done:
                        task = running.pop(reference)
                        bar.update(self._result(reference, task, label, poisoned))
            except self._ray.exceptions.RayTaskError as error:
                self._cancel(list(running))
                if isinstance(error.cause, OpenLMError):
                    raise error.cause from None
                raise
        if poisoned:
            raise DataError(
                f"{label}: {len(poisoned)} of {len(tasks)} tasks were set aside, their workers died "
                f"{_TIMES_STARTED_AGAIN + 1} times, probably out of memory: {'; '.join(poisoned[:5])}. The others are "
                "done. Go on with --resume, and --ray_task_memory_gb or a smaller --force_parallelism."
            )

    def _result(self, reference: Any, task: WorkerTask, label: str, poisoned: list[str]) -> int:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            call = cast("partial[Any]", task)
            poisoned.append(f"{call.func.__name__}{call.args[-1:]} ({type(error).__name__})")
            log.error("%s: task set aside: %s", label, poisoned[-1])
            return 0

    def _starter(self, label: str) -> Any:
        """A function that gives one task to the cluster; arguments that several tasks have are sent once. The
        dashboard shows the tasks by `label` and function."""

        def run_pickled(root: str, *parts: bytes) -> int:  # nested, so that it travels by value to any node
            if root not in sys.path:
                sys.path.append(root)
            os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"] = "false", "1"
            function, *arguments = (pickle.loads(part) for part in parts)
            return sum(function(*arguments))

        options: dict[str, Any] = {
            "max_retries": _TIMES_STARTED_AGAIN,
            "retry_exceptions": [StorageError],
            "scheduling_strategy": "SPREAD",
            "num_cpus": 1,
        }
        if self._memory_bytes:
            options["memory"] = self._memory_bytes
        remote, known = self._ray.remote(**options)(run_pickled), {}

        def start(task: WorkerTask) -> Any:
            call = cast("partial[Any]", task)
            for value in (call.func, *call.args):
                if id(value) not in known:
                    content = pickle.dumps(value)
                    known[id(value)] = self._ray.put(content) if len(content) > _SHARED_BYTES else content
            name = f"{label}: {call.func.__name__}"
            return remote.options(name=name).remote(_ROOT, *(known[id(value)] for value in (call.func, *call.args)))

        return start

    def _cancel(self, running: list[Any]) -> None:
        for reference in running:
            self._ray.cancel(reference, force=True)
