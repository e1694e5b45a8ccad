"""Watchdog: when a run hangs, the stacks of every rank and their last collectives are written down."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time

from open_lm.errors import DeviceError

LEEWAY = 10.0
"""Factor by which a validation, a save or the first step may take longer than a step."""
RECORDED_COLLECTIVES = "2000"
"""Collectives that torch's flight recorder remembers on each rank."""


class Watchdog:
    """A thread that waits for steps. When none ends in `limit_seconds` it writes `hang-rankR.txt` (the stack of every
    thread) and `hang-rankR.json` (the last collectives, from torch's flight recorder) into `folder`; when none ends in
    twice that time it ends the process, because nothing else would.

    A rank that is stuck stops all others in their next collective, so all of them write. SIGUSR2 shows the stacks on
    the terminal at any time.
    """

    def __init__(self, folder: str, rank: int, limit_seconds: float):
        self._stem = os.path.join(folder, f"hang-rank{rank}")
        self._limit_seconds = limit_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat(LEEWAY)

    def __enter__(self) -> Watchdog:
        if sys.__stderr__ is not None:
            faulthandler.register(signal.SIGUSR2, sys.__stderr__, all_threads=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)

    def beat(self, leeway: float = 1.0) -> None:
        """Something ended; the next may take `leeway` times the limit."""
        self._reported = False
        self._deadline = time.monotonic() + leeway * self._limit_seconds

    def _watch(self) -> None:
        while not self._ended.wait(min(self._limit_seconds / 10, 5.0)):
            late_seconds = time.monotonic() - self._deadline
            if late_seconds > 0 and not self._reported:
                self._reported = True
                self.write(f"no step ended in {self._limit_seconds:.0f} s")
            if late_seconds > self._limit_seconds:
                logging.error("still no step after %.0f s more: leaving.", self._limit_seconds)
                os._exit(DeviceError.exit_code)

    def write(self, reason: str) -> None:
        """Write the stacks and the last collectives; whatever goes wrong in it does not end the run."""
        logging.error("%s: see %s.txt for what every thread is doing.", reason, self._stem)
        try:
            with open(f"{self._stem}.txt", "w") as file:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            with open(f"{self._stem}.json", "w") as file:
                json.dump(last_collectives(), file)
        except Exception as error:
            logging.warning("%s.*: could not be written: %s", self._stem, error)


def record_collectives() -> None:
    """Let torch keep the last collectives in memory; to be called before the ranks meet."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED_COLLECTIVES)


def last_collectives() -> dict:
    """The collectives in torch's flight recorder of this rank; {} where it was off, or this torch has none."""
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_fr_trace_json", None)
    return json.loads(dump() or b"{}") if dump else {}
