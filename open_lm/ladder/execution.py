"""One training of a ladder as a process of its own: locked, stopped with the ladder, watched until it ends."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from open_lm.errors import ConfigError

LOCK = ".ladder.lock"
LOCK_PATIENCE_SECONDS = 120.0
WATCH_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def locked(folder: str) -> Iterator[IO[str]]:
    """Hold the lock of a run folder; a trainer that was started under it holds it too, until it ends.

    Raises:
        ConfigError: another process holds it for longer than a stopped trainer takes to save.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, LOCK), "a+") as file:
        _acquire(file, folder)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file


def _acquire(file: IO[str], folder: str) -> None:
    waited, began = False, time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            pass
        if not waited:
            print(f"{folder} is in use by another process: waiting for it to end", flush=True)
            waited = True
        if time.monotonic() - began > LOCK_PATIENCE_SECONDS:
            file.seek(0)
            raise ConfigError(
                f"{folder}: process {file.read().strip() or '?'} trains there. Wait for it, or stop it, then run again."
            )
        time.sleep(0.5)


def run_command(command: Sequence[str], lock: IO[str], watch: Callable[[], Any]) -> int:
    """Run `command` to its end and return its exit code; `watch` is called every few seconds and once at the end.

    Signals that end the ladder reach it too; should the ladder be killed, the system stops it (Linux).
    """
    environment = {**os.environ, "PYTHONPATH": _with_root(os.environ.get("PYTHONPATH", ""))}
    process = subprocess.Popen(
        command, env=environment, pass_fds=[lock.fileno()], preexec_fn=_die_with_parent if _is_linux() else None
    )
    with _forwarding(process):
        try:
            while True:
                try:
                    return process.wait(WATCH_SECONDS)
                except subprocess.TimeoutExpired:
                    watch()
        except KeyboardInterrupt:  # the terminal has told the trainer too: it saves, then ends
            process.wait()
            raise
        finally:
            watch()


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen) -> Iterator[None]:
    """SIGTERM for the ladder goes on to the trainer, which saves and ends with exit code 85."""
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    except ValueError:  # not the main thread: signals are not ours to take
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _with_root(path: str) -> str:
    return os.pathsep.join(part for part in (str(ROOT), path) if part)


def _is_linux() -> bool:
    return sys.platform == "linux"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
