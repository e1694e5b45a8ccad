"""Local executor of preprocessing tasks: processes that report progress and die with their parent."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from open_lm.errors import DataError
from open_lm.progress import Progress, progress

WorkerTask = Callable[[], Iterator[int]]
"""A picklable piece of work that yields its progress in bytes."""


class RunTasks(Protocol):
    """Who runs tasks: every one to its end, on at most `n_workers` workers at a time; the first error is raised."""

    def __call__(self, tasks: Sequence[WorkerTask], n_workers: int, /, *, label: str, total_bytes: int) -> None: ...


_progress: Any = None


def run_tasks(tasks: Sequence[WorkerTask], n_workers: int, *, label: str, total_bytes: int) -> None:
    """Run all tasks on `n_workers` processes (1: in this one), with a progress bar when it takes more than 5 s.

    The first error of a task ends the others and is raised.

    Raises:
        DataError: a worker was killed, for example by the out-of-memory killer.
    """
    bar = progress(total=total_bytes, unit="B", label=label)
    with bar:
        if n_workers <= 1 or len(tasks) <= 1:
            for task in tasks:
                for n_bytes in task():
                    bar.update(n_bytes)
            return
        _run_in_processes(tasks, min(n_workers, len(tasks)), bar, label)


def _run_in_processes(tasks: Sequence[WorkerTask], n_workers: int, bar: Progress, label: str) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's threads in an unknown state
    progress = context.Value("q", 0)
    pool = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_start, initargs=(progress, os.getpid()))
    try:
        waiting = iter(tasks)
        pending = {pool.submit(_run, task) for task in itertools.islice(waiting, 4 * n_workers)}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(progress.value - bar.n)
            for future in done:
                future.result()
            pending |= {pool.submit(_run, task) for task in itertools.islice(waiting, len(done))}
    except BrokenProcessPool:
        raise DataError(
            f"{label}: a worker process was killed, probably out of memory. "
            "Start the same command again with --resume, with fewer --num-workers."
        ) from None
    finally:
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            if sys.exc_info()[0] is not None:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _start(progress: Any, parent: int) -> None:
    """In a new worker: one thread each, and no life after the parent's."""
    global _progress
    _progress = progress
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"


def _run(task: WorkerTask) -> None:
    for n_bytes in task():
        with _progress.get_lock():
            _progress.value += n_bytes
