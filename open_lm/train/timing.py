"""Timed sections of a step, measured without making the GPU wait."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch


class Timing:
    """Adds up the seconds spent in `with timing("forward"):` blocks until `read` is called.

    On a GPU the stretches are taken between CUDA events, which are only looked at by `read`.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        if self._on_gpu and not on_host:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        began = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Seconds per name since the last `read`; waits for the GPU to reach this point."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        seconds = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return seconds
