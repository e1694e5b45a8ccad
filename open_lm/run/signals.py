"""Signal handling: stop requests, polled after each step."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import types
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequests:
    """While the block runs, the first stop signal is only noted; a second Ctrl-C interrupts at once.

    A time limit asks too, counted from the making of this object.
    """

    def __init__(self, time_limit_minutes: float | None = None) -> None:
        self.received: str | None = None
        self._limit_minutes = time_limit_minutes
        self._began = time.monotonic()
        self._previous: dict[signal.Signals, Any] = {}

    def asked(self, seconds_needed: float = 0.0) -> str | None:
        """The reason to stop now: a signal's name, or the time limit when less than `seconds_needed` are left of it."""
        if self.received or self._limit_minutes is None:
            return self.received
        left = 60 * self._limit_minutes - (time.monotonic() - self._began)
        return f"--time-limit-minutes {self._limit_minutes:g}" if left <= seconds_needed else None

    def __enter__(self) -> StopRequests:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: types.FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def end_with_launcher() -> None:
    """Get SIGTERM when the launcher (`openlm train`, torchrun) is killed and can send none: no rank stays behind.

    Linux only.
    """
    set_parent_death_signal = 1
    if sys.platform == "linux" and {"TORCHELASTIC_RUN_ID", "OPENLM_LAUNCHER"} & set(os.environ):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
