"""Retention: the one owner of what is deleted from a folder of checkpoints, and of what is left behind in it.

Deleted are only checkpoints that the save policy lets go of, and files of saves that began here and were killed before
their commit. Whatever this program cannot read stays.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from open_lm import storage
from open_lm.checkpoint import processes
from open_lm.checkpoint.commit import COMMITTED, LEFT_BEHIND, SHARDS_SIGN, Commit, committed, read_commit
from open_lm.checkpoint.save_policy import to_delete

UNFINISHED = ".unfinished.json"
"""Ending of the file that a save writes first and removes last: it names what may be deleted if nothing commits it."""


class Retention:
    """The deletions in one local folder, and in its remote copy. `n_kept`: as --keep-last. `require_owner` raises where
    another run has taken over the folder: it is asked before each deletion.

    Nothing goes until the run has begun: before, nobody knows which checkpoint it goes on from.
    """

    def __init__(self, folder: str, n_kept: int | None, require_owner: Callable[[], None] = lambda: None):
        self.require_owner = require_owner
        self._folder, self._n_kept = folder, n_kept
        self._has_begun = False
        self._pinned: set[str] = set()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """From here on the policy counts: the checkpoint that the run goes on from is the newest, here and there."""
        self._has_begun = True

    @contextlib.contextmanager
    def unfinished(self, label: str, names: Sequence[str]) -> Iterator[None]:
        """Around a save that writes `names` and commits them in the end."""
        path = storage.join(self._folder, f"epoch_{label}{UNFINISHED}")
        mine = json.dumps({"label": label, "names": list(names), "owner": processes.identity()})
        storage.write_text(path, mine)
        try:
            yield
        finally:  # what has no commit by now was removed by the save itself
            if storage.exists(path) and storage.read_text(path) == mine:  # else another run has taken over
                storage.remove(path)

    @contextlib.contextmanager
    def pinned(self, commit: Commit) -> Iterator[None]:
        """While the block runs, `commit` stays, so that it can be copied."""
        with self._lock:
            self._pinned.add(commit.label)
        try:
            yield
        finally:
            with self._lock:
                self._pinned.discard(commit.label)
            self.thin_out()

    def thin_out(self) -> None:
        """Delete what the policy lets go of, but for what is pinned."""
        with self._lock:
            self._let_go(self._folder, self._pinned)

    def thin_out_copy(self, folder: str) -> None:
        """Delete in the remote copy of the folder what the policy lets go of there."""
        self._let_go(folder, frozenset())

    def _let_go(self, folder: str, pinned: Collection[str]) -> None:
        complete = committed(folder) if self._has_begun else []
        for commit in to_delete(complete, complete[0], self._n_kept) if complete else ():
            if commit.label not in pinned:
                self.require_owner()
                discard(folder, commit)

    def sweep(self) -> None:
        """Delete the files of saves that were killed: named by a save that ended with its process, and by nothing
        else; and commit files that were only half written."""
        self.require_owner()
        alive = set()
        for path in storage.glob_in(self._folder, f"epoch_*{UNFINISHED}"):
            try:
                begun = json.loads(storage.read_text(path))
                label, names, owner = begun["label"], begun["names"], begun["owner"]
            except (ValueError, KeyError, TypeError):
                continue
            if processes.is_here(owner) and processes.is_running(owner):  # of other machines the run's lock knows
                alive.add(f"epoch_{label}")
                continue
            spoken_for = _named_in(self._folder, label)
            for name in names:
                for path_half_written in Path(self._folder).glob(f".{name}.*.tmp"):
                    path_half_written.unlink(missing_ok=True)
                if name not in spoken_for:
                    _delete(self._folder, name)
            storage.remove(path)
        for half_written in Path(storage.local_path(self._folder)).glob(".epoch_*.json.*.tmp"):
            if half_written.name.split(".")[1] not in alive:
                half_written.unlink(missing_ok=True)


def discard(folder: str, commit: Commit) -> None:
    """Delete a checkpoint, the commit file first, so that a half-deleted one does not count."""
    storage.remove(storage.join(folder, commit.commit_name))
    for name in commit.files:
        storage.remove(storage.join(folder, name))
    if "shards" in commit.facts and not storage.is_remote(folder):
        shutil.rmtree(storage.local_path(storage.join(folder, commit.facts["shards"])), ignore_errors=True)


def free_label(folder: str, label: str, step: int, also_taken: frozenset[str] = frozenset()) -> str:
    """`label`, or another where files of that label are here already: none is ever written over."""
    for name in (label, f"{label.partition('-')[0]}-step{step}"):
        if not _is_taken(folder, name) and name not in also_taken:
            return name
    return next(
        name for k in range(2, 1 << 20)
        if not _is_taken(folder, name := f"{label.partition('-')[0]}-step{step}-{k}") and name not in also_taken
    )  # fmt: skip


def _is_taken(folder: str, label: str) -> bool:
    """Whether files of a checkpoint of this label are here, committed or not."""
    names = {path.rpartition("/")[2] for path in storage.glob_in(folder, f"*_{label}.*")}
    return any(name.startswith(f"epoch_{label}.") for name in names) or f"optimizer_{label}.pt" in names


def labels_in(folder: str) -> frozenset[str]:
    """The labels that commit files of any state (good, set aside, damaged) have in `folder`."""
    names = [path.rpartition("/")[2] for path in storage.glob_in(folder, "epoch_*.json")]
    names = [name for name in names if not name.endswith(UNFINISHED)]
    return frozenset(name.removeprefix("epoch_").rpartition(".")[0].partition(".")[0] for name in names)


def leave_behind(folders: Sequence[str], branch: int, step: int) -> int:
    """The branch of a run that continues after `step` steps of `branch`: later checkpoints no longer count (their
    files stay), and where there are any a new branch begins.
    """
    later = [(folder, c) for folder in folders for c in committed(folder) if (c.branch, c.step) > (branch, step)]
    if not later:
        return branch
    known = [_branch_in(path) for folder in folders for path in storage.glob_in(folder, "epoch_*.json")]
    for folder, commit in later:
        name = commit.commit_name.removesuffix(COMMITTED) + LEFT_BEHIND
        logging.warning(
            "going back to step %d: checkpoint %s of step %d is set aside (%s).",
            step, commit.label, commit.step, storage.shown(storage.join(folder, name)),
        )  # fmt: skip
        rename(folder, commit.commit_name, name)
    return 1 + max([branch, *known])


def _branch_in(path: str) -> int:
    commit = None if path.endswith(UNFINISHED) else read_commit(path)
    return commit.branch if commit else 0


def rename(folder: str, name: str, new_name: str) -> None:
    """Give a commit file another name, so that it counts no longer (or again)."""
    content = storage.read_bytes(storage.join(folder, name))
    storage.write_bytes(storage.join(folder, new_name), content)
    storage.remove(storage.join(folder, name))


def _named_in(folder: str, label: str) -> frozenset[str]:
    """The files, and folders of shards, that a commit file speaks of, be it damaged, left behind or of another program:
    of one that cannot be read all that its name implies."""
    names: set[str] = set()
    for path in storage.glob_in(folder, "*.json"):
        if path.endswith(UNFINISHED):
            continue
        text = storage.read_bytes(path).decode(errors="replace")
        is_of_label = path.rpartition("/")[2].startswith(f"epoch_{label}.")
        for entry in Path(storage.local_path(folder)).iterdir():
            has_label = f"_{label}." in entry.name
            if entry.name in text or (is_of_label and has_label and SHARDS_SIGN not in entry.name):
                names.add(entry.name)
    return frozenset(names)


def _delete(folder: str, name: str) -> None:
    path = storage.local_path(storage.join(folder, name))
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else storage.remove(str(path))
