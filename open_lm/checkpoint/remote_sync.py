"""Remote sync: copies a run folder to a remote place while the run trains."""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from open_lm import storage, text
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint import processes
from open_lm.checkpoint.checksum import matches
from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.fetch import CHECKPOINTS, LISTING, listed
from open_lm.checkpoint.retention import UNFINISHED, Retention
from open_lm.checkpoint.save_policy import kind_of
from open_lm.checkpoint.upload import upload
from open_lm.errors import CheckpointError, FolderLocked, OpenLMError, StorageError

NOT_COPIED = ("run.lock",)
OWNER = "owner.json"
"""The file there that names the run that copies to it: of two, on machines that do not see each other, the last."""
APPENDED = (".jsonl", ".csv", ".log")
"""Endings of logs that only grow while a run is at work."""
GRACE_SECONDS = 1800.0
"""Longest wait at the end of a run for the last copies."""
FAILURES_IN_A_ROW = 3
"""Failures of the remote after which the rest of a pass is left to the next one."""
LAST_PASSES = 8
"""Passes at the end of a run that may copy nothing, one after the other, before what is left is given up."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
"""Pauses between those."""


@dataclass
class RemoteSync:
    """A thread that copies complete checkpoints and logs to `url`, every `every_seconds` and at the end.

    The commit file of a checkpoint goes last, so that one that is cut off does not exist there either; before it go the
    logs, and the checkpoints of earlier steps that stay for ever: whoever goes on from there lacks none of them. While
    one is copied `retention` keeps it here. There, older ones go by the same policy once a newer one is complete;
    nothing that happens to the local files deletes or shortens anything there, and no checkpoint there is written over.
    Training waits for nothing: what fails is logged and tried again, and keeps nothing else from being copied.
    """

    folder: str
    url: str
    every_seconds: float
    retention: Retention | None = None
    """The owner of what is deleted, here and there; None: nothing is."""
    grace_seconds: float = GRACE_SECONDS
    _copied: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size and time of change of each loose file, as it was when it was copied last."""
    _listed: set[str] | None = None
    """Names in the listing there, once it was read."""
    _there: set[str] = field(default_factory=set)
    """The commit files that are known to be there."""
    _failed: dict[str, Exception] = field(default_factory=dict)
    """Errors of what could not be copied when it was tried last, by its name."""
    _in_a_row: int = 0
    _token: str = field(default_factory=partial(secrets.token_hex, 8))
    """This run's name in OWNER."""
    _has_place: bool = False
    _one_at_a_time: threading.RLock = field(default_factory=threading.RLock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._retention = self.retention or Retention(os.path.join(self.folder, CHECKPOINTS), None)
        self._remote = storage.join(self.url, CHECKPOINTS)

    def __enter__(self) -> RemoteSync:
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        logging.info("copying what is left to %s", storage.shown(self.url))
        self._deadline = time.monotonic() + self.grace_seconds
        self._stop.set()
        self._thread.join(self.grace_seconds)
        if self._thread.is_alive():
            waited = text.duration(self.grace_seconds)
            logging.error("%s is not complete after %s: left as it is.", storage.shown(self.url), waited)
        for name, error in dict(self._failed).items():
            logging.error("%s is not in %s: %s", name, storage.shown(self.url), error)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._try()
            self._stop.wait(self.every_seconds)
        pause, fruitless = FIRST_PAUSE_SECONDS, 0
        while True:
            before = len(self._there), len(self._copied)
            if not self._try():
                return
            fruitless = fruitless + 1 if before == (len(self._there), len(self._copied)) else 0
            if fruitless == LAST_PASSES or time.monotonic() + pause > self._deadline:
                return
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _try(self) -> bool:
        """A pass; whether another one may copy more."""
        known = {str(error) for error in self._failed.values()}
        try:
            problems = self._pass()
        except FolderLocked as error:
            logging.error("--remote-sync: %s", error)
            return False
        except Exception as error:  # the thread lives as long as the run
            logging.warning("--remote-sync: %s It is tried again.", error, exc_info=not _is_expected(error))
            return True
        for problem in problems:
            if str(problem) not in known:
                logging.warning("--remote-sync: %s It is tried again.", problem)
        return any(not isinstance(problem, CheckpointError | FileNotFoundError) for problem in problems)

    def sync(self) -> None:
        """One pass: copy the checkpoints that stay for ever, the newest, the others and the logs; then delete there
        what the policy lets go of.

        Raises:
            StorageError, OSError: something could not be copied; all else was.
            CheckpointError: something here is damaged, or would be written over another there: it is not copied.
            FolderLocked: another run has taken over the folder: nothing more is done.
        """
        for problem in self._pass():
            raise problem

    def require_place(self) -> None:
        """Check that the place there is still this run's; it becomes its own at the first call.

        Raises:
            FolderLocked: another run has begun to copy to it.
            StorageError: it cannot be asked.
        """
        path = storage.join(self.url, OWNER)
        with self._one_at_a_time:
            if not self._has_place:
                storage.write_text(path, json.dumps({**processes.identity(), "token": self._token}))
                self._has_place = True
            elif storage.exists(path) and self._token not in storage.read_text(path):
                raise FolderLocked(
                    f"{storage.shown(path)}: another run copies to this place, so this one copies nothing more. "
                    "Let the other go on, or end it and start with --resume latest."
                )

    def _require_owner(self) -> None:
        self._retention.require_owner()
        self.require_place()

    def _pass(self) -> list[Exception]:
        """The problems of one pass."""
        self._require_owner()
        self._failed, before, self._in_a_row = {}, self._failed, 0
        tried: set[str] = set()
        while commit := self._next_to_copy(tried, before):
            tried.add(commit.commit_name)
            self._attempt(commit.commit_name, partial(self._copy_checkpoint, commit))
        self.copy_logs()
        self._attempt(CHECKPOINTS, partial(self._retention.thin_out_copy, self._remote))
        return list(self._failed.values())

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        """Do `work`, unless the remote has failed a few times just now; what is wrong is noted under `name`."""
        if self._in_a_row >= FAILURES_IN_A_ROW:
            return
        try:
            work()
            self._in_a_row = 0
        except FolderLocked:
            raise
        except (OpenLMError, OSError) as error:
            self._failed[name] = error
            self._in_a_row += isinstance(error, StorageError)

    def _next_to_copy(self, tried: set[str], failed: dict[str, Exception]) -> Commit | None:
        """The first fixed checkpoint here that is not there, else the newest, what has failed before last; looked up
        each time."""
        here = commits.committed(os.path.join(self.folder, CHECKPOINTS))
        missing = [commit for commit in here if commit.commit_name not in tried | self._there]
        fixed = [commit for commit in reversed(missing) if kind_of(commit) == "fixed"]
        return next(iter(sorted([*fixed, *missing], key=lambda commit: commit.commit_name in failed)), None)

    def _copy_checkpoint(self, commit: Commit) -> None:
        if is_there(self._remote, commit):  # an earlier start has copied it
            self._there.add(commit.commit_name)
            return
        with self._retention.pinned(commit):
            here = Path(self.folder, CHECKPOINTS)
            commits.in_parallel(
                partial(upload, here / name, storage.join(self._remote, name), record)
                for name, record in commit.files.items()
            )
            self.copy_logs()
            self._require_owner()
            upload(here / commit.commit_name, storage.join(self._remote, commit.commit_name))
            self._there.add(commit.commit_name)
            logging.info("copied checkpoint %s to %s", commit.label, storage.shown(self.url))
            self._retention.thin_out_copy(self._remote)

    def _loose_files(self) -> list[str]:
        """The files that belong to no checkpoint: logs, metrics, traces."""
        root = Path(self.folder)
        names = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
        return [
            str(name)
            for name in names
            if not name.name.startswith(".")
            and name.name not in NOT_COPIED
            and (name.parts[0] != CHECKPOINTS or name.name == "results.jsonl")
        ]

    def copy_logs(self) -> None:
        """Copy each log that has changed, and the list of all that were ever copied: what is gone here is still there,
        and is fetched."""
        with self._one_at_a_time:
            for name in self._loose_files():
                self._attempt(name, partial(self._copy_loose, name))
            self._attempt(LISTING, self._write_listing)

    def _copy_loose(self, name: str) -> None:
        path = Path(self.folder, name)
        state = path.stat()
        before = self._copied.get(name, (0, 0))
        if before == (state.st_size, state.st_mtime_ns):
            return
        if state.st_size < before[0] and name.endswith(APPENDED):
            raise CheckpointError(f"{path} was cut off: its copy, of {before[0]} bytes, stays.")
        upload(path, storage.join(self.url, name))
        self._copied[name] = (state.st_size, state.st_mtime_ns)

    def _write_listing(self) -> None:
        known = listed(self.url) if self._listed is None else self._listed
        if self._listed is None or not known >= set(self._copied):
            storage.write_text(storage.join(self.url, LISTING), json.dumps(sorted({*known, *self._copied})))
        self._listed = known | set(self._copied)


def is_there(remote: str, commit: Commit) -> bool:
    """Whether `commit` is in the folder `remote` already.

    Raises:
        CheckpointError: its label is that of another one there, good, set aside or damaged, which stays.
    """
    for path in storage.glob_in(remote, f"epoch_{commit.label}.*json"):
        if path.endswith(UNFINISHED):
            continue
        other = commits.read_commit(path)
        if other is not None and commit.files.items() <= other.files.items():
            if path.endswith(commit.commit_name):
                return True
        elif not (_has_no_other_file(remote, commit) if other is None else other.files.items() <= commit.files.items()):
            raise CheckpointError(
                f"{storage.shown(path)} is of another checkpoint {commit.label}, which stays: the one here is not "
                "copied. Give a run of its own another --name."
            )
    return False


def _has_no_other_file(remote: str, commit: Commit) -> bool:
    """Whether no file there has a name of this checkpoint's and another content."""
    paths = {storage.join(remote, name): record for name, record in commit.files.items()}
    return all(matches(path, record) for path, record in paths.items() if storage.exists(path))


def _is_expected(error: Exception) -> bool:
    return isinstance(error, OpenLMError | OSError)
