"""Remote sync: copies a run folder to a remote place while the run trains, and back to another machine."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from open_lm import storage, text
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.commit import Commit, HashingFile
from open_lm.errors import StorageError

CHECKPOINTS = "checkpoints"
LISTING = "mirror.json"
"""The file that names what lies beside the checkpoints in a remote folder, so that it can be brought back."""
LAST_PASS_SECONDS = 1800.0
"""How long the end of a run waits for the last copies."""


@dataclass
class RemoteSync:
    """A thread that keeps `url` as `folder` is: complete checkpoints and logs, every `every_seconds` and at the end.

    The commit file of a checkpoint goes last, so that one that is cut off does not exist there either. What it has seen
    and is then deleted here, is deleted there. Training waits for nothing: a pass that fails is said, and tried again.
    """

    folder: str
    url: str
    every_seconds: float
    _copied: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size and time of change of each file, as it was when it was copied last."""
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> RemoteSync:
        self._thread = threading.Thread(target=self._run, name="remote-sync", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        logging.info("copying what is left to %s", storage.shown(self.url))
        self._stop.set()
        self._thread.join(LAST_PASS_SECONDS)
        if self._thread.is_alive():
            waited = text.duration(LAST_PASS_SECONDS)
            logging.error("%s is not complete after %s: left as it is.", storage.shown(self.url), waited)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._try()
            self._stop.wait(self.every_seconds)
        self._try()

    def _try(self) -> None:
        try:
            self.sync()
        except (StorageError, OSError) as error:
            logging.warning("--remote-sync: %s It is tried again.", error)

    def sync(self) -> None:
        """One pass: copy what is new, the newest checkpoint first, then delete what is gone.

        Raises:
            StorageError, OSError: something could not be copied, or arrived otherwise than it was sent.
        """
        complete = commits.committed(os.path.join(self.folder, CHECKPOINTS))
        loose = self._loose_files()
        for commit in complete:
            self._copy_checkpoint(commit)
        for name in loose:
            self._copy(name)
        storage.write_text(storage.join(self.url, LISTING), json.dumps(loose))
        present = {name for commit in complete for name in _files_of(commit)} | set(loose)
        gone = sorted(set(self._copied) - present, key=lambda name: not name.endswith(".commit.json"))
        for name in gone:
            storage.remove(storage.join(self.url, name))
            del self._copied[name]

    def _loose_files(self) -> list[str]:
        """The files that belong to no checkpoint: logs, metrics, traces."""
        root = Path(self.folder)
        names = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
        return [
            str(name)
            for name in names
            if not name.name.startswith(".") and (name.parts[0] != CHECKPOINTS or name.name == "results.jsonl")
        ]

    def _copy_checkpoint(self, commit: Commit) -> None:
        *files, commit_file = _files_of(commit)
        if commit_file in self._copied:
            return
        remote = storage.join(self.url, commit_file)
        if storage.exists(remote) and commits.read_commit(remote) == commit:  # an earlier start has copied it
            self._copied |= dict.fromkeys((*files, commit_file), (0, 0))
            return
        for name, record in zip(files, commit.files.values(), strict=True):
            self._copy(name, record.sha256)
        self._copy(commit_file)
        logging.info("copied checkpoint %s to %s", commit.label, storage.shown(self.url))

    def _copy(self, name: str, sha256: str | None = None) -> None:
        """Copy one file and read it back: it has arrived when its hash is that of what was sent."""
        path = os.path.join(self.folder, name)
        state = os.stat(path)
        if self._copied.get(name) == (state.st_size, state.st_mtime_ns):
            return
        remote = storage.join(self.url, name)
        with open(path, "rb") as file, storage.open_atomic(remote) as out:
            sent = hashing_copy(file, out)
        if commits.hashed(remote).sha256 != sent or (sha256 is not None and sent != sha256):
            storage.remove(remote)
            raise StorageError(f"{storage.shown(remote)}: arrived with another hash than {path} has.")
        self._copied[name] = (state.st_size, state.st_mtime_ns)


def hashing_copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copy all of `source`; the sha256 of what was copied."""
    hashing = HashingFile(target)
    shutil.copyfileobj(source, cast("IO[bytes]", hashing), 8 << 20)
    return hashing.record().sha256


def bring_back(url: str, folder: str) -> None:
    """Make `folder` what was copied to `url`, where that holds a newer complete checkpoint: its files, and the logs.

    Raises:
        StorageError: something cannot be read.
        CheckpointError: it arrived damaged.
    """
    theirs = commits.committed(storage.join(url, CHECKPOINTS))
    ours = commits.committed(os.path.join(folder, CHECKPOINTS))
    if not theirs or (ours and ours[0].step >= theirs[0].step):
        return
    newest = theirs[0]
    logging.info("fetching checkpoint %s (%s) from %s", newest.label, text.size(newest.size_bytes), storage.shown(url))
    listing = storage.join(url, LISTING)
    loose = json.loads(storage.read_text(listing)) if storage.exists(listing) else []
    hashes = [record.sha256 for record in newest.files.values()]
    *files, commit_file = _files_of(newest)
    for name, sha256 in [*((name, None) for name in loose), *zip(files, hashes, strict=True), (commit_file, None)]:
        _fetch(storage.join(url, name), os.path.join(folder, safe(name)), sha256)


def _fetch(remote: str, path: str, sha256: str | None) -> None:
    with storage.open_read(remote) as source, storage.open_atomic(path) as target:
        found = hashing_copy(source, target)
        if sha256 is not None and found != sha256:
            raise StorageError(f"{storage.shown(remote)} does not have the hash in its commit file: it is damaged.")


def safe(name: str) -> str:
    """`name`, once it is sure that it stays inside the run folder.

    Raises:
        StorageError: it does not.
    """
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise StorageError(f"{name!r} leads out of the run folder: the remote copy is not one of ours.")
    return name


def _files_of(commit: Commit) -> list[str]:
    """The files of a checkpoint inside a run folder, the commit file last."""
    return [f"{CHECKPOINTS}/{name}" for name in (*commit.files, commit.commit_name)]
