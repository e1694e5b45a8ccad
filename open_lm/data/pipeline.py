"""The pipeline from planned steps to batches: webdataset stages in each worker; the main process joins their parts."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from open_lm import faults
from open_lm.data.rows import PROOF_BYTES, SampleRows
from open_lm.errors import DataError, OpenLMError

warnings.filterwarnings("ignore", "This DataLoader will create")  # how many workers is the user's choice

_HUNG_SECONDS = 900
TERM_GRACE_SECONDS = 30
"""Time that a worker outlives SIGTERM, so that the main process can finish its step and save."""
_PR_SET_PDEATHSIG = 1


class Request(NamedTuple):
    """The part of one step that one worker reads: the places `slots` of this rank's batch hold `positions`."""

    step: int
    worker: int
    slots: np.ndarray
    positions: np.ndarray


Fill = Callable[[np.ndarray], SampleRows]
"""From positions to their samples."""


@dataclass(frozen=True)
class StepSource:
    """The first stage: this worker's requests for steps `start` to `stop`, straight from the plan."""

    positions_of: Callable[[int], np.ndarray]
    reader_of: Callable[[np.ndarray, int], np.ndarray]
    start: int
    stop: int

    def __call__(self) -> Iterator[Request]:
        info = get_worker_info()
        worker, n_workers = (info.id, info.num_workers) if info else (0, 1)
        for step in range(self.start, self.stop):
            positions = self.positions_of(step)
            slots = np.flatnonzero(self.reader_of(positions, n_workers) == worker)
            yield Request(step, worker, slots, positions[slots])


