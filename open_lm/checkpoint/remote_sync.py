"""Remote sync: copies a run folder to a remote place while the run trains, and back to another machine."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from open_lm import storage, text
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.checksum import FileRecord, matches
from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.retention import UNFINISHED, Retention
from open_lm.checkpoint.save_policy import kind_of
from open_lm.checkpoint.upload import upload
from open_lm.errors import CheckpointError, OpenLMError, StorageError

CHECKPOINTS = "checkpoints"
LISTING = "mirror.json"
"""The file that names what lies beside the checkpoints in a remote folder, so that it can be brought back."""
NOT_COPIED = ("run.lock",)
GRACE_SECONDS = 1800.0
"""Longest wait at the end of a run for the last copies."""


@dataclass
class RemoteSync:
    """A thread that copies complete checkpoints and logs to `url`, every `every_seconds` and at the end.

    The commit file of a checkpoint goes last, so that one that is cut off does not exist there either; before it go the
    logs, and the checkpoints of earlier steps that stay for ever: whoever goes on from there lacks none of them. While
    one is copied `retention` keeps it here. There, older ones go by the same policy once a newer one is complete;
    nothing that happens to the local files deletes anything there. Training waits for nothing: a pass that fails is
    logged and repeated.
    """

    folder: str
    url: str
    every_seconds: float
    retention: Retention | None = None
    """The owner of what is deleted, here and there; None: nothing is."""
    grace_seconds: float = GRACE_SECONDS
    _copied: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size and time of change of each loose file, as it was when it was copied last."""
    _there: set[str] = field(default_factory=set)
    """The commit files that are known to be there."""
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._retention = self.retention or Retention(os.path.join(self.folder, CHECKPOINTS), None)

    def __enter__(self) -> RemoteSync:
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        logging.info("copying what is left to %s", storage.shown(self.url))
        self._stop.set()
        self._thread.join(self.grace_seconds)
        if self._thread.is_alive():
            waited = text.duration(self.grace_seconds)
            logging.error("%s is not complete after %s: left as it is.", storage.shown(self.url), waited)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._try()
            self._stop.wait(self.every_seconds)
        self._try()

    def _try(self) -> None:
        try:
            self.sync()
        except (OpenLMError, OSError) as error:
            logging.warning("--remote-sync: %s It is tried again.", error)

    def sync(self) -> None:
        """One pass: copy the checkpoints that stay for ever, the newest, the others and the logs; then delete there
        what the policy lets go of.

        Raises:
            StorageError, OSError: something could not be copied.
            CheckpointError: something here is damaged, or would be written over another there: it is not copied.
            FolderLocked: another run has taken over the folder: nothing more is done.
        """
        self._retention.require_owner()
        problems: list[Exception] = []
        tried: set[str] = set()
        while commit := self._next_to_copy(tried):
            tried.add(commit.commit_name)
            try:
                self._copy_checkpoint(commit)
            except (CheckpointError, FileNotFoundError) as error:  # damaged, or deleted before it was pinned
                problems.append(error)
        self._copy_logs()
        self._thin_out()
        if problems:
            raise problems[0]

    def _next_to_copy(self, tried: set[str]) -> Commit | None:
        """The first fixed checkpoint here that is not there, else the newest; looked up each time."""
        here = commits.committed(os.path.join(self.folder, CHECKPOINTS))
        missing = [commit for commit in here if commit.commit_name not in tried | self._there]
        fixed = [commit for commit in reversed(missing) if kind_of(commit) == "fixed"]
        return next(iter([*fixed, *missing]), None)

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

    def _copy_checkpoint(self, commit: Commit) -> None:
        remote = storage.join(self.url, CHECKPOINTS)
        if _is_there(remote, commit):  # an earlier start has copied it
            self._there.add(commit.commit_name)
            return
        with self._retention.pinned(commit):
            here = Path(self.folder, CHECKPOINTS)
            commits.in_parallel(
                partial(upload, here / name, storage.join(remote, name), record)
                for name, record in commit.files.items()
            )
            self._copy_logs()
            self._retention.require_owner()
            upload(here / commit.commit_name, storage.join(remote, commit.commit_name))
            self._there.add(commit.commit_name)
            logging.info("copied checkpoint %s to %s", commit.label, storage.shown(self.url))
            self._thin_out()

    def _copy_logs(self) -> None:
        loose = self._loose_files()
        for name in loose:
            self._copy_loose(name)
        listed = sorted({*self._copied, *loose})  # also what is gone from here: it is still there, and is fetched
        storage.write_text(storage.join(self.url, LISTING), json.dumps(listed))

    def _copy_loose(self, name: str) -> None:
        path = Path(self.folder, name)
        state = path.stat()
        if self._copied.get(name) != (state.st_size, state.st_mtime_ns):
            upload(path, storage.join(self.url, name))
            self._copied[name] = (state.st_size, state.st_mtime_ns)

    def _thin_out(self) -> None:
        self._retention.thin_out_copy(storage.join(self.url, CHECKPOINTS))


def _is_there(remote: str, commit: Commit) -> bool:
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


def bring_back(url: str, folder: str, *, logs_only: bool = False) -> None:
    """Make `folder` what was copied to `url`, where that holds a checkpoint to be continued before those here: its
    files, and the logs; with `logs_only` those alone.

    Raises:
        StorageError: something cannot be read.
        CheckpointError: it arrived damaged.
    """
    theirs = commits.committed(storage.join(url, CHECKPOINTS))
    ours = commits.committed(os.path.join(folder, CHECKPOINTS))
    if not theirs or (ours and (ours[0].branch, ours[0].step) >= (theirs[0].branch, theirs[0].step)):
        return
    newest = theirs[0]
    logging.info("fetching checkpoint %s (%s) from %s", newest.label, text.size(newest.size_bytes), storage.shown(url))
    listing = storage.join(url, LISTING)
    loose = json.loads(storage.read_text(listing)) if storage.exists(listing) else []
    fetch = partial(_fetch, url, folder)
    commits.in_parallel([partial(fetch, name) for name in loose])
    if logs_only:
        return
    commits.in_parallel([partial(fetch, f"{CHECKPOINTS}/{name}", record) for name, record in newest.files.items()])
    fetch(f"{CHECKPOINTS}/{newest.commit_name}")


def _fetch(url: str, folder: str, name: str, record: FileRecord | None = None) -> None:
    commits.copy(storage.join(url, name), os.path.join(folder, safe(name)), record)


def safe(name: str) -> str:
    """`name`, once it is sure that it stays inside the run folder.

    Raises:
        StorageError: it does not.
    """
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise StorageError(f"{name!r} leads out of the run folder: the remote copy is not one of ours.")
    return name
