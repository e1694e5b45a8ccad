"""The text log of a run: to the terminal from rank 0, to out.log, and per rank when asked."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator


class LogFile(logging.FileHandler):
    """A log file whose write errors (a full disk) are printed once on the terminal and end nothing."""

    _is_broken = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._is_broken:
            self._is_broken = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr, flush=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def text_log(folder: str, rank: int, *, every_rank: bool, debug: bool) -> Iterator[None]:
    """Log to the terminal (rank 0) and to `folder/out.log` (or out-RANK.log) until the block ends."""
    handlers: list[logging.Handler] = [logging.NullHandler()]  # without any, logging makes one for the terminal
    if rank == 0:
        handlers.append(logging.StreamHandler())
    if rank == 0 or every_rank:
        name = "out.log" if rank == 0 else f"out-{rank}.log"
        handlers.append(LogFile(os.path.join(folder, name)))
    formatter = logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", datefmt="%Y-%m-%d,%H:%M:%S")
    root, before = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    try:
        yield
    finally:
        root.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
