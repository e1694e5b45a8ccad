"""Which checkpoints may go once a new one is complete. Pure: commits in, commits out."""

from __future__ import annotations

from collections.abc import Sequence

from open_lm.checkpoint.commit import Commit
from open_lm.checkpoint.when import Kind


def kind_of(commit: Commit) -> Kind:
    """How long a checkpoint was meant to stay; commit files of before kinds were written only know kept or not."""
    if not commit.facts.get("kept", True):
        return "ephemeral"
    return commit.facts.get("kind", "step" if "-" in commit.label else "interval")


def may_go(complete: Sequence[Commit], newest: Commit, n_kept: int | None) -> list[Commit]:
    """Those of the `complete` checkpoints that retention lets go of now that `newest`, one of them, is there.

    `n_kept` None keeps all but ephemeral ones. Ephemeral ones never count as one of those that are kept, fixed ones
    neither count nor go, and `newest` stays whatever it is. Without `newest` among the complete nothing goes.
    """
    others = [commit for commit in complete if commit.label != newest.label]
    if len(others) == len(complete):
        return []
    going = [commit for commit in others if kind_of(commit) == "ephemeral"]
    for kind in ("interval", "step") if n_kept is not None else ():
        assert n_kept is not None
        alike = sorted((c for c in complete if kind_of(c) == kind), key=lambda commit: -commit.step)
        going += [commit for commit in alike[n_kept:] if commit.label != newest.label]
    return going
