"""Loader pipeline: a webdataset pipeline in each worker, joined in the main process."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import get_worker_info

from open_lm.errors import DataError, OpenLMError

warnings.filterwarnings("ignore", "This DataLoader will create")  # how many workers is the user's choice

_HUNG_SECONDS = 900
TERM_GRACE_SECONDS = 30
"""How long a worker outlives SIGTERM, so that the main process can finish its step and save."""
_PR_SET_PDEATHSIG = 1


class Request(NamedTuple):
    """The part of one step that one worker reads: the places `slots` of this rank's batch hold `positions`."""

    step: int
    worker: int
    slots: np.ndarray
    positions: np.ndarray


class Filled(NamedTuple):
    """Samples (n, seq_len + 1), (row, reason) of the holes among them, and the mark of which they are."""

    tokens: np.ndarray
    holes: list[tuple[int, str]]
    mark: int = 0


Fill = Callable[[np.ndarray], Filled]
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
                tokens, holes, mark = self.fill(request.positions)
            except OpenLMError as error:
                yield part | {"error": error}
                return
            holes = [(int(request.slots[row]), reason) for row, reason in holes]
            found = {"tokens": torch.from_numpy(tokens), "holes": holes, "mark": mark}
            yield part | {"slots": torch.from_numpy(request.slots)} | found

    def _announced(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The same requests, each made known to `fill` some steps before its turn."""
        waiting: deque[Request] = deque()
        for request in requests:
            self.fill.fetch_ahead(request.positions)  # type: ignore[attr-defined]
            waiting.append(request)
            if len(waiting) > self.ahead:
                yield waiting.popleft()
        yield from waiting


class StepParts(NamedTuple):
    """One rank's samples of one step (B, seq_len + 1) as int64, (row, reason) of its holes, and the sum of marks."""

    tokens: torch.Tensor
    holes: list[tuple[int, str]]
    mark: int


def run_pipeline(source: StepSource, fill: Fill, *, n_workers: int, batch: int, ahead: int = 0) -> Iterator[StepParts]:
    """The steps of `source` in order, read by `n_workers` processes (0: by this one), announced `ahead` steps before.

    Raises:
        DataError: a worker died, hung or ended early; errors of the workers are raised here as they are.
    """
    pipeline = wds.DataPipeline(source, ReadStage(fill, ahead))
    if not n_workers:
        yield from (_together([part], source.start + k, batch) for k, part in enumerate(iter(pipeline)))
        return
    parts = iter(_web_loader(pipeline, n_workers).pipeline[0])  # torch's own iterator, so that it can be ended here
    try:
        for step in range(source.start, source.stop):
            yield _together([_next(parts, step) for _ in range(n_workers)], step, batch)
    finally:
        with contextlib.suppress(RuntimeError):  # torch says once more that a worker was killed
            parts._shutdown_workers()  # else a traceback that somebody keeps would keep the workers


def _web_loader(pipeline: wds.DataPipeline, n_workers: int) -> wds.WebLoader:
    in_main_thread = threading.current_thread() is threading.main_thread()
    return wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=n_workers,
        worker_init_fn=_start_worker if in_main_thread else _one_thread,
        generator=torch.Generator(),  # else the loader would draw from the generator of the training
        timeout=_HUNG_SECONDS,
    )


def _next(parts: Any, step: int) -> dict[str, Any]:
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


def _together(parts: list[dict[str, Any]], step: int, batch: int) -> StepParts:
    """The parts of one step in the plan's order; each worker must have sent exactly one."""
    for worker, part in enumerate(parts):
        if (part["step"], part["worker"]) != (step, worker):
            raise DataError(f"--workers: worker {worker} sent no part of step {step}: it has ended. Use --workers 0.")
        if "error" in part:
            raise part["error"]
    holes = sorted(hole for part in parts for hole in part["holes"])
    mark = sum(part["mark"] for part in parts) % 2**64
    if len(parts) == 1:
        return StepParts(parts[0]["tokens"].long(), holes, mark)
    tokens = torch.empty((batch, parts[0]["tokens"].shape[1]), dtype=torch.int64)
    for part in parts:
        tokens[part["slots"]] = part["tokens"].long()
    return StepParts(tokens, holes, mark)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer; it stops the workers
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(TERM_GRACE_SECONDS))  # schedulers signal whole process groups


def _start_worker(worker: int) -> None:
    """One thread, and an end together with the parent, however that ends."""
    _one_thread(worker)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
