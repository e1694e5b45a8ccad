"""Verification of sharded checkpoints, shared among the ranks: each computes the checksums of its part of the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from open_lm.checkpoint.checksum import FileRecord
from open_lm.checkpoint.commit import Commit, committed, damaged_file
from open_lm.checkpoint.resolve import checkpoint_folder, resolve
from open_lm.distributed import World

Candidate = tuple[str, Commit]
"""A folder, and a checkpoint in it."""


def verified_together(world: World, candidates: Callable[[], Sequence[Candidate]]) -> dict[str, str | None]:
    """Faults of the `candidates` (as rank 0 gives them, the best first) by their identity, None for a sound one, up to
    the first that is sound. Every rank must call this.

    Those that are not in shards are left out: not every rank may see their files.
    """
    known: dict[str, str | None] = {}
    if world.size == 1:
        return known
    for folder, commit in world.on_rank0(candidates):
        if "shards" not in commit.facts:
            break
        mine = shares(commit.files, world.size)[world.rank]
        problems = world.gather(damaged_file(folder, commit, only=mine))
        known[commit.identity] = next((problem for problem in problems if problem), None)
        if known[commit.identity] is None:
            break
    return known


def shares(files: Mapping[str, FileRecord], n: int) -> list[list[str]]:
    """The files in `n` parts of about equal size."""
    parts: list[list[str]] = [[] for _ in range(n)]
    sizes = [0] * n
    for name, record in sorted(files.items(), key=lambda item: (-item[1].size_bytes, item[0])):
        least = sizes.index(min(sizes))
        parts[least].append(name)
        sizes[least] += record.size_bytes
    return parts


def candidates(folder: str, name: str | None) -> list[Candidate]:
    """The checkpoints that `name` may mean, the best first; None and `latest` mean all of `folder`."""
    if name in (None, "latest"):
        inside = checkpoint_folder(folder)
        return [(inside, commit) for commit in committed(inside)]
    found = resolve(str(name))
    return [(found.folder, found.commit)] if found.commit is not None else []