@dataclass(frozen=True)
class ReadStage:
    """The second stage: requests become parts, plain dicts of tensors. An expected error travels as a part."""

    fill: Fill
    ahead: int = 0

    def __call__(self, requests: Iterable[Request]) -> Iterator[dict[str, Any]]:
        for request in self._announced(requests) if self.ahead else requests:
            part: dict[str, Any] = {"step": request.step, "worker": request.worker}
            try:
                rows = self.fill(request.positions)
            except OpenLMError as error:
                yield part | {"error": error}
                return
            yield part | {"slots": request.slots} | _packed(rows)

    def _announced(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The same requests, each made known to `fill` some steps before its turn."""
        waiting: deque[Request] = deque()
        for request in requests:
            self.fill.fetch_ahead(request.positions)  # type: ignore[attr-defined]
            waiting.append(request)
            if len(waiting) > self.ahead:
                yield waiting.popleft()
        yield from waiting


_SIGNED = {np.dtype("<u2"): "<i2", np.dtype("<u4"): "<i4"}


def _packed(rows: SampleRows) -> dict[str, Any]:
    """`rows` as a part. A worker's is a copy: its reader fills the same table again while this one is on its way."""
    plain = rows.tokens.dtype in _SIGNED
    if get_worker_info() is None:
        return {"tokens": rows.tokens, "plain": plain, "rows": rows}
    return {"tokens": rows.tokens.copy(), "plain": plain, "rows": rows._replace(tokens=_NOTHING)}


_NOTHING = np.zeros(0)


@dataclass(frozen=True)
class GroupStage:
    """The third stage of a worker: parts of `n_steps` steps at a time, their ids in one tensor, so in shared memory.

    To hand over a tensor costs both processes as much as to read a few hundred samples.
    """

    n_steps: int

    def __call__(self, parts: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        group: list[dict[str, Any]] = []
        for part in parts:
            group.append(part)
            if len(group) == self.n_steps:
                yield _in_one_tensor(group)
                group = []
        if group:
            yield _in_one_tensor(group)


def _in_one_tensor(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts; of those whose ids are of one type, the first holds the ids of all, the others how many rows."""
    tables = [part["tokens"] for part in group if "tokens" in part]
    if len({(table.dtype, table.shape[1]) for table in tables}) != 1:
        return [part | {"tokens": _tensor(part["tokens"])} if "tokens" in part else part for part in group]
    found = [part | {"tokens": len(part["tokens"])} if "tokens" in part else part for part in group]
    return [{"all": _tensor(np.concatenate(tables))}, *found]


def _tensor(ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(ids.view(_SIGNED[ids.dtype]) if ids.dtype in _SIGNED else ids)


def _apart(message: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The parts of a message, each with its own ids."""
    if "all" not in message[0]:
        yield from message
        return
    ids, start = message[0]["all"], 0
    for part in message[1:]:
        if "tokens" in part:
            part["tokens"], start = ids[start : start + part["tokens"]], start + part["tokens"]
        yield part


def _ids(part: dict[str, Any]) -> np.ndarray:
    tokens = part["tokens"]
    if isinstance(tokens, np.ndarray):
        return tokens
    ids = tokens.numpy()
    return ids.view(f"<u{ids.itemsize}") if part["plain"] else ids


class StepRows(NamedTuple):
    """One rank's samples of one step: as `SampleRows`, its tokens int64, the rows in the order of the plan."""

    tokens: torch.Tensor
    unreadable: list[tuple[int, str]]
    read_checksum: int
    stored: np.ndarray
    widths: np.ndarray
    is_plain: bool
    """Whether no id carries a mark."""


def run_pipeline(
    source: StepSource, fill: Fill, *, n_workers: int, batch: int, ahead: int = 0, together: int = 1
) -> Iterator[StepRows]:
    """The steps of `source` in order, read by `n_workers` processes (0: by this one), announced `ahead` steps before
    and handed over `together` steps at a time.

    Raises:
        DataError: a worker died, hung or ended early; errors of the workers are raised here as they are.
    """
    if not n_workers:
        pipeline = wds.DataPipeline(source, ReadStage(fill, ahead))
        yield from (_together([part], source.start + k, batch) for k, part in enumerate(iter(pipeline)))
        return
    loader: Any = _web_loader(wds.DataPipeline(source, ReadStage(fill, ahead), GroupStage(together)), n_workers)
    parts = iter(loader)
    waiting: list[deque[dict[str, Any]]] = [deque() for _ in range(n_workers)]
    try:
        for step in range(source.start, source.stop):
            for queue in waiting:  # all are empty at the same steps; messages come in the order of the workers
                if not queue:
                    queue.extend(_apart(_next(parts, step)))
            yield _together([queue.popleft() for queue in waiting], step, batch)
    except BaseException as error:
        _let_go(error)  # a traceback that somebody keeps would keep the workers
        raise
    finally:
        del parts, loader, waiting


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an error and of its causes hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _web_loader(pipeline: wds.DataPipeline, n_workers: int) -> wds.WebLoader:
    in_main_thread = threading.current_thread() is threading.main_thread()
    return wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=n_workers,
        worker_init_fn=partial(_start_worker, os.getpid(), in_main_thread),
        generator=torch.Generator(),  # else the loader would draw from the generator of the training
        timeout=_HUNG_SECONDS,
    )


def _next(parts: Any, step: int) -> list[dict[str, Any]]:
    try:
        return next(parts)
    except StopIteration:
        raise DataError(
            f"--workers: a data worker ended before step {step}. This is a bug; run with --workers 0."
        ) from None
    except (RuntimeError, OSError, EOFError) as error:  # torch noticed it, or it died while handing over a part
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"--workers: a data worker failed at step {step} ({reason}). Check memory; or use --workers 0."
        ) from error


def _together(parts: list[dict[str, Any]], step: int, batch: int) -> StepRows:
    """The parts of one step in the plan's order; each worker must have sent exactly one."""
    for worker, part in enumerate(parts):
        if (part["step"], part["worker"]) != (step, worker):
            raise DataError(f"--workers: worker {worker} sent no part of step {step}: it has ended. Use --workers 0.")
        if "error" in part:
            raise part["error"]
    tokens = np.empty((batch, parts[0]["tokens"].shape[1]), np.int64)
    stored, widths = np.zeros((batch, PROOF_BYTES), np.uint8), np.zeros(batch, np.uint8)
    unreadable: list[tuple[int, str]] = []
    read_sum = 0
    for part in parts:
        slots: Any = part["slots"] if len(parts) > 1 else slice(None)
        rows: SampleRows = part["rows"]
        tokens[slots] = _ids(part)
        if rows.stored is not None and rows.widths is not None:
            stored[slots], widths[slots] = rows.stored, rows.widths
        unreadable += [(int(part["slots"][row]), reason) for row, reason in rows.unreadable]
        read_sum += rows.read_checksum
    is_plain = all(part["plain"] for part in parts)
    return StepRows(torch.from_numpy(tokens), sorted(unreadable), read_sum % 2**64, stored, widths, is_plain)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer; it stops the workers
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(TERM_GRACE_SECONDS))  # schedulers signal whole process groups


def _start_worker(parent: int, by_main_thread: bool, worker: int) -> None:
    """One thread, and an end together with the process `parent`, however that ends: a worker that was forked has its
    sockets, and while they are open the other ranks do not see that their peer is gone."""
    faults.at("worker", worker)
    _one_thread(worker)
    if sys.platform == "linux":
        if by_main_thread:  # else the signal would come when that thread ends; torch looks every 5 s
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        is_fork = multiprocessing.get_start_method() == "fork"
        if is_fork and os.getppid() != parent:  # it ended before that could be asked for
            os._exit(1)
