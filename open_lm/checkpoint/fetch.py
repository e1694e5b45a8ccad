"""Fetching: what a remote copy of a run has and this machine lacks, checkpoints and logs."""

from __future__ import annotations

import json
import logging
import os
from functools import partial
from pathlib import Path

from open_lm import storage, text
from open_lm.checkpoint import commit as commits
from open_lm.checkpoint.checksum import BLOCK_BYTES, FileRecord, matches
from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.retention import UNFINISHED
from open_lm.errors import CheckpointError, StorageError

CHECKPOINTS = "checkpoints"
LISTING = "mirror.json"
"""The file that names what lies beside the checkpoints in a remote folder, so that it can be brought back."""


def fetch_checkpoint(remote: str, folder: str, commit: Commit) -> bool:
    """Make the checkpoint `commit` of the folder `remote` complete in the local `folder`; files that are as they were
    written are not fetched again. False where a name of its files is another checkpoint's here, which stays.

    Raises:
        CheckpointError: it is damaged there; what was fetched is gone again.
        StorageError: it cannot be read, or not be written here.
    """
    here = {name: storage.join(folder, safe(name)) for name in commit.files}
    lacking = [name for name, path in here.items() if not _is_sound(path, commit.files[name])]
    in_the_way = [name for name in lacking if storage.exists(here[name])]
    if not _is_free(folder, commit, in_the_way):
        return False
    logging.info(
        "fetching checkpoint %s (%s) from %s", commit.label, text.size(commit.size_bytes), storage.shown(remote)
    )
    try:
        commits.in_parallel(
            partial(commits.copy, storage.join(remote, name), here[name], commit.files[name]) for name in lacking
        )
    except CheckpointError:
        for name in set(lacking) - set(in_the_way):
            storage.remove(here[name])
        raise
    commits.copy(storage.join(remote, commit.commit_name), storage.join(folder, commit.commit_name))
    return True


def _is_sound(path: str, record: FileRecord) -> bool:
    try:
        return matches(path, record)
    except (StorageError, OSError) as error:  # a sector that cannot be read
        logging.warning("%s", error)
        return False


def _is_free(folder: str, commit: Commit, in_the_way: list[str]) -> bool:
    """Whether `commit` may have its names in `folder`, where files of other content are `in_the_way`: those are its
    own, damaged, where the same commit file is there."""
    paths = [path for path in storage.glob_in(folder, f"epoch_{commit.label}.*json") if not path.endswith(UNFINISHED)]
    others = [commits.read_commit(path) for path in paths]
    if any(other is not None and other.identity != commit.identity for other in others):
        return False
    return not in_the_way or any(other is not None for other in others)


def bring_back_logs(url: str, folder: str) -> None:
    """Complete the logs of the run in `folder` from its copy at `url`, where either holds a checkpoint to go on from.

    Those that are missing here are fetched, and those that go on there where the ones here end. Of two that differ
    those stay whose checkpoints are ahead.

    Raises:
        StorageError: something cannot be read.
    """
    theirs, ours = (commits.committed(storage.join(place, CHECKPOINTS)) for place in (url, folder))
    if not theirs and not ours:
        return
    theirs_are_ahead = bool(theirs) and (not ours or _place(theirs[0]) > _place(ours[0]))
    sizes = _sizes(url, {safe(name) for name in listed(url)})
    commits.in_parallel([partial(_bring_back, url, folder, name, n, theirs_are_ahead) for name, n in sizes.items()])


def _place(commit: Commit) -> tuple[int, int]:
    return commit.branch, commit.step


def listed(url: str) -> set[str]:
    """The names of the logs in the copy at `url`."""
    path = storage.join(url, LISTING)
    if not storage.exists(path):
        return set()
    try:
        return {str(name) for name in json.loads(storage.read_text(path))}
    except (ValueError, TypeError) as error:
        logging.warning("%s is damaged (%s): the logs there stay there.", storage.shown(path), error)
        return set()


def _sizes(url: str, names: set[str]) -> dict[str, int]:
    """The sizes of those of `names` that are at `url`, of a remote one in one request."""
    there = storage.remote.listing(url) if storage.is_remote(url) else None
    if there is not None:
        return {name: there[name].size_bytes for name in names if name in there}
    paths = {name: storage.join(url, name) for name in names}
    return {name: storage.size_bytes(path) for name, path in paths.items() if storage.exists(path)}


def _bring_back(url: str, folder: str, name: str, n_there: int, theirs_are_ahead: bool) -> None:
    here, there = os.path.join(folder, name), storage.join(url, name)
    n_here = os.path.getsize(here) if os.path.exists(here) else 0
    if n_here == n_there:
        return
    if not n_here or (n_there > n_here if _agree(here, there, min(n_here, n_there)) else theirs_are_ahead):
        commits.copy(there, here)


def _agree(here: str, there: str, n_bytes: int) -> bool:
    """Whether two files begin with the same `n_bytes`."""
    with storage.open_read(here) as ours, storage.open_read(there) as theirs:
        for start in range(0, n_bytes, BLOCK_BYTES):
            wanted = min(BLOCK_BYTES, n_bytes - start)
            if ours.read(wanted) != theirs.read(wanted):
                return False
    return True


def safe(name: str) -> str:
    """`name`, once it is sure that it stays inside the run folder.

    Raises:
        StorageError: it does not.
    """
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise StorageError(f"{name!r} leads out of the run folder: the remote copy is not one of ours.")
    return name
