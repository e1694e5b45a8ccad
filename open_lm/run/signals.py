"""Signal handling: stop requests, polled after each step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequests:
    """Stop signals, from `note` on until `forget` only noted; but Ctrl-C interrupts at once when it is the second, or
    comes when the training is over.

    A time limit asks too, counted from the making of this object.
    """

    def __init__(self, time_limit_minutes: float | None = None) -> None:
        self.received: str | None = None
        self._limit_minutes = time_limit_minutes
        self._began = time.monotonic()
        self._previous: dict[signal.Signals, Any] = {}
        self._trains = False

    def asked(self, seconds_needed: float = 0.0) -> str | None:
        """The reason to stop now: a signal's name, or the time limit when less than `seconds_needed` are left of it."""
        if self.received or self._limit_minutes is None:
            return self.received
        left = 60 * self._limit_minutes - (time.monotonic() - self._began)
        return f"--time-limit-minutes {self._limit_minutes:g}" if left <= seconds_needed else None

    @contextlib.contextmanager
    def while_training(self) -> Iterator[None]:
        """Within the block they are asked for after each step; they stay noted after it."""
        self.note()
        self._trains = True
        try:
            yield
        finally:
            self._trains = False

    def note(self) -> None:
        """Note the signals from here on; only the main thread of a process gets any."""
        if not self._previous and threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}

    def forget(self) -> None:
        """Let the signals do again what they did."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _on_signal(self, number: int, _frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and (self.received or not self._trains):
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def end_with_launcher() -> None:
    """Get SIGTERM when the launcher (`openlm train`, torchrun) is killed and can send none: no rank stays behind.

    Linux only.
    """
    set_parent_death_signal = 1
    if sys.platform == "linux" and {"TORCHELASTIC_RUN_ID", "OPENLM_LAUNCHER"} & set(os.environ):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
