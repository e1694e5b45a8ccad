"""The folder of the block cache: the one of --data-cache, or one in the temporary folder that ends with the run."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import time
from typing import IO

from open_lm.data.cache import BlockCache

_FREE_SHARE = 0.5
_users: dict[str, IO[str]] = {}
"""The temporary caches this process uses, each with its shared lock."""


def open_cache(folder: str | None, limit_gb: float, *, world_size: int = 1) -> BlockCache:
    """The block cache that all processes of this run on this machine share.

    A temporary one takes at most half of the free space, and is removed when its last process ends.
    """
    run = _run(world_size)
    session = run if world_size > 1 else f"{run}-{time.time_ns()}"  # alone: look again at what a URL holds
    if folder is not None:
        return BlockCache(folder, limit_gb * 1e9, session)
    place = _temporary(run)
    return BlockCache(place, min(limit_gb * 1e9, _FREE_SHARE * shutil.disk_usage(place).free), session)


def _run(world_size: int) -> str:
    """The same for all ranks of a run on this machine, another for every run: the launcher, or this process."""
    pid = os.getppid() if world_size > 1 else os.getpid()
    return f"{pid}-{_started(pid)}"


def _started(pid: int) -> str:
    """The start time of a process, in ticks, since a pid is used again."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return "0"


def _temporary(run: str) -> str:
    start = os.path.join(tempfile.gettempdir(), f"open_lm-data-{os.getuid()}-")
    folder = start + run
    if folder in _users and os.path.isdir(folder):
        return folder
    for left in glob.glob(f"{start}*"):
        if left != folder:
            _remove_unused(left)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    users = open(os.path.join(folder, "users.lock"), "a")  # noqa: SIM115  # held as long as the process
    fcntl.flock(users, fcntl.LOCK_SH)
    _users[folder] = users
    atexit.register(_leave, folder, users, os.getpid())
    return folder


def _leave(folder: str, users: IO[str], pid: int) -> None:
    if os.getpid() == pid:  # not in a forked worker
        users.close()
        _remove_unused(folder)


def _remove_unused(folder: str) -> None:
    """Remove a temporary cache that no process uses: one that was killed could not."""
    with contextlib.suppress(OSError), open(os.path.join(folder, "users.lock"), "a") as users:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
