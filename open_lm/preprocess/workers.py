"""Local executor of preprocessing tasks: processes that report progress and die with their parent."""

from __future__ import annotations

import ctypes
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import connection
from typing import Any, NamedTuple, Protocol, cast

from open_lm.errors import DataError
from open_lm.progress import Progress, progress

WorkerTask = Callable[[], Iterator[int]]
"""A picklable piece of work that yields its progress in bytes."""


class RunTasks(Protocol):
    """Runner of tasks: every one to its end, on at most `n_workers` workers at a time; the first error is raised."""

    def __call__(self, tasks: Sequence[WorkerTask], n_workers: int, /, *, label: str, total_bytes: int) -> None: ...


TRIES = 3
_BEGUN, _ENDED = 1, 2
_progress: Any = None
_began: Any = None
log = logging.getLogger(__name__)


def run_tasks(tasks: Sequence[WorkerTask], n_workers: int, *, label: str, total_bytes: int) -> None:
    """Run all tasks on `n_workers` processes (1: in this one), with a progress bar when it takes more than 5 s.

    The first error of a task ends the others and is raised. A task whose worker is killed is tried again, alone; after
    `TRIES` times it is set aside, and named when the others are done.

    Raises:
        DataError: tasks were set aside.
    """
    bar = progress(total=total_bytes, unit="B", label=label)
    with bar:
        if n_workers <= 1 or len(tasks) <= 1:
            for task in tasks:
                for n_bytes in task():
                    bar.update(n_bytes)
            return
        _run_in_processes(tasks, n_workers, bar, label)


def _run_in_processes(tasks: Sequence[WorkerTask], n_workers: int, bar: Progress, label: str) -> None:
    left, poisoned, unexplained = list(tasks), list[WorkerTask](), 0
    while left:
        unfinished, suspects = _in_a_pool(left, n_workers, bar)
        unexplained = 0 if suspects else unexplained + 1
        if unfinished and unexplained == TRIES:
            raise SetAside(label, [left[k] for k in unfinished], len(tasks))
        for task in [left[k] for k in suspects]:  # one of them ended its worker, and with it the pool
            log.warning("%s: a worker process was killed; trying %s alone.", label, named(task))
            if any(not _in_a_pool([task], 1, bar).unfinished for _ in range(TRIES - 1)):
                continue
            log.error("%s: set aside: %s", label, named(task))
            poisoned.append(task)
        left = [left[k] for k in unfinished if k not in suspects]
    if poisoned:
        raise SetAside(label, poisoned, len(tasks))


class SetAside(DataError):
    """Tasks that killed their worker again and again; all others are done."""

    def __init__(self, label: str, tasks: Sequence[WorkerTask], n_tasks: int):
        self.tasks = tasks
        super().__init__(
            f"{label}: {len(tasks)} of {n_tasks} tasks were set aside, their worker process was killed {TRIES} times, "
            f"probably out of memory: {'; '.join(map(named, tasks[:5]))}. The others are done. "
            "Go on with --resume, and fewer --num-workers or a smaller --max-document-bytes."
        )


def named(task: WorkerTask) -> str:
    """A task as a person reads it."""
    call = cast("partial[Any]", task)
    function = getattr(call, "func", call)
    return f"{getattr(function, '__name__', function)}{tuple(getattr(call, 'args', ())[-1:])}"


class UnfinishedTasks(NamedTuple):
    """Numbers of tasks that a pool left when it broke: those not done, and those of them that may have broken it."""

    unfinished: list[int]
    running: list[int]


def _in_a_pool(tasks: Sequence[WorkerTask], n_workers: int, bar: Progress) -> UnfinishedTasks:
    """Run tasks in worker processes until all are done, or one of the processes is killed."""
    context = multiprocessing.get_context("forkserver")  # a fork of this process would copy its threads' locks
    progress, began = context.Value("q", 0), context.Array("b", len(tasks))
    count = min(n_workers, len(tasks))
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start, initargs=(progress, began, {**os.environ})
    )
    before, done = bar.n, set[int]()
    try:
        waiting = iter(enumerate(tasks))
        pending = {pool.submit(_run, *item): item[0] for item in itertools.islice(waiting, 4 * n_workers)}
        while pending:
            finished, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(before + progress.value - bar.n)
            for future in finished:
                future.result()
                done.add(pending.pop(future))
            pending |= {pool.submit(_run, *item): item[0] for item in itertools.islice(waiting, len(finished))}
    except BrokenProcessPool:
        left = [k for k in range(len(tasks)) if k not in done]
        return UnfinishedTasks(left, [k for k in left if began[k] == _BEGUN])
    finally:
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            if sys.exc_info()[0] is not None:
                process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
    return UnfinishedTasks([], [])


def _start(progress: Any, began: Any, environment: dict[str, str]) -> None:
    """In a new worker: the current environment, one thread each, and no life after the parent's."""
    global _progress, _began
    _progress, _began = progress, began
    os.environ.clear()
    os.environ.update(environment)  # what forks workers has that of its own beginning
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the end of the process that forked this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"


def _end_with_parent() -> None:
    """The process that began the job holds the other end of this pipe; the one that forks workers lives as they do."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def _run(number: int, task: WorkerTask) -> None:
    _began[number] = _BEGUN
    for n_bytes in task():
        with _progress.get_lock():
            _progress.value += n_bytes
    _began[number] = _ENDED
