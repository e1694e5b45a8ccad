"""Which checkpoint a name means: a file, a run folder, a checkpoint folder, or `latest`."""

from __future__ import annotations

from open_lm import storage
from open_lm.checkpoint.commit import Commit, committed, hashes_match
from open_lm.errors import CheckpointError


def checkpoint_folder(folder: str) -> str:
    """Where a run keeps its checkpoints: `folder/checkpoints`, or `folder` itself when it is that folder."""
    inside = storage.join(folder, "checkpoints")
    return inside if storage.exists(inside) else folder


def newest(folder: str) -> Commit | None:
    """The newest checkpoint in `folder` that is complete and undamaged; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    commits = committed(folder)
    for commit in commits:
        if hashes_match(folder, commit):
            return commit
    if commits:
        raise CheckpointError(
            f"{folder}: all {len(commits)} checkpoints are damaged (see the warnings above). "
            "Restore one of them from a copy, or start anew under another --name."
        )
    return None


def latest(folder: str) -> str | None:
    """The epoch_K.pt of the newest complete checkpoint of a run (or checkpoint) folder; None when there is none."""
    inside = checkpoint_folder(folder)
    commit = newest(inside)
    return storage.join(inside, commit.weights_name) if commit else None
