"""The checkpoint that --resume latest goes on from: those here and in the remote copy as one list, the newest first,
each verified when its turn comes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from open_lm import storage
from open_lm.checkpoint.commit import Commit, committed
from open_lm.checkpoint.fetch import fetch_checkpoint
from open_lm.checkpoint.resolve import Found, found_in
from open_lm.checkpoint.verify import fault_of
from open_lm.distributed import World
from open_lm.errors import CheckpointError


@dataclass(frozen=True)
class Candidate:
    """A checkpoint, and the folders that it is in, the nearest first."""

    commit: Commit
    folders: tuple[str, ...]


def candidates(folders: Sequence[str]) -> list[Candidate]:
    """The complete checkpoints of all `folders`, the one to continue from first; at the same step those of the first
    folder."""
    found: dict[tuple[str, str], Candidate] = {}
    for folder in folders:
        for commit in committed(folder):
            known = found.get((commit.label, commit.identity), Candidate(commit, ()))
            found[commit.label, commit.identity] = replace(known, folders=(*known.folders, folder))
    return sorted(found.values(), key=lambda one: (-one.commit.branch, -one.commit.step))


def newest_sound(world: World, folders: Sequence[str]) -> Found | None:
    """The newest sound checkpoint of `folders`: of the home of a run's checkpoints, and of further places that a local
    home is completed from. None where there are none. Every rank must call this.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
        StorageError: a remote folder cannot be read.
    """
    home, *_ = folders
    each = world.on_rank0(lambda: candidates(folders))
    for candidate in each:
        for folder in candidate.folders:
            found = _sound_in(world, home, folder, candidate.commit)
            if found is not None:
                return found
    if each:
        raise CheckpointError(
            f"{' and '.join(map(storage.shown, folders))}: all {len(each)} checkpoints are damaged (see the warnings "
            "above). Restore one of them from a copy, or start a new run under another --name."
        )
    return None


def _sound_in(world: World, home: str, folder: str, commit: Commit) -> Found | None:
    """The checkpoint of `folder`, fetched if `home` is local, once it is verified; None where it is damaged."""
    if folder == home or storage.is_remote(home):
        return None if fault_of(world, folder, commit) else found_in(folder, commit, "all")
    is_fetched = world.on_rank0(lambda: _fetched(folder, home, commit))
    if is_fetched is None:
        return None
    if is_fetched:
        return found_in(home, commit, "all")
    logging.warning("checkpoint %s is read from %s: that label is another's here.", commit.label, storage.shown(folder))
    return None if fault_of(world, folder, commit) else found_in(folder, commit, "all")


def _fetched(remote: str, folder: str, commit: Commit) -> bool | None:
    """As `fetch_checkpoint`; None for a damaged one, which is logged."""
    try:
        return fetch_checkpoint(remote, folder, commit)
    except CheckpointError as error:
        logging.warning("%s Its checkpoint is skipped.", error)
        return None
