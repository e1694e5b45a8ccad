"""The lock of a run folder: one run at a time; a lock whose run is dead is taken over, without trusting any clock."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.checkpoint import processes
from open_lm.errors import FolderLocked

LOCK = "run.lock"
BEAT_SECONDS = 10.0
"""Seconds between two signs of life in the lock file."""
DEAD_AFTER_SECONDS = 45.0
"""Time that a lock of another machine is watched; without a sign of life in that time its run is dead."""


class FolderLock:
    """Held by rank 0 of a run while it may write to `folder`."""

    def __init__(self, folder: str):
        self._path = os.path.join(folder, LOCK)
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            FolderLocked: another run holds it and lives.
        """
        if not self._create():
            self._require_dead(self._read())
            logging.warning("%s is of a run that ended without removing it: taken over.", self._path)
            storage.write_text(self._path, self._content(0))
            time.sleep(0.2)  # of two that take over at once the last one wins
            self.require()
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock back, if it was taken and is still this run's."""
        self._ended.set()
        with contextlib.suppress(FolderLocked, OSError):
            self.require()
            os.unlink(self._path)

    def require(self) -> None:
        """Check that the lock is still this run's: one that was stopped for long may have been declared dead.

        Raises:
            FolderLocked: it is not.
        """
        if self._read().get("token") != self._token:
            raise FolderLocked(
                f"{self._path}: another run has taken over this folder, so this one writes no more. "
                "Let the other go on, or end it and start with --resume latest."
            )

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(self._content(0))
        return True

    def _require_dead(self, owner: dict[str, Any]) -> None:
        """Raise FolderLocked when the run that wrote `owner` lives, as its process or its beats show."""
        refusal = (
            f"{self._path}: another run works in this folder ({owner.get('host')}, process {owner.get('pid')}). "
            "Wait until it has ended, or choose another --name."
        )
        if processes.is_here(owner):
            if processes.is_running(owner):
                raise FolderLocked(refusal)
            return
        logging.warning("%s is held by %s: watching it for a sign of life.", self._path, owner.get("host"))
        deadline = time.monotonic() + DEAD_AFTER_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, DEAD_AFTER_SECONDS / 10))
            if self._read() not in (owner, {}):
                raise FolderLocked(refusal)

    def _beat(self) -> None:
        for count in _counting():
            if self._ended.wait(BEAT_SECONDS):
                return
            try:
                self.require()
                storage.write_text(self._path, self._content(count))
            except FolderLocked as error:
                logging.error("%s", error)
                return
            except Exception as error:  # a full disk, say: the file stays as it was
                logging.warning("%s could not be written: %s", self._path, error)

    def _content(self, count: int) -> str:
        return json.dumps({**processes.identity(), "token": self._token, "beats": count})

    def _read(self) -> dict[str, Any]:
        """The content of the lock file; {} where it is missing or only half written."""
        try:
            found = json.loads(Path(self._path).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _counting() -> Iterator[int]:
    count = 0
    while True:
        count += 1
        yield count
