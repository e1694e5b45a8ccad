"""Rank processes of one machine: started together, told about signals, and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from open_lm.errors import Preempted
from open_lm.text import duration

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GRACE_SECONDS = 30.0
"""Time that the other ranks may go on after one has failed, and again after SIGTERM. They notice by themselves when
a collective breaks; a rank that waits in a collective on a GPU does not."""
POLL_SECONDS = 0.05


class Ranks:
    """The processes; each gets the environment of this one and its own variables on top.

    They are in sessions of their own, so that Ctrl-C reaches them once, through here.
    """

    def __init__(
        self, command: Sequence[str], variables: Sequence[Mapping[str, str]], grace_seconds: float = GRACE_SECONDS
    ):
        self._grace = grace_seconds
        self._signals: list[int] = []
        before = {number: signal.signal(number, self._note) for number in FORWARDED}
        self._before = before
        marked = {**os.environ, "OPENLM_LAUNCHER": str(os.getpid())}
        self.processes = [
            subprocess.Popen(command, env={**marked, **mine}, start_new_session=True) for mine in variables
        ]
        self._names = [mine["RANK"] for mine in variables]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)

    def wait(self) -> int:
        """Wait for all ranks: 0, the code of the first that failed, or 85 when they saved and stopped."""
        first: int | None = None
        deadline, told = float("inf"), False
        try:
            while any(process.poll() is None for process in self.processes):
                self._forward()
                if first is None and (failed := self._failed()) is not None:
                    first, deadline = failed, time.monotonic() + self._grace
                if time.monotonic() > deadline:
                    self._send(signal.SIGKILL if told else signal.SIGTERM)
                    told, deadline = True, time.monotonic() + self._grace
                time.sleep(POLL_SECONDS)
        finally:
            self._send(signal.SIGKILL)
            for number, handler in self._before.items():
                signal.signal(number, handler)
        return self._code(first if first is not None else self._failed())

    def _forward(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            self._send(signal.SIGTERM if number == signal.SIGHUP else number)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _failed(self) -> int | None:
        """A rank that ended with an error of its own: one that was told to stop, and saved, has none."""
        codes = [process.poll() for process in self.processes]
        return next((k for k, code in enumerate(codes) if code not in (None, 0, Preempted.exit_code)), None)

    def _code(self, failed: int | None) -> int:
        if failed is None:
            return max(process.returncode for process in self.processes)
        code = self.processes[failed].returncode
        if code >= 0:
            return code
        lack = ", as the system does for lack of memory" if -code == signal.SIGKILL else ""
        print(
            f"error: rank {self._names[failed]} was ended by {signal.Signals(-code).name}{lack}; the other ranks were "
            f"stopped within {duration(2 * self._grace)}.",
            file=sys.stderr,
            flush=True,
        )
        return 128 - code


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
