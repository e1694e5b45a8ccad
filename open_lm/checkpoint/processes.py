"""Identity of a process: which one wrote a file, and whether it still runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """Host, process id, and when the process started: an id alone is given out again, in containers at once."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_here(owner: Mapping[str, Any]) -> bool:
    """Whether `owner`, an `identity`, is a process of this machine, so that `is_running` can tell."""
    return owner.get("host") == socket.gethostname()


def is_running(owner: Mapping[str, Any]) -> bool:
    """Whether `owner`, of this machine, still runs."""
    pid = int(owner["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return owner.get("started") in (None, _started(pid))


def _started(pid: int) -> str | None:
    """The boot and the clock tick of a process's start; None where the system does not say (only Linux does)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {fields[19]}"
    except (OSError, IndexError):
        return None
